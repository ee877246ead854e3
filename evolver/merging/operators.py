"""Tensor primitives, of which the merge methods and the Evolver operators are made. Pure, float32 in and out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from evolver.merging import random


def per_expert(weights: Sequence[float], like: Tensor) -> Tensor:
    """Weights (E,) shaped to broadcast over ``like`` (E, *shape)."""
    return torch.tensor(weights, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.dim() - 1))


def weighted_sum(stack: Tensor, weights: Sequence[float], normalize: bool) -> Tensor:
    """Sum over experts of weight times tensor; divided by the sum of the weights where ``normalize`` is set.

    A sum of weights below 1e-8 in size counts as 1.

    Args:
        stack: (E, *shape).

    Returns:
        (*shape).
    """
    total = sum(weights)
    scale = total if normalize and abs(total) >= 1e-8 else 1.0
    return (stack * per_expert(weights, stack)).sum(0) / scale


def trim(deltas: Tensor, density: float) -> Tensor:
    """Keep the largest ``density`` of every expert's scalars by magnitude, zero the rest (TIES, Yadav et al. 2023).

    At least one scalar stays; scalars as large as the smallest kept one stay too, so that no order is invented.

    Args:
        deltas: (E, *shape).
    """
    if density >= 1.0:
        return deltas
    size = deltas[0].numel()
    keep = max(1, int(density * size))
    magnitude = deltas.abs().view(deltas.shape[0], -1)
    smallest = magnitude.kthvalue(size - keep + 1, dim=1).values  # (E,)
    return torch.where(magnitude >= smallest[:, None], deltas.view_as(magnitude), 0.0).view_as(deltas)


def drop(deltas: Tensor, density: float, seed: int, name: str) -> Tensor:
    """Keep every scalar with probability ``density``, independently (DARE, Yu et al. 2024, equation 2, unscaled).

    Args:
        deltas: (E, *shape).
        seed, name: of the draws; every expert has its own stream.
    """
    if density >= 1.0:
        return deltas
    level = random.threshold(density)
    size = deltas[0].numel()
    masks = [random.draws(seed, f"{name}#{e}", 0, size, deltas.device) < level for e in range(deltas.shape[0])]
    return deltas * torch.stack(masks).view_as(deltas)


def rescale(kept: Tensor, full: Tensor, how: str, density: float) -> Tensor:
    """Make up for dropped scalars: ``inv_p`` divides by the density, ``l1`` restores each expert's L1 norm.

    Args:
        kept, full: deltas after and before dropping, (E, *shape).
    """
    if how == "none" or density >= 1.0:
        return kept
    if how == "inv_p":
        return kept / density
    norms = [d.view(d.shape[0], -1).abs().sum(1) for d in (full, kept)]
    factor = torch.where(norms[1] > 0, norms[0] / norms[1], torch.ones_like(norms[0]))
    return kept * factor.view(-1, *[1] * (kept.dim() - 1))


def disjoint_merge(deltas: Tensor, weights: Sequence[float], normalize: bool) -> Tensor:
    """Sign election by mass, then the weighted sum of the deltas that agree with the elected sign (TIES, section 4).

    The election is on weighted deltas and zero counts as positive. With ``normalize`` the sum is divided, scalar by
    scalar, by the sum of the weights that agree (1 where that is 0).

    Args:
        deltas: (E, *shape).

    Returns:
        (*shape).
    """
    weight = per_expert(weights, deltas)
    weighted = deltas * weight
    elected = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agree = torch.sign(weighted) == elected
    merged = torch.where(agree, weighted, 0.0).sum(0)
    if not normalize:
        return merged
    divisor = torch.where(agree, weight, 0.0).sum(0)
    return merged / torch.where(divisor == 0, 1.0, divisor)


def _evolver(x: Tensor, p: Sequence[Tensor], f: Tensor) -> Tensor:
    return x + f * (p[0] - x)


def _rand1(x: Tensor, p: Sequence[Tensor], f: Tensor) -> Tensor:
    return p[0] + f * (p[1] - p[2])


def _current_to_best1(x: Tensor, p: Sequence[Tensor], f: Tensor) -> Tensor:
    return x + f * (p[0] - x) + f * (p[1] - p[2])


def _rand2(x: Tensor, p: Sequence[Tensor], f: Tensor) -> Tensor:
    return p[0] + f * (p[1] - p[2]) + f * (p[3] - p[4])


Mutation = Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]

# Mutation of x with partners p, and how many partners it takes. ``evolver`` is the operator as the paper's authors
# released it; the others are the forms of differential evolution (Storn and Price 1997), in which p[0] is a random
# member, or the best one for best/1 and current-to-best/1.
STRATEGIES: dict[str, tuple[Mutation, int]] = {
    "evolver": (_evolver, 1),
    "rand/1": (_rand1, 3),
    "best/1": (_rand1, 3),
    "current-to-best/1": (_current_to_best1, 3),
    "rand/2": (_rand2, 5),
}

# Below this size the compiled kernel would cost more to load than it saves.
COMPILE_FROM = 1 << 16
# Eager work goes in pieces that stay in a core's cache.
EAGER_SCALARS = 32 * random.BLOCK


def cross(
    strategy: str, parent: Tensor, partners: Sequence[Tensor], F: float, Cr: float, seed: int, name: str
) -> Tensor:
    """One tensor of an Evolver offspring: the mutant where the mask is set, the parent elsewhere.

    Mask: Bernoulli(Cr) for every scalar, Cr in steps of 1/65536 (Du et al. 2024, equations of mutation and
    crossover; no forced coordinate). Arithmetic in float32, rounded once to the parent's dtype.

    Args:
        parent, partners: tensors of one shape, of any floating dtype.
        seed, name: of the mask's draws.

    Returns:
        Tensor of the parent's shape and dtype; the same bits for every device, chunk size and thread count.
    """
    flats = [t.reshape(-1) for t in (parent, *partners)]
    size = flats[0].numel()
    device = flats[0].device
    words = random.key_words(seed, name, device)
    scalars = (torch.tensor(random.threshold(Cr), device=device), torch.tensor(F, device=device))
    step = size if (compiled := size >= COMPILE_FROM and can_compile(device)) else EAGER_SCALARS
    kernel = _compiled(strategy, len(partners)) if compiled else _cross_blocks
    child = torch.empty_like(flats[0])
    for start in range(0, size, step):
        piece = [f[start : start + step] for f in flats]
        first = torch.tensor(start // random.BLOCK, device=device)
        child[start : start + step] = kernel(strategy, piece, words, first, *scalars)
    return child.view(parent.shape)


def _cross_blocks(
    strategy: str, flats: Sequence[Tensor], words: Tensor, first: Tensor, level: Tensor, f: Tensor
) -> Tensor:
    size = flats[0].shape[0]
    draw = random.block_draws(words, first, -(-size // random.BLOCK))[:size]
    x, *p = (t.float() for t in flats)
    return torch.where(draw < level, STRATEGIES[strategy][0](x, p, f), x).to(flats[0].dtype)


@cache
def can_compile(device: torch.device) -> bool:
    """Whether this machine can build fused kernels: a GPU with Triton, or a C++ compiler."""
    if device.type != "cpu":
        return torch.utils._triton.has_triton()
    return any(shutil.which(c) for c in ("g++", "clang++", "c++"))


@cache
def _compiled(strategy: str, partners: int) -> Callable[..., Any]:
    # One kernel for all tensor sizes, so that a model with many shapes is compiled for once.
    return torch.compile(_cross_blocks, dynamic=True)
