"""The Evolver operators on weights: mutation and crossover in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evolver.merging import random
from evolver.merging.kernels import Kernels


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

# Scalars of a piece: a few tensors' pieces stay in a core's cache.
PIECE, GPU_PIECE = 16 * random.BLOCK, 1 << 26
# Below this size a tensor is done before a kernel is called.
FUSE_FROM = random.BLOCK


def cross(
    strategy: str,
    parent: Tensor,
    partners: Sequence[Tensor],
    F: float,
    Cr: float,
    seed: int,
    name: str,
    kernels: Kernels | None = None,
) -> Tensor:
    """One tensor of an Evolver offspring: the mutant where the mask is set, the parent elsewhere.

    Mask: Bernoulli(Cr) for every scalar, Cr in steps of 1/65536 (Du et al. 2024, equations of mutation and
    crossover; no forced coordinate). Arithmetic in float32, rounded once to the parent's dtype.

    Args:
        parent, partners: tensors of one shape, of any floating dtype.
        seed, name: of the mask's draws.
        kernels: fused kernels, where there are some; the bits are the same.

    Returns:
        Tensor of the parent's shape and dtype; the same bits for every device, piece and thread count.
    """
    flats = [t.reshape(-1) for t in (parent, *partners)]
    size, device = flats[0].numel(), flats[0].device
    kernels = kernels if size >= FUSE_FROM else None
    drawn = random.Drawn(seed, [name], device, kernels)
    level, f = torch.tensor(random.threshold(Cr), device=device), torch.tensor(F, device=device)
    step = _Step(STRATEGIES[strategy][0])
    child = torch.empty_like(flats[0])
    length, kernel = PIECE if device.type == "cpu" else GPU_PIECE, None
    for start in range(0, size, length):
        pieces = [t[start : start + length] for t in (child, *flats)]
        tensors = [level, f, *drawn.piece(start, pieces[0].shape), *pieces]
        if kernels and start == 0:
            kernel = kernels.get(step, tensors, [n >= 2 for n in range(len(tensors))], f"cross {strategy}")
        if kernel and pieces[0].shape[0] > 1:
            kernel(tensors)
        else:
            step(*tensors)
    return child.view(parent.shape)


@dataclass(frozen=True)
class _Step:
    """Mutation and crossover of a piece, from the mask's level, F, draws, the parent and its partners into ``child``."""

    mutation: Mutation

    def __call__(
        self, level: Tensor, f: Tensor, draws: Tensor, child: Tensor, parent: Tensor, *partners: Tensor
    ) -> tuple[()]:
        x, *p = (t.float() for t in (parent, *partners))
        child.copy_(torch.where(draws < level, self.mutation(x, p, f), x))
        return ()
