"""Tensor primitives, of which the merge methods are made. Pure, float32 in and out.

E is the number of experts, ``...`` the shape of the piece of a tensor that is being merged. Numbers that belong to
experts arrive as tensors (E,).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from evolver.merging.random import LEVELS

TINY = 1e-8


def per_expert(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers (E,) shaped to broadcast over ``like`` (E, ...)."""
    return numbers.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def weighted_sum(stack: Tensor, weight: Tensor, normalize: bool) -> Tensor:
    """Σ w·x over the experts; divided by Σ w where ``normalize`` is set (by 1 where |Σ w| < 1e-8).

    Args:
        stack: (E, ...).

    Returns:
        (...).
    """
    out = stack[0] * weight[0].to(stack.dtype)
    for e in range(1, stack.shape[0]):
        out = out + stack[e] * weight[e].to(stack.dtype)
    return out / divisor_of(weight, stack.dtype) if normalize else out


def divisor_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ w as a number to divide by: 1 where it is smaller than 1e-8 in size. Shape ()."""
    total = weight.to(dtype).sum(0)
    return torch.where(total.abs() < TINY, torch.ones_like(total), total)


def trim(deltas: Tensor, smallest: Tensor) -> Tensor:
    """Zero what is smaller in magnitude than ``smallest`` (E,) (TIES, Yadav et al. 2023, section 3).

    Scalars as large as the smallest kept one stay, so that no order among equals is invented.
    """
    return torch.where(deltas.abs() >= per_expert(smallest, deltas), deltas, 0.0)


def clip_outliers(deltas: Tensor, largest: Tensor) -> Tensor:
    """Zero what is as large in magnitude as ``largest`` (E,), or larger (Breadcrumbs, Davari and Belilovsky 2024)."""
    return torch.where(deltas.abs() < per_expert(largest, deltas), deltas, 0.0)


def drop(deltas: Tensor, draws: Tensor, keep: Tensor) -> Tensor:
    """Keep every scalar with its probability ``keep``, independently (DARE, Yu et al. 2024, equation 2, unscaled).

    Args:
        deltas: (E, ...).
        draws: of the counter-based random function, in [0, 65536), (E, ...).
        keep: probabilities, in steps of 1/65536; broadcasts to (E, ...).
    """
    return torch.where(draws < (keep * LEVELS).round(), deltas, 0.0)


def rank_probability(rank: Tensor, width: int, density: Tensor, epsilon: Tensor) -> Tensor:
    """DELLA's probability to be kept (Deep et al. 2024, section 3.1): linear in the rank by magnitude.

    Args:
        rank: within its row, 0 for the smallest of ``width``.
        density, epsilon: from density - epsilon for the smallest to density + epsilon for the largest.
    """
    share = rank.float() / max(1, width - 1)
    return density - epsilon + share * (2 * epsilon)


def rank_in_row(sizes: Tensor) -> Tensor:
    """How many scalars of its row (the last dimension) each one exceeds; equal ones share a rank."""
    # numpy's sort is vectorised; torch's orders places along with values.
    ordered = sizes.sort(dim=-1).values if sizes.is_cuda else torch.from_numpy(np.sort(sizes.numpy(), axis=-1))
    return torch.searchsorted(ordered, sizes.contiguous())


def norm_match(kept: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Scale every expert's ``kept`` (E, ...) by before ÷ after, norms (E,); by 1 where one of them vanishes."""
    usable = (before > 0) & (after > 0)
    factor = torch.where(usable, before / torch.where(usable, after, 1.0), 1.0)
    return kept * per_expert(factor, kept)


def elected_sign(deltas: Tensor, by: str) -> Tensor:
    """The sign that the experts elect, scalar by scalar (TIES, section 3): by mass (``sum``) or by heads (``count``).

    Returns:
        -1 or 1, (...); a tie is positive.
    """
    votes = torch.sign(deltas) if by == "count" else deltas
    total = votes[0]
    for e in range(1, votes.shape[0]):
        total = total + votes[e]
    return torch.where(total >= 0, 1.0, -1.0)


def disjoint_sum(deltas: Tensor, weight: Tensor, votes: Tensor, sign: Tensor, normalize: bool) -> Tensor:
    """Σ w·τ over the experts that vote for ``sign``; divided, scalar by scalar, by their weights (TIES, section 3).

    Args:
        deltas, votes: (E, ...).
        sign: -1 or 1, (...).
        normalize: divide (by 1 where nothing agrees).

    Returns:
        (...).
    """
    merged, divisor = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for e in range(deltas.shape[0]):
        w = weight[e].to(deltas.dtype)
        agrees = torch.sign(votes[e]) == sign
        merged = merged + torch.where(agrees, deltas[e] * w, 0.0)
        divisor = divisor + torch.where(agrees, w, 0.0)
    return merged / torch.where(divisor == 0, 1.0, divisor) if normalize else merged


def gram(stack: Tensor) -> Tensor:
    """Inner products of the experts, (E, E) in float64; stack: (E, n)."""
    wide = stack.reshape(stack.shape[0], -1).double()
    return wide @ wide.T


def unit(products: Tensor) -> tuple[Tensor, Tensor]:
    """Norms (E,) and cosines (E, E) from a Gram matrix; a vector of norm 0 has cosine 0 with all."""
    norms = products.diagonal().clamp(min=0).sqrt()
    safe = torch.where(norms > 0, norms, 1.0)
    return norms, products / (safe[:, None] * safe[None, :])


def slerp_factors(cosine: Tensor, t: Tensor, straight: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The two factors of a spherical interpolation (Shoemake 1985): sin((1-t)φ)/sin φ and sin(tφ)/sin φ.

    Args:
        cosine: of the angle φ, any shape, float64.
        straight: says from the cosine where to interpolate linearly instead.
    """
    angle = torch.arccos(cosine.clamp(-1, 1))
    line = straight(cosine)
    sine = torch.where(line, 1.0, torch.sin(angle))
    return (
        torch.where(line, 1 - t, torch.sin((1 - t) * angle) / sine),
        torch.where(line, t.expand_as(angle), torch.sin(t * angle) / sine),
    )


def nearly_parallel(cosine: Tensor) -> Tensor:
    """Where a spherical interpolation is a straight line for all that float32 can say: |cos φ| > 0.9995."""
    return cosine.abs() > 0.9995


def no_sine(cosine: Tensor) -> Tensor:
    """Where the sine of the angle is below 1e-8, so that nothing can be divided by it."""
    return torch.sin(torch.arccos(cosine.clamp(-1, 1))).abs() < TINY
