"""The Evolver operators on weights: mutation and crossover in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from evolver.kernels import execute, native, random
from evolver.kernels.compiled import Kernels
from evolver.kernels.encoded import FLOAT32, MASK, Code, Operation
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
# member, the best one for best/1 and current-to-best/1, or one of the best for current-to-pbest/1 (Zhang and Sanderson
# 2009, JADE), of which p[2] may also be a former member.
STRATEGIES: dict[str, tuple[Mutation, int]] = {
    "evolver": (_evolver, 1),
    "rand/1": (_rand1, 3),
    "best/1": (_rand1, 3),
    "current-to-best/1": (_current_to_best1, 3),
    "current-to-pbest/1": (_current_to_best1, 3),
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


def cross_units(
    strategy: str,
    parent: Tensor,
    partners: Sequence[Tensor],
    F: float,
    Cr: float,
    seed: int,
    unit: str,
    by_row: bool,
    kernels: Kernels | None = None,
) -> Tensor:
    """The same where not every scalar draws, but every row of a tensor, or the whole tensor.

    Row r takes the mutant's values if scalar r of the stream of draws is below the level; a tensor that draws as a
    whole is one row. A row is a vector along the last dimension; a vector is one row.

    Args:
        unit: names the stream: the tensor, or the layer, all of whose tensors then take the mutant's values or none.
        by_row: whether rows draw; without it, the whole tensor does.

    Returns:
        Tensor of the parent's shape and dtype; the parent itself where nothing of it is replaced.
    """
    columns = parent.shape[-1] if by_row and parent.dim() else parent.numel()
    rows = parent.numel() // max(1, columns)
    # Few draws serve many scalars, so they are made on the CPU for every device.
    taken = random.draws(seed, unit, 0, rows) < random.threshold(Cr)
    if not taken.any():
        return parent
    child = torch.empty(parent.shape, dtype=parent.dtype, device=parent.device)
    tensors = [t.reshape(-1) for t in (child, parent, *partners)]
    loops = native.library() if child.is_cpu else None
    if loops is not None and all(execute.handles(loops, t.dtype) for t in tensors):
        out, *parents = tensors
        execute.Run(_unit_code(strategy, F), out.numel(), [*parents, _row_bits(taken, columns)], [out]).run(loops)
        return child
    mask = taken.to(child.device)[:, None].expand(rows, columns).reshape(-1)
    step, number = _Unit(STRATEGIES[strategy][0]), torch.tensor(F, device=child.device)
    for start in range(0, child.numel(), CROSSING_PIECE):
        given = [number, *(t[start : start + CROSSING_PIECE] for t in (mask, *tensors))]
        kernel = kernels and kernels.get(step, given, [n > 0 for n in range(len(given))], f"units {strategy}")
        if kernel and given[1].numel() > 1:
            kernel(given)
        else:
            step(*given)
    return child


def _row_bits(taken: Tensor, columns: int) -> Tensor:
    """For every scalar of rows of so many the bit of its row, (rows), the first scalar's the lowest of its byte."""
    rows = taken.numpy()
    if columns % 8 == 0:
        return torch.from_numpy(np.repeat(rows * np.uint8(0xFF), columns // 8))
    return torch.from_numpy(np.packbits(np.repeat(rows, columns), bitorder="little"))


@lru_cache(maxsize=256)
def _code(strategy: str, level: int, f: float) -> Code:
    """Mutation and crossover for the loop in C."""
    program, parents = _loaded(strategy)
    draws: Any = program.add("draw", FLOAT32)
    mask = draws < torch.tensor(float(level))
    return _stored(program, _crossed(STRATEGIES[strategy][0], torch.tensor(f), mask, parents))


@lru_cache(maxsize=256)
def _unit_code(strategy: str, f: float) -> Code:
    """The same with a mask that is read as bits, after the parents."""
    program, parents = _loaded(strategy)
    mask: Any = program.add("load", MASK, (), len(parents))
    return _stored(program, _crossed(STRATEGIES[strategy][0], torch.tensor(f), mask, parents))


def _loaded(strategy: str) -> tuple[Program, list[Any]]:
    """A program that reads the parent and its partners, and what stands for them."""
    count = 1 + STRATEGIES[strategy][1]
    program = Program(count)
    return program, [program.add("load", FLOAT32, (), n) for n in range(count)]


def _stored(program: Program, child: Tensor) -> Code:
    return program.code([Operation("store", FLOAT32, (cast(Traced, child).number,))])


def _crossed(mutation: Mutation, f: Tensor, mask: Tensor, parents: Sequence[Tensor]) -> Tensor:
    """The mutant of the first parent where the mask is set, and that parent elsewhere."""
    x, *p = parents
    return torch.where(mask, mutation(x, p, f), x)


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
        child.copy_(_crossed(self.mutation, f, draws < level, [t.float() for t in parents]))
        return ()


@dataclass(frozen=True)
class _Unit:
    """Mutation and crossover of a piece from F and its mask; mask, child, parent and partners, (n) each."""

    mutation: Mutation

    def __call__(self, f: Tensor, mask: Tensor, child: Tensor, *parents: Tensor) -> tuple[()]:
        child.copy_(_crossed(self.mutation, f, mask, [t.float() for t in parents]))
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
