"""Averages in which every scalar of an expert counts by how sharply the expert's likelihood bends there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import torch
from torch import Tensor

from evolver.merging.methods import Of, Range, each, method, number
from evolver.merging.methods.averages import Mass, Weight
from evolver.merging.methods.here import PieceView, Stack
from evolver.merging.methods.operators import total, weighted_sum
from evolver.merging.methods.sparse import Scope

# Scalars that are handled at a time, so that beside the experts' tensors and statistics next to nothing is in memory.
CHUNK = 1 << 18
# The least information that counts, as a number to divide by.
LEAST_CURVATURE = 1e-26


@method(
    "Matena and Raffel 2022, Merging models with Fisher-weighted averaging, arXiv 2111.09832", whole=True, exact=False
)
def fisher(
    deltas: Stack,
    *,
    information: Annotated[Stack | None, Of("fisher")],
    weight: Weight = each(1.0),
    lambda_: Mass = number(1.0),
    floor: Annotated[Tensor, Range(1e-10, 1e-3, log=True, least=0.0)] = number(1e-10),
    power: Annotated[Tensor, Range(0.25, 1.0, least=0.0)] = number(1.0),
    normalize: bool = False,
) -> Tensor:
    """λ Σ w·F·τ / Σ w·F scalar by scalar, F being the Fisher information of the experts (equation 4).

    At λ = 1 it is the paper's average of the models, as the base then falls out. F is raised to ``power`` (0.5 is OTA's
    weight) after everything below ``floor`` was raised to it: where no expert has more, the average is the plain one.
    ``normalize`` divides the F of every expert by its norm over the tensor, so that no expert wins by sharper
    likelihoods alone (the authors' code takes the norm over the model). Without statistics: λ Σ w·τ / Σ w.
    """
    if information is None:
        return lambda_ * weighted_sum(deltas, weight, True)
    shares = weight.double()
    if normalize:
        norms = torch.stack([total(f.to(d.device).square()).sqrt() for f, d in zip(information, deltas, strict=True)])
        shares = shares / torch.where(norms > 0, norms, 1.0).to(shares.device)
    return by_chunks(
        deltas, information, lambda d, f: lambda_ * _weighed(d, [_bent(x, floor, power) for x in f], shares)
    )


@method(
    "Mahdavinia et al. 2025, Harnessing optimization dynamics for curvature-informed model merging, arXiv 2509.11167",
    whole=True, exact=False, identity={"density": 1.0},
)  # fmt: skip
def ota(
    deltas: Stack,
    *,
    here: PieceView,
    information: Annotated[Stack | None, Of("fisher")],
    weight: Weight = each(1.0),
    lambda_: Mass = number(1.0),
    density: Annotated[Tensor, Range(0.02, 1.0, above=0.0, most=1.0)] = each(0.4),
    power: Annotated[Tensor, Range(0.0, 1.0, least=0.0)] = number(0.5),
    scope: Scope = "global",
) -> Tensor:
    """OTA with FFG: λ Σ w·m·vᵖ·τ / Σ w·m·vᵖ, the masks m keeping of each expert the ``density`` largest of v·τ².

    v is the Fisher information in place of the second moments of Adam, which no published checkpoint has; at p = 0.5
    both measure the same up to a scale. Where no expert is kept, the base stays. A mask is a share of the whole model,
    as the paper's thresholds are numbers for all of it, or of each tensor with ``scope: tensor``. Tensors without
    statistics, whose v·τ² counts as 0 for the masks, are λ Σ w·τ / Σ w.
    """
    there = None if information is None else [f.to(d.device) for f, d in zip(information, deltas, strict=True)]

    def scores(parts: Stack, _: PieceView) -> Stack:
        if there is None:
            return [torch.zeros_like(d) for d in parts]
        return [f.float() * d.square() for f, d in zip(there, parts, strict=True)]

    def ranks(size: int) -> list[list[int]]:
        return [[max(1, round(share * size))] for share in density.tolist()]

    levels = here.kth_largest(scores, ranks, scope)[:, 0].unbind(0)
    if there is None:
        return lambda_ * weighted_sum(deltas, weight, True)
    shares = weight.double()

    def merged(parts: list[Tensor], sharp: list[Tensor]) -> Tensor:
        kept = [f.float() * d.float().square() >= level for d, f, level in zip(parts, sharp, levels, strict=True)]
        counts = [k * _bent(f, number(LEAST_CURVATURE), power) for k, f in zip(kept, sharp, strict=True)]
        return lambda_ * _weighed(parts, counts, shares)

    return by_chunks(deltas, there, merged)


def smallest_kept(scores: Tensor, share: float) -> Tensor:
    """The smallest of the ``share`` largest scores of a tensor, at least one of them, ()."""
    flat = scores.reshape(-1)
    count = max(1, round(share * flat.numel()))
    return flat.kthvalue(flat.numel() - count + 1).values


def by_chunks(
    deltas: Stack, statistics: Stack, merged: Callable[[list[Tensor], list[Tensor]], Tensor]
) -> Tensor:  # fmt: skip
    """A function of scalars, applied to parts of tensors that share a shape; in float64, and float32 in the result.

    Args:
        merged: from E parts of the deltas and E of the statistics, (n) float64, to the merged part.
    """
    out = torch.empty_like(deltas[0], memory_format=torch.contiguous_format)
    flat = out.view(-1)
    for part in _parts(flat.numel()):
        cut = [[t.reshape(-1)[part].to(out.device).double() for t in stack] for stack in (deltas, statistics)]
        flat[part] = merged(*cut).float()
    return out


def _parts(size: int) -> Iterator[slice]:
    return (slice(start, min(size, start + CHUNK)) for start in range(0, size, CHUNK))


def _bent(information: Tensor, floor: Tensor, power: Tensor) -> Tensor:
    """F with a floor, to a power, (n)."""
    return information.clamp(min=floor.item()).pow(power.to(information.device))


def _weighed(deltas: Sequence[Tensor], counts: Sequence[Tensor], shares: Tensor) -> Tensor:
    """Σ w·c·τ / Σ w·c, 0 where nothing counts, (n)."""
    above, below = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, count, share in zip(deltas, counts, shares.unbind(0), strict=True):
        above += share * count * delta
        below += share * count
    return above / torch.where(below == 0, 1.0, below)
