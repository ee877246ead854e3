"""The Evolver operators on weights: mutation and crossover in one kernel, compiled where that pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from evolver.merging import random
from evolver.merging.compiled import can_compile, fresh


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
    kernel = _compiled(strategy, len(partners), parent.dtype) if compiled else _cross_blocks
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
def _compiled(strategy: str, partners: int, dtype: torch.dtype) -> Callable[..., Any]:
    del strategy, partners, dtype  # one kernel each, for all tensor sizes
    return fresh(_cross_blocks)
