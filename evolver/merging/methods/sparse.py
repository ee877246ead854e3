"""Methods that thin task vectors out before they are combined.

mergekit's ``rescale`` restores a norm of the whole tensor after thinning (``l1``); the papers divide every kept scalar
by its probability (``inv_p``). Both are here, as are ``l2``, ``linf`` and ``none``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from evolver.merging.methods import Range, each, method, number, operators
from evolver.merging.methods.averages import Mass, Weight
from evolver.merging.methods.here import PieceView, Stack

Density = Annotated[Tensor, Range(0.05, 1.0, above=0.0, most=1.0)]
Gamma = Annotated[Tensor, Range(0.001, 0.1, least=0.0, most=1.0)]
Epsilon = Annotated[Tensor, Range(0.0, 0.3, least=0.0, most=1.0, around="density")]
Norm = Literal["none", "l1", "l2", "linf"]
Rescale = Literal["none", "l1", "l2", "linf", "inv_p"]
Scope = Literal["tensor", "global"]
Elect = Literal["weighted", "raw"]
Sign = Literal["mass", "count"]
Thin = Callable[[Stack, PieceView], list[Tensor]]


@method("Yadav et al. 2023, TIES-Merging, arXiv 2306.01708")
def ties(
    deltas: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    density: Density = each(1.0),
    lambda_: Mass = number(1.0),
    normalize: bool = True,
    rescale: Norm = "none",
    trim_scope: Scope = "tensor",
    elect: Elect = "weighted",
    sign: Sign = "mass",
) -> Tensor:
    """Trim each task vector to its largest ``density``, elect a sign, merge what agrees.

    mergekit trims every tensor by itself and elects on weighted deltas; the paper trims the model as a whole
    (``trim_scope: global``) and elects on the deltas as they are (``elect: raw``). Of deltas 3 and -1 the sign is
    positive and the merge 3; of 3 and 1 it is 2.
    """
    cuts = here.kth_largest(magnitudes, lambda n: [[kept_of(d, n)] for d in density.tolist()], trim_scope)[:, 0]
    kept = _match_norm(deltas, here, lambda d, _: list(map(operators.trim, d, cuts.unbind(0))), rescale)
    return disjoint(kept, weight, lambda_, normalize, elect, sign)


@method("Yu et al. 2024, Language models are super Mario (DARE), arXiv 2311.03099", divides="normalize")
def dare_linear(
    deltas: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    density: Density = each(1.0),
    lambda_: Mass = number(1.0),
    normalize: bool = False,
    rescale: Rescale = "l1",
    seed: int = 0,
) -> Tensor:
    """Keep every scalar with probability ``density``, rescale, then as task arithmetic.

    ``rescale: l1`` restores each task vector's L1 norm per tensor, as mergekit does; ``inv_p`` divides by the density,
    as the paper does: a delta of 2 at density 0.5 becomes 4 or 0.
    """
    kept = _dare(deltas, here, density, rescale, seed)
    return lambda_ * operators.weighted_sum(kept, weight, normalize)


@method("Yu et al. 2024, Language models are super Mario (DARE), arXiv 2311.03099")
def dare_ties(
    deltas: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    density: Density = each(1.0),
    lambda_: Mass = number(1.0),
    normalize: bool = False,
    rescale: Rescale = "l1",
    elect: Elect = "weighted",
    sign: Sign = "mass",
    seed: int = 0,
) -> Tensor:
    """Drop at random and rescale as ``dare_linear``, then elect and merge as ``ties``."""
    kept = _dare(deltas, here, density, rescale, seed)
    return disjoint(kept, weight, lambda_, normalize, elect, sign)


@method("Deep et al. 2024, DELLA-Merging, arXiv 2406.11617", rows=True, divides="normalize")
def della_linear(
    deltas: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    density: Density = each(1.0),
    epsilon: Epsilon = each(0.15),
    lambda_: Mass = number(1.0),
    normalize: bool = False,
    rescale: Rescale = "l1",
    seed: int = 0,
) -> Tensor:
    """Keep a scalar the likelier the larger it is in its row, rescale, then as task arithmetic.

    The probability goes from density - ε for the smallest of a row to density + ε for its largest. Both have to lie
    between 0 and 1: an ε that you write is refused if it is too large for the density, and one that a search chooses,
    or the default, is cut to what fits. ``inv_p`` divides by the probability, as the paper does; at density 1
    everything stays.
    """
    kept = _della(deltas, here, density, epsilon, rescale, seed)
    return lambda_ * operators.weighted_sum(kept, weight, normalize)


@method("Deep et al. 2024, DELLA-Merging, arXiv 2406.11617", rows=True)
def della(
    deltas: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    density: Density = each(1.0),
    epsilon: Epsilon = each(0.15),
    lambda_: Mass = number(1.0),
    normalize: bool = True,
    rescale: Rescale = "l1",
    elect: Elect = "weighted",
    sign: Sign = "mass",
    seed: int = 0,
) -> Tensor:
    """Drop as ``della_linear``, then elect and merge as ``ties``."""
    kept = _della(deltas, here, density, epsilon, rescale, seed)
    return disjoint(kept, weight, lambda_, normalize, elect, sign)


@method("Davari and Belilovsky 2024, Model Breadcrumbs, arXiv 2312.06795", divides="normalize")
def breadcrumbs(
    deltas: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    density: Density = each(1.0),
    gamma: Gamma = each(0.01),
    lambda_: Mass = number(1.0),
    normalize: bool = False,
    rescale: Norm = "none",
) -> Tensor:
    """Drop the largest ``gamma`` of each task vector, keep the next ``density``, then as task arithmetic.

    At density 1 everything stays, as in mergekit. Of 4, 3, 2, 1 with gamma 0.25 and density 0.5, 3 and 2 stay.
    """
    kept = _breadcrumbs(deltas, here, density, gamma, rescale)
    return lambda_ * operators.weighted_sum(kept, weight, normalize)


@method("Davari and Belilovsky 2024, Model Breadcrumbs, arXiv 2312.06795")
def breadcrumbs_ties(
    deltas: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    density: Density = each(1.0),
    gamma: Gamma = each(0.01),
    lambda_: Mass = number(1.0),
    normalize: bool = False,
    rescale: Norm = "none",
    elect: Elect = "weighted",
    sign: Sign = "mass",
) -> Tensor:
    """Thin out as ``breadcrumbs``, then elect and merge as ``ties``."""
    kept = _breadcrumbs(deltas, here, density, gamma, rescale)
    return disjoint(kept, weight, lambda_, normalize, elect, sign)


def magnitudes(deltas: Stack, _: PieceView) -> Stack:
    """Scores by which every task vector is trimmed to its largest scalars."""
    return [d.abs() for d in deltas]


def kept_of(density: float, size: int) -> int:
    """How many of ``size`` scalars stay: at least one."""
    return max(1, int(density * size))


def disjoint(kept: Stack, weight: Tensor, lambda_: Tensor, normalize: bool, elect: str, sign: str) -> Tensor:
    """λ Σ w·τ over what agrees with the elected sign, and its mean where ``normalize`` is set (TIES, section 3)."""
    weighted = [k * w.to(k.dtype) for k, w in zip(kept, weight.unbind(0), strict=True)]
    votes = weighted if elect == "weighted" else kept
    elected = operators.elected_sign(votes, sign)
    return lambda_ * operators.disjoint_sum(kept, weight, votes, elected, normalize)


def _match_norm(deltas: Stack, here: PieceView, thin: Thin, norm: str) -> Stack:
    """The thinned deltas; each expert's norm over the whole tensor restored, where one is named."""
    if norm == "none":
        return thin(deltas, here)
    measure = {"l1": _sum_of_sizes, "l2": _sum_of_squares, "linf": _largest_size}[norm]
    ask = here.maximum if norm == "linf" else here.sum
    norms = ask(lambda d, h: torch.stack([torch.stack([measure(x) for x in s]) for s in (d, thin(d, h))]))
    before, after = norms.sqrt() if norm == "l2" else norms
    return operators.norm_match(thin(deltas, here), before, after)


def _sum_of_sizes(delta: Tensor) -> Tensor:
    return operators.total(delta.abs())


def _sum_of_squares(delta: Tensor) -> Tensor:
    return operators.total(delta.double().square())


def _largest_size(delta: Tensor) -> Tensor:
    return delta.abs().amax()


def _dare(deltas: Stack, here: PieceView, density: Tensor, rescale: str, seed: int) -> Stack:
    def thin(d: Stack, h: PieceView) -> list[Tensor]:
        return list(map(operators.drop, d, h.draws(seed), density.unbind(0)))

    if rescale == "inv_p":
        return [k / p.to(k.dtype) for k, p in zip(thin(deltas, here), density.unbind(0), strict=True)]
    return _match_norm(deltas, here, thin, rescale)


def _della(deltas: Stack, here: PieceView, density: Tensor, epsilon: Tensor, rescale: str, seed: int) -> Stack:
    room = torch.minimum(epsilon, torch.minimum(density, 1 - density)).unbind(0)

    def masks(d: Stack, h: PieceView) -> Stack:
        return list(map(operators.kept_by_rank, d, h.draws(seed), density.unbind(0), room))

    def thin(d: Stack, h: PieceView) -> list[Tensor]:
        return _masked(d, h.once(lambda: masks(d, h)))

    def masks_and_chances() -> Stack:
        ranks = [operators.rank_in_row(d.abs()) for d in deltas]
        width = deltas[0].shape[-1]
        chances = [operators.rank_probability(r, width, *n) for r, *n in zip(ranks, density, room, strict=True)]
        return [*masks(deltas, here), *chances]

    if rescale != "inv_p":
        return _match_norm(deltas, here, thin, rescale)
    made, count = here.once(masks_and_chances), len(deltas)
    thinned = _masked(deltas, made[:count])
    return [(x / chance).to(x.dtype) for x, chance in zip(thinned, made[count:], strict=True)]


def _masked(deltas: Stack, masks: Stack) -> list[Tensor]:
    # A choice by a random mask costs several times a product with it; the zero turns -0 into 0.
    return [d * m.float() + 0.0 for d, m in zip(deltas, masks, strict=True)]


def _breadcrumbs(deltas: Stack, here: PieceView, density: Tensor, gamma: Tensor, rescale: str) -> Stack:
    def ranks(size: int) -> Sequence[Sequence[int]]:
        pairs = zip(density.tolist(), gamma.tolist(), strict=True)
        return [_between(d, g, size) for d, g in pairs]

    cuts = here.kth_largest(magnitudes, ranks).unbind(0)  # E of (2)

    def thin(d: Stack, _: PieceView) -> list[Tensor]:
        return [operators.clip_outliers(operators.trim(x, c[1]), c[0]) for x, c in zip(d, cuts, strict=True)]

    return _match_norm(deltas, here, thin, rescale)


def _between(density: float, gamma: float, size: int) -> list[int]:
    """The ranks of the smallest scalar that is dropped as too large, and of the smallest that is kept."""
    if density >= 1:
        return [0, size]
    kept = kept_of(density, size)
    dropped = min(int(gamma * size), size - kept)
    return [dropped, dropped + kept]
