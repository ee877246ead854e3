"""Methods that raise the weak directions of a merge: isotropic merging and subspace boosting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from evolver.merging.methods import Range, each, method, number
from evolver.merging.methods.averages import Mass, SumMass, Weight
from evolver.merging.methods.here import Stack
from evolver.merging.methods.joined import added_up, over_matrices
from evolver.merging.methods.spectrum import ENERGY, Factors, decomposed, matrix_by_matrix, polar

Flatten = Annotated[Tensor, Range(0.0, 1.0, least=0.0, most=1.0)]


@method(
    "Marczak et al. 2025, No task left behind (Iso-C), arXiv 2502.04959",
    whole=True,
    exact=False,
    identity={"flatten": 0.0},
)
def iso_c(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: SumMass = number(1.0),
    flatten: Flatten = number(1.0),
    rank_aware: bool = True,
) -> Tensor:
    """Iso-C: λ Σ w·τ, a matrix, with its singular values σ all made equal to their mean.

    With ``flatten`` below 1 they become mean^e · σ^(1 - e): at e = 0 it is task arithmetic. The mean is over the
    directions that hold 99.9 % of the squared singular values, and the others stay as they are (``rank_aware``). The
    paper raises all of them, and so fills what no expert changed, which is most of a matrix if the experts are LoRA
    adapters. Tensors that are no matrices are λ Σ w·τ.
    """
    return lambda_ * matrix_by_matrix(
        deltas,
        lambda stack: evened(added_up(stack, weight), float(flatten), rank_aware),
        lambda stack: added_up(stack, weight),
    )


@method(
    "Marczak et al. 2025, No task left behind (Iso-CTS), arXiv 2502.04959",
    whole=True,
    exact=False,
    identity={"flatten": 0.0},
)
def iso_cts(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: SumMass = number(1.0),
    common: Annotated[Tensor, Range(0.3, 1.0, least=0.0, most=1.0)] = number(0.8),
    flatten: Flatten = number(1.0),
    rank_aware: bool = True,
) -> Tensor:
    """Iso-CTS: as ``iso_c``, but weak directions of the sum make room for directions of single experts.

    The share ``common`` of all min(m, n) directions are the strongest of Σ w·τ. Each expert adds those of what the
    common ones leave of its w·τ, an N-th of the rest. All are made orthogonal as in ``tsv_m``, and get the mean of
    their singular values. With ``flatten`` e below 1, they get mean^e · σ^(1 - e), and a share 1 - e of what Σ w·τ has
    beside them is added, so that e = 0 is task arithmetic. ``rank_aware`` leaves out directions beyond 99.9 % of the
    squared singular values of the sum and of each expert. Tensors that are no matrices, and those with fewer rows or
    columns than there are experts, are λ Σ w·τ.
    """

    def matrix(stack: Stack, weights: Sequence[float]) -> Tensor:
        summed = added_up(stack, weight)
        u, s, v = _common_and_own(summed, stack, weights, float(common), rank_aware)
        correction = _flattened(s, float(flatten)) - (1 - float(flatten)) * s
        return (1 - float(flatten)) * summed + (polar(u) * correction) @ polar(v).T

    return lambda_ * over_matrices(deltas, weight, matrix)


@method(
    "Skorobogat et al. 2025, Subspace-boosted model merging, arXiv 2506.16506",
    whole=True,
    exact=False,
    identity={"beta": 1.0},
)
def subspace_boosting(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: Mass = number(1.0),
    beta: Annotated[Tensor, Range(0.0, 1.0, least=0.0, most=1.0)] = number(0.2),
    rank_aware: bool = False,
) -> Tensor:
    """λ Σ w·τ, a matrix, with its weak singular values raised to the first at which their running sum reaches β.

    At β = 0 all are as large as the largest; at β = 1 nothing changes. Over a single input, which may be a merge by any
    method, it is that method with boosting. The default is that of the study of models in the wild. The released
    code's own default, 0.01, raises everything to the largest wherever the first direction holds more than 1 % of the
    sum. ``rank_aware`` raises no directions beyond 99.9 % of the squared singular values, so that nothing is filled in
    that no expert changed. Tensors that are no matrices are λ Σ w·τ.
    """

    def matrix(stack: Stack) -> Tensor:
        summed = added_up(stack, weight)
        found = decomposed(summed)
        running = found.s.double().cumsum(0)
        at = int((running[:-1] < beta * running[-1]).sum())
        raised = found.first(found.rank()) if rank_aware else found
        return summed + raised._replace(s=(found.s[at] - raised.s).clamp(min=0)).product()

    return lambda_ * matrix_by_matrix(deltas, matrix, lambda stack: added_up(stack, weight))


def evened(matrix: Tensor, flatten: float = 1.0, rank_aware: bool = True) -> Tensor:
    """Iso-C of a matrix (m, n): its singular values σ become mean^e · σ^(1 - e); see ``iso_c``."""
    found = decomposed(matrix)
    found = found.first(found.rank()) if rank_aware else found
    return matrix + found._replace(s=_flattened(found.s, flatten) - found.s).product()


def _flattened(s: Tensor, e: float) -> Tensor:
    """Mean^e · σ^(1 - e) of singular values (k); none of none."""
    return s.mean() ** e * s ** (1 - e) if len(s) else s


def _common_and_own(
    summed: Tensor, deltas: Stack, weights: Sequence[float], common: float, rank_aware: bool
) -> Factors:
    """The strongest directions of the sum, and each expert's of what they leave of it, side by side."""
    every = min(summed.shape)
    most = int(common * every)
    found = decomposed(summed)
    parts = [found.first(min(most, found.rank(ENERGY if rank_aware else 1.0)))]
    shared = parts[0].u.clone()
    for delta, w in zip(deltas, weights, strict=True):
        size = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2 if rank_aware else 0.0
        own = decomposed(delta - shared @ (shared.T @ delta))
        count = min((every - most) // len(deltas), own.rank(ENERGY, size)) if w else 0
        turned = math.copysign(1.0, w)  # strengths stay positive, as they are averaged
        parts.append(Factors(own.u[:, :count] * turned, own.s[:count] * abs(w), own.v[:, :count].clone()))
    u, v = (torch.cat(of, 1) for of in ([p.u for p in parts], [p.v for p in parts]))
    return Factors(u, torch.cat([p.s for p in parts]), v)
