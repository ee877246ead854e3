"""A merge that is optimised outside of the space in which the experts agree."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from evolver.merging.methods import Range, each, method, number
from evolver.merging.methods.averages import Weight
from evolver.merging.methods.bases import basis
from evolver.merging.methods.here import PieceView, Stack
from evolver.merging.methods.operators import total_of, trim, weighted_sum
from evolver.merging.methods.sparse import Density, Scope, magnitudes
from evolver.merging.methods.spectrum import factors, matrix_by_matrix


@method(
    "Wei et al. 2025, Modeling multi-task model merging (DOGE), arXiv 2501.01230",
    whole=True,
    exact=False,
    identity=None,
)
def doge_ta(
    deltas: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    eta: Annotated[Tensor, Range(0.02, 1.0, log=True, above=0.0)] = number(0.07),
    shared: Annotated[Tensor, Range(0.05, 0.5, least=0.0, most=1.0)] = number(1 / 6),
    density: Density = number(0.3),
    rate: Annotated[Tensor, Range(1e-6, 1e-3, log=True, least=0.0)] = number(1e-4),
    steps: int = 400,
    scope: Scope = "global",
) -> Tensor:
    """DOGE on task arithmetic: Σ λ(τ + δ) on the largest ``density`` of each τ, with λ = w η/‖τ‖.

    One δ for all experts is found by ``steps`` steps of Adam at the ``rate``: it minimises the squares of
    ⟨τ, τ - Σ λ(τ + δ)⟩, row by row, of all experts, but only outside of the strongest directions that they share, which
    are the ``shared`` part of all. The mass of this method is a length: every expert moves each matrix by η, however
    long its task vector is. With weights that sum to 1, η is N times the paper's. What is largest is so of the whole
    model, as in the paper, or of each tensor with ``scope: tensor``. Vectors, which have no δ, get Σ wτ / N.
    """

    def ranks(size: int) -> list[list[int]]:
        return [[max(1, round(float(density) * size))]] * len(deltas)

    cuts = here.kth_largest(magnitudes, ranks, scope)[:, 0].unbind(0)

    def of_matrix(stack: Stack) -> Tensor:
        norms = [float(x.double().norm()) for x in stack]
        scale = [float(w * eta) / n if n > 0 else 0.0 for w, n in zip(weight, norms, strict=True)]
        if not any(scale):
            return torch.zeros_like(stack[0])
        drift = _drift(stack, scale, _complement(stack, float(shared)), float(rate), steps)
        parts = ((x + drift) * (trim(x, cut) != 0) * s for x, cut, s in zip(stack, cuts, scale, strict=True))
        return total_of(list(parts))

    return matrix_by_matrix(deltas, of_matrix, lambda stack: weighted_sum(stack, weight, False) / len(stack))


def _complement(stack: Stack, share: float) -> Tensor:
    """Orthonormal columns (m, k) of the strongest directions that the experts' left singular vectors share."""
    rank = min(stack[0].shape)
    left = [factors(x).first(rank // len(stack)) for x in stack]
    return basis([f.first(f.rank(1.0)).u for f in left])[:, : int(share * rank)]


def _drift(stack: Stack, scale: list[float], protected: Tensor, rate: float, steps: int) -> Tensor:
    """δ (m, n) after ``steps`` steps of Adam, whose gradients leave out the ``protected`` columns.

    For row r and expert j the loss is a² with a = ⟨τ, τ - Σ λ τ⟩ - Σλ ⟨τ, δ⟩; its gradient in δ is -2 Σλ Σ a τ.
    """
    mass, merged = sum(scale), total_of([x * s for x, s in zip(stack, scale, strict=True)])
    wanted = [(x * (x - merged)).sum(1, keepdim=True) for x in stack]
    drift = torch.zeros_like(stack[0], requires_grad=True)
    adam = torch.optim.Adam([drift], lr=rate)
    with torch.no_grad():
        for _ in range(steps):
            gaps = [a - mass * (x * drift).sum(1, keepdim=True) for a, x in zip(wanted, stack, strict=True)]
            gradient = total_of([x * (-2 * mass * gap) for x, gap in zip(stack, gaps, strict=True)])
            drift.grad = gradient - protected @ (protected.T @ gradient)
            adam.step()
    return drift.detach()
