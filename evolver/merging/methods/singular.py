"""Methods that put the strongest directions of all task vectors side by side, and make room between them.

All work on the matrices w·τ of N experts, (m, n), and give λ times what the paper gives. At the defaults, weights of 1
and λ = 1, that is the paper's sum over the experts; with weights that sum to 1, λ = N is. What is no matrix, and a
matrix with fewer rows or columns than there are experts, is merged as λ Σ w·τ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from evolver.merging.methods import Range, each, method, number
from evolver.merging.methods.averages import Weight
from evolver.merging.methods.here import Stack
from evolver.merging.methods.operators import weighted_sum
from evolver.merging.methods.spectrum import Factors, factors, matrix_by_matrix, polar

# Sums of N task vectors are best at about their number, so this mass is searched over more than that of an average.
SumMass = Annotated[Tensor, Range(0.3, 12.0, log=True)]
Share = Annotated[Tensor, Range(0.05, 1.0, above=0.0, most=1.0)]


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


@method(
    "Gargiulo et al. 2025, Task singular vectors (TSV-Merge)", whole=True, exact=False, identity={"rank_aware": False}
)
def tsv_m(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: SumMass = number(1.0),
    share: Share = number(1.0),
    rank_aware: bool = True,
) -> Tensor:
    """TSV-M: keep k directions of each w·τ, and turn all of them until they are orthogonal: λ U⊥ Σ V⊥ᵀ.

    U⊥ and V⊥ are the orthonormal columns nearest to the singular vectors of all experts, and Σ are their singular
    values. k = share·⌊min(m, n) / N⌋, but no more than the directions that hold 99.9 % of the squared singular values
    (``rank_aware``): others would be rounding, and would turn those that count.
    """
    return lambda_ * _by_matrix(deltas, weight, partial(_turned_apart, share=share, rank_aware=rank_aware))


def _by_matrix(deltas: Stack, weight: Tensor, of_matrix: Callable[[Stack, Sequence[float]], Tensor]) -> Tensor:
    """Merge matrices by a function of them and of the weights; what it cannot treat is Σ w·τ."""

    def rest(stack: Stack) -> Tensor:
        return weighted_sum(stack, weight, False)

    def matrix(stack: Stack) -> Tensor:
        return rest(stack) if min(stack[0].shape) < len(stack) else of_matrix(stack, weight.tolist())

    return matrix_by_matrix(deltas, matrix, rest)


def _turned_apart(deltas: Stack, weights: Sequence[float], share: Tensor, rank_aware: bool) -> Tensor:
    joined = _joined(deltas, weights, [_room(deltas) * float(share)] * len(deltas), rank_aware)
    return (polar(joined.u) * joined.s) @ polar(joined.v).T


def _room(deltas: Stack) -> int:
    """How many directions there are for each expert: ⌊min(m, n) / N⌋."""
    return min(deltas[0].shape) // len(deltas)


def _joined(deltas: Stack, weights: Sequence[float], most: Sequence[float], rank_aware: bool) -> Joined:
    """The strongest directions of the matrices w·τ: ``most`` of each, at least one if there is one.

    An expert of weight 0 brings none.
    """
    parts = []
    for delta, w, limit in zip(deltas, weights, most, strict=True):
        found = factors(delta)
        count = min(max(1, int(limit)), found.rank() if rank_aware else len(found.s)) if w else 0
        parts.append(Factors(*(t.clone() for t in found.first(count))))  # so that the others need no memory
    u, v = (torch.cat(of, 1) for of in ([p.u for p in parts], [p.v for p in parts]))
    s = torch.cat([p.s * w for p, w in zip(parts, weights, strict=True)])
    return Joined(u, s, v, [len(p.s) for p in parts])
