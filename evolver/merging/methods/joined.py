"""The strongest directions of several experts' matrices, side by side, for the methods that merge by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from evolver.merging.methods import Range
from evolver.merging.methods.here import Stack
from evolver.merging.methods.spectrum import Factors, factors, matrix_by_matrix

KeptShare = Annotated[Tensor, Range(0.05, 1.0, above=0.0, most=1.0)]


class Joined(NamedTuple):
    """The directions that are kept of N experts, one expert's after the other's: K in all."""

    u: Tensor  # (m, K), orthonormal within an expert
    s: Tensor  # (K), times the expert's weight
    v: Tensor  # (n, K)
    counts: list[int]  # N numbers, which sum to K

    def apart(self) -> list[Factors]:
        """Those of each expert."""
        pieces = (self.u.split(self.counts, 1), self.s.split(self.counts), self.v.split(self.counts, 1))
        return [Factors(*of) for of in zip(*pieces, strict=True)]


def over_matrices(deltas: Stack, weight: Tensor, of_matrix: Callable[[Stack, Sequence[float]], Tensor]) -> Tensor:
    """Merge matrices by a function of them and of the weights; what it cannot treat is Σ w·τ."""

    def rest(stack: Stack) -> Tensor:
        return added_up(stack, weight)

    def matrix(stack: Stack) -> Tensor:
        return rest(stack) if min(stack[0].shape) < len(stack) else of_matrix(stack, weight.tolist())

    return matrix_by_matrix(deltas, matrix, rest)


def added_up(deltas: Stack, weight: Tensor) -> Tensor:
    """Σ w·τ over the experts, the same bits as of task arithmetic, but with the memory of two tensors."""
    total = torch.zeros_like(deltas[0])
    for delta, w in zip(deltas, weight.unbind(0), strict=True):
        total += delta * w.to(delta.dtype)
    return total


def room_for_each(deltas: Stack) -> int:
    """How many directions there are for each expert: ⌊min(m, n) / N⌋."""
    return min(deltas[0].shape) // len(deltas)


def joined_directions(deltas: Stack, weights: Sequence[float], most: Sequence[float], energy: float) -> Joined:
    """The strongest directions of the matrices w·τ, which hold ``energy`` of the squared singular values, at the most.

    Args:
        most: the limit for each expert; one direction is kept anyway, if there is any. An expert of weight 0 has none.
    """
    parts = []
    for delta, w, limit in zip(deltas, weights, most, strict=True):
        found = factors(delta)
        count = min(max(1, int(limit)), found.rank(energy)) if w else 0
        parts.append(Factors(*(t.clone() for t in found.first(count))))  # so that the others need no memory
    u, v = (torch.cat(of, 1) for of in ([p.u for p in parts], [p.v for p in parts]))
    s = torch.cat([p.s * w for p, w in zip(parts, weights, strict=True)])
    return Joined(u, s, v, [len(p.s) for p in parts])
