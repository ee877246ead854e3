"""Methods that thin task vectors out before they are combined.

mergekit's ``rescale`` restores a norm of the whole tensor after thinning (``l1``); the papers divide every kept scalar
by its probability (``inv_p``). Both are here, as are ``l2``, ``linf`` and ``none``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from evolver.merging import operators
from evolver.merging.here import Here
from evolver.merging.methods import Range, each, method, number
from evolver.merging.methods.averages import Mass, Weight

Density = Annotated[Tensor, Range(0.05, 1.0, above=0.0, most=1.0)]
Gamma = Annotated[Tensor, Range(0.001, 0.1, least=0.0, most=1.0)]
Epsilon = Annotated[Tensor, Range(0.0, 0.3, least=0.0, most=1.0)]
Norm = Literal["none", "l1", "l2", "linf"]
Rescale = Literal["none", "l1", "l2", "linf", "inv_p"]
Scope = Literal["tensor", "global"]
Elect = Literal["weighted", "raw"]
Sign = Literal["mass", "count"]
Thin = Callable[[Tensor, Here], Tensor]


@method("Yadav et al. 2023, TIES-Merging")
def ties(
    deltas: Tensor,
    *,
    here: Here,
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
    cut = here.kth_largest(_magnitudes, lambda n: [[_kept(d, n)] for d in density.tolist()], trim_scope)[:, 0]
    kept = _match_norm(here, lambda d, _: operators.trim(d, cut), rescale)
    return _disjoint(kept, weight, lambda_, normalize, elect, sign)


@method("Yu et al. 2024, Language models are super Mario (DARE)")
def dare_linear(
    deltas: Tensor,
    *,
    here: Here,
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
    kept = _thin(
        here, lambda d, h: operators.drop(d, h.draws(seed), _wide(density, d)), rescale, _wide(density, deltas)
    )
    return lambda_ * operators.weighted_sum(kept, weight, normalize)


@method("Yu et al. 2024, Language models are super Mario (DARE)")
def dare_ties(
    deltas: Tensor,
    *,
    here: Here,
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
    kept = _thin(
        here, lambda d, h: operators.drop(d, h.draws(seed), _wide(density, d)), rescale, _wide(density, deltas)
    )
    return _disjoint(kept, weight, lambda_, normalize, elect, sign)


@method("Deep et al. 2024, DELLA-Merging", rows=True)
def della_linear(
    deltas: Tensor,
    *,
    here: Here,
    weight: Weight = each(1.0),
    density: Density = each(1.0),
    epsilon: Epsilon = each(0.15),
    lambda_: Mass = number(1.0),
    normalize: bool = False,
    rescale: Rescale = "l1",
    seed: int = 0,
) -> Tensor:
    """Keep a scalar the likelier the larger it is in its row, rescale, then as task arithmetic.

    The probability goes from density - ε for the smallest of a row to density + ε for its largest; ε is cut to what
    keeps both between 0 and 1. ``inv_p`` divides by it, as the paper does; at density 1 everything stays.
    """
    kept = _della(deltas, here, density, epsilon, rescale, seed)
    return lambda_ * operators.weighted_sum(kept, weight, normalize)


@method("Deep et al. 2024, DELLA-Merging", rows=True)
def della(
    deltas: Tensor,
    *,
    here: Here,
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
    return _disjoint(kept, weight, lambda_, normalize, elect, sign)


@method("Davari and Belilovsky 2024, Model Breadcrumbs")
def breadcrumbs(
    deltas: Tensor,
    *,
    here: Here,
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
    kept = _breadcrumbs(here, density, gamma, rescale)
    return lambda_ * operators.weighted_sum(kept, weight, normalize)


@method("Davari and Belilovsky 2024, Model Breadcrumbs")
def breadcrumbs_ties(
    deltas: Tensor,
    *,
    here: Here,
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
    kept = _breadcrumbs(here, density, gamma, rescale)
    return _disjoint(kept, weight, lambda_, normalize, elect, sign)


def _magnitudes(deltas: Tensor, _: Here) -> Tensor:
    return deltas.abs()


def _kept(density: float, size: int) -> int:
    """How many of ``size`` scalars stay: at least one."""
    return max(1, int(density * size))


def _wide(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.view(-1, *[1] * (like.dim() - 1))


def _disjoint(kept: Tensor, weight: Tensor, lambda_: Tensor, normalize: bool, elect: str, sign: str) -> Tensor:
    votes = kept * operators.per_expert(weight, kept) if elect == "weighted" else kept
    elected = operators.elected_sign(votes, sign)
    return lambda_ * operators.disjoint_sum(kept, weight, votes, elected, normalize)


def _thin(here: Here, thin: Thin, rescale: str, probability: Tensor) -> Tensor:
    """Random thinning, made up for by probability or by norm."""
    if rescale == "inv_p":
        return (thin(here.stack, here) / probability).to(here.stack.dtype)
    return _match_norm(here, thin, rescale)


def _match_norm(here: Here, thin: Thin, norm: str) -> Tensor:
    """The thinned stack; each expert's norm over the whole tensor restored, where one is named."""
    kept = thin(here.stack, here)
    if norm == "none":
        return kept
    measure = {"l1": _sum_of_sizes, "l2": _sum_of_squares, "linf": _largest_size}[norm]
    ask = here.maximum if norm == "linf" else here.sum
    before, after = ask(lambda d, h: torch.stack([measure(d), measure(thin(d, h))]))
    return operators.norm_match(
        kept, before.sqrt() if norm == "l2" else before, after.sqrt() if norm == "l2" else after
    )


def _sum_of_sizes(stack: Tensor) -> Tensor:
    return _flat(stack).abs().sum(1, dtype=torch.float64)


def _sum_of_squares(stack: Tensor) -> Tensor:
    return _flat(stack).double().square().sum(1)


def _largest_size(stack: Tensor) -> Tensor:
    return _flat(stack).abs().amax(1)


def _flat(stack: Tensor) -> Tensor:
    return stack.reshape(stack.shape[0], -1)


def _della(deltas: Tensor, here: Here, density: Tensor, epsilon: Tensor, rescale: str, seed: int) -> Tensor:
    room = torch.minimum(epsilon, torch.minimum(density, 1 - density))

    def probability(d: Tensor) -> Tensor:
        p = operators.rank_probability(operators.rank_in_row(d.abs()), d.shape[-1], _wide(density, d), _wide(room, d))
        return torch.where(_wide(density, d) >= 1, 1.0, p)

    def thin(d: Tensor, h: Here) -> Tensor:
        return operators.drop(d, h.draws(seed), probability(d))

    return _thin(here, thin, rescale, probability(deltas) if rescale == "inv_p" else density)


def _breadcrumbs(here: Here, density: Tensor, gamma: Tensor, rescale: str) -> Tensor:
    def ranks(size: int) -> Sequence[Sequence[int]]:
        pairs = zip(density.tolist(), gamma.tolist(), strict=True)
        return [_between(d, g, size) for d, g in pairs]

    cuts = here.kth_largest(_magnitudes, ranks)  # (E, 2)
    return _match_norm(here, lambda d, _: operators.clip_outliers(operators.trim(d, cuts[:, 1]), cuts[:, 0]), rescale)


def _between(density: float, gamma: float, size: int) -> list[int]:
    """The ranks of the smallest scalar that is dropped as too large, and of the smallest that is kept."""
    if density >= 1:
        return [0, size]
    kept = _kept(density, size)
    dropped = min(int(gamma * size), size - kept)
    return [dropped, dropped + kept]
