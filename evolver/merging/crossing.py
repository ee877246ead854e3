"""The Evolver operators on weights: mutation and crossover in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from evolver.kernels import execute, native, random
from evolver.kernels.compiled import Kernels
from evolver.kernels.encoded import FLOAT32, Code, Operation
from evolver.kernels.program import Program, Traced


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
CROSSING_PIECE = 16 * random.BLOCK


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
        kernels: fused kernels of a GPU, where there are some; the bits are the same.

    Returns:
        Tensor of the parent's shape and dtype; the same bits for every device, piece and thread count.
    """
    child = torch.empty(parent.shape, dtype=parent.dtype, device=parent.device)
    tensors = [t.reshape(-1) for t in (child, parent, *partners)]
    level, drawn, done = random.threshold(Cr), random.Drawn(seed, [name], child.device, kernels), 0
    loops = native.library() if child.is_cpu else None
    if loops is not None and all(execute.handles(loops, t.dtype) for t in tensors):
        code, (out, *parents) = _code(strategy, level, F), tensors
        execute.Run(code, out.numel(), parents, [out], drawn.plain_words).run(loops)
        return child
    numbers = [torch.tensor(float(level), device=child.device), torch.tensor(F, device=child.device)]
    mutation = STRATEGIES[strategy][0]
    if child.is_cuda:
        words = random.key_words(seed, name, child.device)
        done = _blockwise(mutation, words, numbers, tensors, kernels, f"blocks {strategy}")
    _piecewise(mutation, drawn, done, numbers, [t[done:] for t in tensors], kernels, f"cross {strategy}")
    return child


@lru_cache(maxsize=256)
def _code(strategy: str, level: int, f: float) -> Code:
    """Mutation and crossover for the loop in C."""
    mutation, partners = STRATEGIES[strategy]
    program = Program(partners + 1)
    parents: list[Any] = [program.add("load", FLOAT32, (), n) for n in range(partners + 1)]
    draws: Any = program.add("draw", FLOAT32)
    child = _crossed(mutation, torch.tensor(float(level)), torch.tensor(f), draws, parents)
    return program.code([Operation("store", FLOAT32, (cast(Traced, child).number,))])


def _crossed(mutation: Mutation, level: Tensor, f: Tensor, draws: Tensor, parents: Sequence[Tensor]) -> Tensor:
    """The mutant of the first parent where the draws are below the level, and that parent elsewhere."""
    x, *p = parents
    return torch.where(draws < level, mutation(x, p, f), x)


def _piecewise(
    mutation: Mutation, drawn: random.Drawn, done: int, numbers: list[Tensor], tensors: list[Tensor],
    kernels: Kernels | None, identity: str,
) -> None:  # fmt: skip
    """In pieces, each after its draws."""
    step, kernel = _Piece(mutation), None
    for start in range(0, tensors[0].numel(), CROSSING_PIECE):
        pieces = [t[start : start + CROSSING_PIECE] for t in tensors]
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
        child.copy_(_crossed(self.mutation, level, f, draws, [t.float() for t in parents]))
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
