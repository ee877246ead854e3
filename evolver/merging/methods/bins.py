"""Task vectors whose scalars are weighted by how large they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from evolver.merging.methods import Range, each, method, number, operators
from evolver.merging.methods.averages import Mass, Weight
from evolver.merging.methods.here import PieceView, Stack
from evolver.merging.methods.sparse import Scope, kept_of, magnitudes

Factor = Annotated[Tensor, Range(0.0, 2.0)]


@method(
    "Du et al. 2025, Neural parameter search for slimmer fine-tuned models and better transfer (NPS), arXiv 2505.18713"
)
def nps(
    deltas: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    lambda_: Mass = number(1.0),
    bin_1: Factor = each(1.0),
    bin_2: Factor = each(1.0),
    bin_3: Factor = each(1.0),
    bin_4: Factor = each(1.0),
    bin_5: Factor = each(1.0),
    bin_6: Factor = each(1.0),
    density: Annotated[Tensor, Range(0.04, 1.0, above=0.0, most=1.0)] = each(1.0),
    trim_scope: Scope = "global",
) -> Tensor:
    """λ Σ w·τ' where τ' is τ with a factor for each sixth of its scalars by size, trimmed to its largest ``density``.

    ``bin_1`` is the factor of the smallest sixth of an expert's scalars, ``bin_6`` that of the largest. Factors of 0
    below and 1 above are the trimming of TIES; factors of 0 at both ends are Breadcrumbs. With all at 1 it is task
    arithmetic. The paper searches the factors of each expert by itself, then the weights; here they are settings like
    others, one number for all experts or one for each.
    """
    factors = [bin_1, bin_2, bin_3, bin_4, bin_5, bin_6]

    def edges_at(size: int) -> list[list[int]]:
        """The ranks of the smallest scalar of every part but that of the smallest ones."""
        return [[round(k * size / len(factors)) for k in range(len(factors) - 1, 0, -1)]] * len(deltas)

    edges = here.kth_largest(magnitudes, edges_at, trim_scope).unbind(0)

    def scaled(d: Stack) -> list[Tensor]:
        numbers = zip(*(f.unbind(0) for f in factors), strict=True)
        return [_scaled(x, e.unbind(0), own) for x, e, own in zip(d, edges, numbers, strict=True)]

    def sizes(d: Stack, _: PieceView) -> Stack:
        return [x.abs() for x in scaled(d)]

    cuts = here.kth_largest(sizes, lambda n: [[kept_of(d, n)] for d in density.tolist()], trim_scope, factors)[:, 0]
    kept = list(map(operators.trim, scaled(deltas), cuts.unbind(0)))
    return lambda_ * operators.weighted_sum(kept, weight, False)


def _scaled(delta: Tensor, edges: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """A delta times the factor of its part by size; ``edges`` rise, and there is one factor more than edges."""
    size = delta.abs()
    factor = torch.where(size >= 0.0, factors[0].to(delta.dtype), 0.0)
    for edge, own in zip(edges, factors[1:], strict=True):
        factor = torch.where(size >= edge, own.to(delta.dtype), factor)
    return delta * factor
