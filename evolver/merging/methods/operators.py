"""Tensor primitives, of which the merge methods are made. Pure, float32 in and out.

A piece of a tensor has any shape, (...) below; those of E experts come as a sequence of E tensors (never as one
stacked tensor, which a fused kernel would have to write out first). Numbers that belong to experts are tensors (E,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from torch import Tensor

from evolver.kernels import native
from evolver.kernels.encoded import RUN
from evolver.kernels.program import Traced
from evolver.kernels.random import LEVELS

TINY = 1e-8


def total_of(tensors: Sequence[Tensor]) -> Tensor:
    """Σ x, (...), added in the order of the experts."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def total(tensor: Tensor) -> Tensor:
    """Σ of all scalars in float64, (): on a CPU the same bits on every processor, whatever the threads.

    Runs of 512 scalars are added by halves, each half to the other until one number is left, and then their sums.
    """
    if isinstance(tensor, Traced):
        return cast(Tensor, tensor.total())
    if not tensor.is_cpu:
        return tensor.sum(dtype=torch.float64)
    flat = tensor.reshape(-1).double()
    sums = halved(torch.nn.functional.pad(flat, (0, -flat.numel() % RUN)).view(-1, RUN).T)
    return halved(sums)


def halved(rows: Tensor) -> Tensor:
    """Σ over the first dimension, which is filled up with zeros to a power of two: halves are added until one is left.

    An addition of two tensors is the same on every processor; the order of torch's own sums is not.
    """
    width = 1 << max(0, len(rows) - 1).bit_length()
    out = torch.cat([rows, rows.new_zeros(width - len(rows), *rows.shape[1:])]) if width > len(rows) else rows
    while len(out) > 1:
        out = out[: len(out) // 2] + out[len(out) // 2 :]
    return out[0]


def total_of_rows(tensor: Tensor) -> Tensor:
    """Σ of every row of (rows, columns), in float64, (rows): the same bits on every processor."""
    return halved(tensor.double().T)


def weighted_sum(tensors: Sequence[Tensor], weight: Tensor, normalize: bool) -> Tensor:
    """Σ w·x over the experts, (...); divided by Σ w where ``normalize`` is set (by 1 where |Σ w| < 1e-8)."""
    total = total_of([x * w.to(x.dtype) for x, w in zip(tensors, weight.unbind(0), strict=True)])
    return total / divisor_of(weight, total.dtype) if normalize else total


def divisor_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ w as a number to divide by: 1 where it is smaller than 1e-8 in size. Shape ()."""
    total = weight.to(dtype).sum(0)
    return torch.where(total.abs() < TINY, torch.ones_like(total), total)


def trim(delta: Tensor, smallest: Tensor) -> Tensor:
    """Zero what is smaller in magnitude than ``smallest``, () (TIES, Yadav et al. 2023, section 3).

    Scalars as large as the smallest kept one stay, so that no order among equals is invented.
    """
    return torch.where(delta.abs() >= smallest, delta, 0.0)


def clip_outliers(delta: Tensor, largest: Tensor) -> Tensor:
    """Zero what is as large in magnitude as ``largest``, (), or larger (Breadcrumbs, Davari and Belilovsky 2024)."""
    return torch.where(delta.abs() < largest, delta, 0.0)


def drop(delta: Tensor, draws: Tensor, keep: Tensor) -> Tensor:
    """Keep every scalar with its probability ``keep``, independently (DARE, Yu et al. 2024, equation 2, unscaled).

    Args:
        draws: of the counter-based random function, in [0, 65536), (...).
        keep: probability in steps of 1/65536, () or (...).
    """
    return torch.where(draws < (keep * LEVELS).round().float(), delta, 0.0)


def rank_probability(rank: Tensor, width: int, density: Tensor, epsilon: Tensor) -> Tensor:
    """DELLA's probability to be kept (Deep et al. 2024, section 3.1): linear in the rank by magnitude.

    Args:
        rank: within its row, 0 for the smallest of ``width``; any shape.
        density, epsilon: from density - epsilon for the smallest to density + epsilon for the largest; at density 1
            everything is kept. Shape ().

    Returns:
        float64, shaped like ``rank``.
    """
    share = (rank.float() / max(1, width - 1)).double()
    return torch.where(density >= 1, 1.0, density - epsilon + share * (2 * epsilon))


def rank_in_row(sizes: Tensor) -> Tensor:
    """How many scalars of its row (the last dimension) each one exceeds; equal ones share a rank. (rows, columns)"""
    return torch.searchsorted(_sorted_rows(sizes), sizes.contiguous())


def kept_by_rank(delta: Tensor, draws: Tensor, density: Tensor, epsilon: Tensor) -> Tensor:
    """Which scalars stay where each does with the probability of its rank in its row (DELLA), bool (rows, columns).

    No rank is computed. A draw says from which rank on a scalar is kept, as the probability grows with the rank; and a
    scalar has that rank if it exceeds the scalar of the row that comes just before it.
    """
    if isinstance(delta, Traced):
        kept = delta.program.kept_by_rank(delta.abs(), cast(Traced, draws), density.item(), epsilon.item())
        return cast(Tensor, kept)
    rows, width = delta.shape
    chances = first_kept(width, density.item(), epsilon.item(), delta.device)
    sizes = delta.abs()
    loops = native.library() if delta.device.type == "cpu" else None
    if loops is not None:
        return native.kept_rows(loops, sizes, draws, chances)
    ordered = _sorted_rows(sizes)
    before = torch.empty(rows, width + 1, device=delta.device)
    before[:, 0], before[:, -1] = -1.0, torch.inf  # rank 0 is everyone's, rank ``width`` no one's
    before[:, 1:width] = ordered[:, :-1]
    return sizes > before.gather(1, chances.long()[draws.long()])


@lru_cache(maxsize=64)
def first_kept(width: int, density: float, epsilon: float, device: torch.device) -> Tensor:
    """From which rank on a scalar is kept, for every draw, int32 (65536)."""
    numbers = (torch.tensor(x, dtype=torch.float64) for x in (density, epsilon))
    levels = (rank_probability(torch.arange(width), width, *numbers) * LEVELS).round()
    draws = torch.arange(LEVELS, dtype=levels.dtype)
    return torch.searchsorted(levels, draws, right=True, out_int32=True).to(device)


def _sorted_rows(sizes: Tensor) -> Tensor:
    # numpy sorts with vector instructions; torch orders places along with values.
    return sizes.sort(dim=-1).values if sizes.is_cuda else torch.from_numpy(np.sort(sizes.numpy(), axis=-1))


def norm_match(kept: Sequence[Tensor], before: Tensor, after: Tensor) -> list[Tensor]:
    """Scale every expert's ``kept`` by before ÷ after, norms (E,); by 1 where one of them vanishes."""
    usable = (before > 0) & (after > 0)
    factor = torch.where(usable, before / torch.where(usable, after, 1.0), 1.0)
    return [k * f.to(k.dtype) for k, f in zip(kept, factor.unbind(0), strict=True)]


def elected_sign(deltas: Sequence[Tensor], by: str) -> Tensor:
    """The sign that the experts elect, scalar by scalar (TIES, section 3): by mass (``mass``) or by heads (``count``).

    Returns:
        -1 or 1, (...); a tie is positive.
    """
    votes = [torch.sign(d) for d in deltas] if by == "count" else deltas
    sign = torch.sign(total_of(votes))
    return sign + (1.0 - sign * sign)  # a choice by a mask that looks random costs ten times these products


def disjoint_sum(
    deltas: Sequence[Tensor], weight: Tensor, votes: Sequence[Tensor], sign: Tensor, normalize: bool
) -> Tensor:
    """Σ w·τ over the experts that vote for ``sign``; divided, scalar by scalar, by their weights (TIES, section 3).

    Args:
        deltas, votes: of E experts.
        sign: -1 or 1, (...).
        normalize: divide (by 1 where nothing agrees).

    Returns:
        (...).
    """
    kept = ((torch.sign(v) * sign).clamp(min=0.0) for v in votes)  # 0 or 1
    return kept_sum(deltas, weight, kept, normalize)


def kept_sum(deltas: Sequence[Tensor], weight: Tensor, kept: Iterable[Tensor], normalize: bool) -> Tensor:
    """Σ w·τ of what is kept; divided, scalar by scalar, by the weights of the experts that keep something there.

    Args:
        kept: 0 or 1 for every scalar of E experts, (...).
        normalize: divide (by 1 where nothing is kept).

    Returns:
        (...).
    """
    merged, divisor = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, keeps, number in zip(deltas, kept, weight.unbind(0), strict=True):
        w = number.to(delta.dtype)
        merged = merged + delta * w * keeps
        if normalize:
            divisor = divisor + w * keeps
    return merged / torch.where(divisor == 0, 1.0, divisor) if normalize else merged


def gram(tensors: Sequence[Tensor], summed: Callable[[Tensor], Tensor] = total) -> Tensor:
    """Inner products of the experts, (E, E, ...) in float64; ``summed`` says over what."""
    wide = [t.double() for t in tensors]
    count = len(wide)
    products = {(a, b): summed(wide[a] * wide[b]) for a in range(count) for b in range(a, count)}
    pairs = [products[min(a, b), max(a, b)] for a in range(count) for b in range(count)]
    matrix: Tensor = torch.stack(pairs).unflatten(0, (count, count))
    return matrix


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
