"""OPCM: experts that arrive one after the other, each merged where the merge so far is weak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from evolver.merging.methods import Range, each, method, number
from evolver.merging.methods.averages import SumMass, Weight
from evolver.merging.methods.here import Stack
from evolver.merging.methods.spectrum import decomposed, matrix_by_matrix


@method(
    "Tang et al. 2025, Merging models on the fly (OPCM), arXiv 2501.09522", whole=True, exact=False, symmetric=False
)
def opcm(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: SumMass = number(1.0),
    alpha: Annotated[Tensor, Range(0.1, 0.95, least=0.0, most=1.0)] = number(0.5),
) -> Tensor:
    """OPCM: experts in their order, each without what lies in the strong directions of the merge M so far, times λ.

    With M = U Σ Vᵀ, of UᵀτV the diagonal is dropped, and the block of the first r directions, which hold the share
    ``alpha`` of the sum of the singular values at the most. What stays is added to M at the length that M had before it
    was scaled; then M is scaled to the mean norm of the w·τ so far. The paper takes norms over the whole model. Here
    they are those of the tensor, and experts that did not change it are passed over. Tensors that are no matrices are
    added and scaled in the same way.
    """
    weights = weight.tolist()
    return lambda_ * matrix_by_matrix(
        deltas, lambda stack: _in_turn(stack, weights, float(alpha)), lambda stack: _in_turn(stack, weights, None)
    )


def _in_turn(stack: Stack, weights: Sequence[float], alpha: float | None) -> Tensor:
    """The merge after the last expert; ``alpha`` is None for tensors that have no directions."""
    merged, length, norms = torch.zeros_like(stack[0]), 1.0, list[float]()
    for delta, w in zip(stack, weights, strict=True):
        norm = abs(w) * _norm(delta)
        if not norm:
            continue
        new = w * (delta if alpha is None or not norms else _elsewhere(delta, merged, alpha))
        norms.append(norm)
        longer = new.add_(merged, alpha=length)
        length = _norm(longer) * len(norms) / sum(norms) or 1.0
        merged = longer / length
    return merged


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _elsewhere(delta: Tensor, merged: Tensor, alpha: float) -> Tensor:
    """A task vector without what it is in the strong directions of a merge, and without what would scale the others.

    Directions of the merge whose singular values are zero count for nothing, as they are arbitrary.
    """
    u, s, v = decomposed(merged).that_count()
    running = s.double().cumsum(0)
    strong = int((running <= alpha * running[-1]).sum()) if len(s) else 0
    inner = u.T @ delta @ v
    dropped = torch.diag(inner.diagonal())
    dropped[:strong, :strong] = inner[:strong, :strong]
    return delta - u @ dropped @ v.T
