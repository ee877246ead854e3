"""Methods that put the strongest directions of all task vectors side by side, and make room between them.

All work on the matrices w·τ of N experts, (m, n), and give λ times what the paper gives. At the defaults, weights of 1
and λ = 1, that is the paper's sum over the experts; with weights that sum to 1, λ = N is. What is no matrix, and a
matrix with fewer rows or columns than there are experts, is merged as λ Σ w·τ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from evolver.merging.methods import Range, each, method, number
from evolver.merging.methods.averages import SumMass, Weight
from evolver.merging.methods.here import Stack
from evolver.merging.methods.joined import KeptShare, joined_directions, over_matrices, room_for_each
from evolver.merging.methods.spectrum import ENERGY, ROWS_AT_ONCE, polar, products_of_columns

# Outliers lie so many standard deviations from the mean; what is nearer to zero than this share of one is zero.
OUTLIER, ZERO = 3.0, 0.01


@method(
    "Gargiulo et al. 2025, Task singular vectors (TSV-Merge), arXiv 2412.00081",
    whole=True,
    exact=False,
    identity={"rank_aware": False},
)
def tsv_m(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: SumMass = number(1.0),
    share: KeptShare = number(1.0),
    rank_aware: bool = True,
) -> Tensor:
    """TSV-M: keep k directions of each w·τ, and turn all of them until they are orthogonal: λ U⊥ Σ V⊥ᵀ.

    U⊥ and V⊥ are the orthonormal columns nearest to the singular vectors of all experts, and Σ are their singular
    values. k = share·⌊min(m, n) / N⌋, but no more than the directions that hold 99.9 % of the squared singular values
    (``rank_aware``): others would be rounding, and would turn those that count. Tensors that are no matrices, and those
    with fewer rows or columns than there are experts, are λ Σ w·τ.
    """
    return lambda_ * orthogonal_sum(deltas, weight, float(share), rank_aware)


@method(
    "Yang et al. 2025, Mix data or merge models (R-TSVM), arXiv 2502.06876",
    whole=True,
    exact=False,
    identity={"gamma": 0.0, "rank_aware": False},
)
def r_tsvm(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: SumMass = number(1.0),
    share: KeptShare = number(1.0),
    outlier: Annotated[Tensor, Range(0.0, 1.0, least=0.0)] = number(1.0),
    gamma: Annotated[Tensor, Range(0.0, 2.0, least=0.0)] = number(1.0),
    rank_aware: bool = True,
) -> Tensor:
    """R-TSVM: ``tsv_m`` with more weight for experts with outliers, and fewer directions for sparse task vectors.

    The paper has no code; this is our reading of it, matrix by matrix. The weight of an expert is multiplied by
    N·oᵉ / Σ oᵉ, where e is ``outlier`` and o is the sum of |τ| over what lies more than three standard deviations from
    the mean. Its k is multiplied by (1 - q)^γ, where q is the share of |τ| below 0.01 standard deviations. At outlier 0
    and γ 0 it is ``tsv_m``. Tensors that are no matrices, and small ones, are λ Σ w·τ.
    """

    def matrix(stack: Stack, weights: Sequence[float]) -> Tensor:
        far, near = zip(*(_outliers_and_zeros(d) for d in stack), strict=True)
        outliers = torch.tensor(far, dtype=torch.float64).pow(float(outlier))
        total = float(outliers.sum())
        more = (outliers * (len(stack) / total)).tolist() if total else [1.0] * len(stack)
        most = [room_for_each(stack) * float(share) * (1 - q) ** float(gamma) for q in near]
        return _turned_apart(stack, [w * m for w, m in zip(weights, more, strict=True)], most, rank_aware)

    return lambda_ * over_matrices(deltas, weight, matrix)


@method(
    "Qiu et al. 2025, Superpose task-specific features (STF), arXiv 2502.10698",
    whole=True,
    exact=False,
    identity={"energy": 1.0},
)
def stf(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: SumMass = number(1.0),
    energy: Annotated[Tensor, Range(0.5, 0.999, above=0.0, most=1.0)] = number(0.99),
    ridge: Annotated[Tensor, Range(1e-6, 1e-1, log=True, least=1e-9)] = number(1e-6),
    constraint: Literal["bilinear", "vector"] = "bilinear",
) -> Tensor:
    """STF: the matrix M in which every kept direction of every expert is as strong as in that expert, times λ.

    The abstract says no more; these are two readings of it. ``bilinear``: M = Σ a u vᵀ with uᵀ M v = w·σ for every kept
    direction. ``vector``: M v = w·σ·u, with the smallest M. Directions are kept up to a share ``energy`` of the squared
    singular values, and no more than ⌊min(m, n) / N⌋ of an expert. ``ridge`` is added to the diagonal of the system of
    equations, on which there are ones: where experts have nearly the same direction and want it differently strong, no
    M is moderate without it. Tensors that are no matrices, and small ones, are λ Σ w·τ.
    """

    def matrix(stack: Stack, weights: Sequence[float]) -> Tensor:
        joined = joined_directions(stack, weights, [room_for_each(stack)] * len(stack), float(energy))
        if constraint == "vector":
            solved = _solved(products_of_columns(joined.v), joined.v.T, float(ridge))
            return (joined.u * joined.s) @ solved.float()
        overlap = products_of_columns(joined.u).mul_(products_of_columns(joined.v))
        strength = _solved(overlap, joined.s[:, None], float(ridge))[:, 0]
        right = joined.v.double().mul_(strength).T  # in float64: large numbers may cancel
        return torch.cat([(rows.double() @ right).float() for rows in joined.u.split(ROWS_AT_ONCE)])

    return lambda_ * over_matrices(deltas, weight, matrix)


def orthogonal_sum(deltas: Stack, weight: Tensor, share: float = 1.0, rank_aware: bool = True) -> Tensor:
    """TSV-M with the total mass Σ w; see ``tsv_m``."""

    def matrix(stack: Stack, weights: Sequence[float]) -> Tensor:
        return _turned_apart(stack, weights, [room_for_each(stack) * share] * len(stack), rank_aware)

    return over_matrices(deltas, weight, matrix)


def _turned_apart(deltas: Stack, weights: Sequence[float], most: Sequence[float], rank_aware: bool) -> Tensor:
    joined = joined_directions(deltas, weights, most, ENERGY if rank_aware else 1.0)
    return (polar(joined.u) * joined.s) @ polar(joined.v).T


def _outliers_and_zeros(delta: Tensor) -> tuple[float, float]:
    """Σ |τ| over the outliers of a matrix, and the share of scalars that are next to nothing."""
    spread, size = delta.std(correction=0), delta.abs()
    outliers = torch.where((delta - delta.mean()).abs() > OUTLIER * spread, size, 0.0)
    return float(outliers.sum(dtype=torch.float64)), float((size < ZERO * spread).double().mean())


def _solved(system: Tensor, right: Tensor, ridge: float) -> Tensor:
    """X of (A + ridge) X = B for a positive semi-definite A, (K, K), which is overwritten. Float64.

    Raises FloatingPointError where the ridge is too small for A.
    """
    system.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        raise FloatingPointError(f"directions of the experts depend on each other; a ridge above {ridge:g} is needed")
    solved: Tensor = torch.cholesky_solve(right.double(), factor)
    return solved
