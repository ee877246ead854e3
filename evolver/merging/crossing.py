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
PIECE = 16 * random.BLOCK


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
    tensors = [t.reshape(-1) for t in (child, parent, *partners)]
    numbers = [torch.tensor(float(random.threshold(Cr)), device=child.device), torch.tensor(F, device=child.device)]
    mutation = STRATEGIES[strategy][0]
    if child.is_cuda:
        words = random.key_words(seed, name, child.device)
        done = _blockwise(mutation, words, numbers, tensors, kernels, f"blocks {strategy}")
    else:
        done = 0
    ends = [t[done:] for t in tensors]
    _piecewise(
        mutation, random.Drawn(seed, [name], child.device, kernels), done, numbers, ends, kernels, f"cross {strategy}"
    )
    return child


def _piecewise(
    mutation: Mutation, drawn: random.Drawn, done: int, numbers: list[Tensor], tensors: list[Tensor],
    kernels: Kernels | None, identity: str,
) -> None:  # fmt: skip
    """In pieces, each after its draws: on a CPU, kernels that make draws and use them are not vectorised."""
    step, kernel = _Piece(mutation), None
    for start in range(0, tensors[0].numel(), PIECE):
        pieces = [t[start : start + PIECE] for t in tensors]
        given = [*numbers, *drawn.piece(done + start, pieces[0].shape), *pieces]
        if kernels and start == 0:
            kernel = kernels.get(step, given, [n >= len(numbers) for n in range(len(given))], identity)
        if kernel and pieces[0].numel() > 1:
            kernel(given)
        else:
            step(*given)


def _blockwise(
    mutation: Mutation, words: Tensor, numbers: list[Tensor], tensors: list[Tensor], kernels: Kernels | None,
    identity: str,
) -> int:  # fmt: skip
    """Whole blocks of draws, made where they are used and never written out; how many scalars that were."""
    whole = tensors[0].numel() // random.BLOCK
    if whole < 2:  # kernels take no fewer
        return 0
    done = whole * random.BLOCK
    blocks = [t[:done].view(whole, random.HALVES, random.LANES) for t in tensors]
    given = [words, *numbers, *blocks]
    step = _Blocks(mutation)
    kernel = kernels and kernels.get(step, given, [n > len(numbers) for n in range(len(given))], identity)
    if kernel:
        kernel(given)
    else:
        step(*given)
    return done


@dataclass(frozen=True)
class _Piece:
    """Mutation and crossover of a piece, from the mask's level, F and draws; child, parent and partners, (n) each."""

    mutation: Mutation

    def __call__(self, level: Tensor, f: Tensor, draws: Tensor, child: Tensor, *parents: Tensor) -> tuple[()]:
        x, *p = (t.float() for t in parents)
        child.copy_(torch.where(draws < level, self.mutation(x, p, f), x))
        return ()


@dataclass(frozen=True)
class _Blocks:
    """As ``_Piece``, from the draws' words; child, parent and partners are whole blocks, (n, HALVES, LANES) each."""

    mutation: Mutation

    def __call__(self, words: Tensor, level: Tensor, f: Tensor, *tensors: Tensor) -> tuple[()]:
        first = torch.zeros((), dtype=torch.int64, device=words.device)
        for place, draws in enumerate(random.halves(words, first, tensors[0].shape[0])):
            child, *parents = (t[:, place] for t in tensors)
            _Piece(self.mutation)(level, f, draws.float(), child, *parents)
        return ()
