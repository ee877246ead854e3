"""The Evolver operators on weights: mutation and crossover in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evolver.merging import random
from evolver.merging.kernels import Function, Kernels


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

# Blocks of a piece: a few tensors' pieces stay in a core's cache.
PIECE, GPU_PIECE = 32, 1 << 13


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
    child = torch.empty(parent.shape, dtype=parent.dtype, device=parent.device)
    flats = [t.reshape(-1) for t in (child, parent, *partners)]
    device, whole = parent.device, parent.numel() // random.BLOCK
    numbers = [torch.tensor(float(random.threshold(Cr)), device=device), torch.tensor(F, device=device)]
    if whole > 1:  # kernels take no fewer blocks
        step, words = _Blocks(STRATEGIES[strategy][0]), random.key_words(seed, name, device)
        length = PIECE if device.type == "cpu" else GPU_PIECE
        blocks = [t[: whole * random.BLOCK].view(whole, random.HALVES, random.LANES) for t in flats]
        _in_pieces(step, [words, *numbers], blocks, length, kernels, f"cross {strategy}")
    rest = (whole if whole > 1 else 0) * random.BLOCK
    if rest < parent.numel():
        ends = [t[rest:] for t in flats]
        (draws,) = random.Drawn(seed, [name], device, kernels).piece(rest, ends[0].shape)
        _write(STRATEGIES[strategy][0], draws, numbers, ends)
    return child


def _in_pieces(
    step: Function, fixed: list[Tensor], blocks: list[Tensor], length: int, kernels: Kernels | None, identity: str
) -> None:
    kernel = None
    for start in range(0, blocks[0].shape[0], length):
        pieces = [b[start : start + length] for b in blocks]
        tensors = [*fixed, torch.tensor(start, device=blocks[0].device), *pieces]
        if kernels and start == 0:
            kernel = kernels.get(step, tensors, [n > len(fixed) for n in range(len(tensors))], identity)
        if kernel and pieces[0].shape[0] > 1:
            kernel(tensors)
        else:
            step(*tensors)


@dataclass(frozen=True)
class _Blocks:
    """Mutation and crossover of whole blocks of scalars; draws are made where they are used, never written out.

    Takes the words of the draws, the mask's level, F, the number of the first block, and (blocks, HALVES, LANES) of
    the child, its parent and the partners.
    """

    mutation: Mutation

    def __call__(self, *tensors: Tensor) -> tuple[()]:
        words, level, f, first, *blocks = tensors
        for place, draws in enumerate(random.halves(words, first, blocks[0].shape[0])):
            _write(self.mutation, draws, [level, f], [b[:, place] for b in blocks])
        return ()


def _write(mutation: Mutation, draws: Tensor, numbers: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Mutation and crossover into the first of ``tensors``, from the parent and its partners."""
    (level, f), (child, *parents) = numbers, tensors
    x, *p = (t.float() for t in parents)
    # As floats, which hold both exactly: kernels that compare whole numbers beside bfloat16 are not vectorised.
    child.copy_(torch.where(draws.float() < level, mutation(x, p, f), x))
