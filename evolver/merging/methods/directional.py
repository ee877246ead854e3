"""DC-Merge: task vectors written in directions that all experts share, and merged entry by entry there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from evolver.merging.methods import Range, each, method, number
from evolver.merging.methods.averages import SumMass, Weight
from evolver.merging.methods.here import Stack
from evolver.merging.methods.joined import KeptShare, joined_directions, over_matrices, room_for_each
from evolver.merging.methods.operators import disjoint_sum, elected_sign, trim
from evolver.merging.methods.spectrum import ENERGY, ROUNDED, Factors, polar

Smoothing = Literal["none", "avg", "linear"]


@method(
    "Zhang et al. 2026, DC-Merge: Directional consistency, arXiv 2603.06242",
    whole=True,
    exact=False,
    identity={"keep": 1.0, "rank_aware": False},
)
def dc_merge(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: SumMass = number(1.0),
    share: KeptShare = number(1.0),
    smoothing: Smoothing = "none",
    rho: Annotated[Tensor, Range(1.0, 10.0, least=1.0)] = number(5.0),
    keep: Annotated[Tensor, Range(1e-4, 1.0, log=True, above=0.0, most=1.0)] = number(1e-3),
    rank_aware: bool = True,
) -> Tensor:
    """DC-Merge: make directions orthogonal as ``tsv_m`` does, and elect signs among what the experts are in them.

    The k directions of each w·τ, chosen as in ``tsv_m``, may first get more equal strengths of the same sum
    (``smoothing``; the paper's choice for adapters): all the same (``avg``), or falling on a line, the first at most
    ``rho`` times the last (``linear``). Of U⊥ᵀ τ V⊥, (K, K), each expert keeps its largest share ``keep``; they are
    averaged over those that have the elected sign, as in TIES; what lies outside the N blocks of an expert's own
    directions is dropped. λ U⊥ M V⊥ᵀ is the merge. Tensors that are no matrices, and small ones, are λ Σ w·τ.
    """

    def matrix(stack: Stack, weights: Sequence[float]) -> Tensor:
        room = room_for_each(stack) * float(share)
        joined = joined_directions(stack, weights, [room] * len(stack), ENERGY if rank_aware else 1.0)
        u, v = polar(joined.u), polar(joined.v)
        found = [_smoothed(f, smoothing, float(rho)) for f in joined.apart()]
        kept = [_blocks((u.T @ f.u * f.s) @ (f.v.T @ v), joined.counts, float(keep)) for f in found]
        ones = torch.ones(len(stack), device=u.device)
        merged = [disjoint_sum(of, ones, of, elected_sign(of, "mass"), True) for of in zip(*kept, strict=True)]
        inner: Tensor = torch.block_diag(*merged)
        return u @ inner @ v.T

    return lambda_ * over_matrices(deltas, weight, matrix)


def _smoothed(found: Factors, smoothing: Smoothing, rho: float) -> Factors:
    """The same directions with strengths that are more equal, and have the same sum."""
    count = len(found.s)
    if smoothing == "none" or not count:
        return found
    first = min(rho, float(found.s[0] / found.s[-1])) if smoothing == "linear" else 1.0
    line = torch.linspace(first, 1.0, count, device=found.s.device)
    return found._replace(s=found.s.sum() * line / line.sum())


def _blocks(entries: Tensor, counts: Sequence[int], keep: float) -> list[Tensor]:
    """The blocks on the diagonal of a matrix (K, K) of which the largest share ``keep`` stays, one at least.

    What is zero but for rounding is dropped anyway, so that it does not vote.
    """
    if entries.numel():
        sizes = entries.abs().flatten()
        smallest = sizes.topk(max(1, int(keep * sizes.numel())), sorted=False).values.min()
        entries = trim(entries, smallest.clamp(min=ROUNDED * float(sizes.max())))
    return [rows.split(list(counts), 1)[i].clone() for i, rows in enumerate(entries.split(list(counts)))]
