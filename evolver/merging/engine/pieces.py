"""One tensor of every input in pieces that fit a cache, and a method's calls on them, by kernels if there are some."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evolver.kernels import execute, native, random
from evolver.kernels.compiled import Kernel, Kernels
from evolver.kernels.program import RankMask
from evolver.merging.engine import order
from evolver.merging.engine.recorded import Recorded, record
from evolver.merging.engine.step import Probe, Step
from evolver.merging.methods import Method
from evolver.merging.methods.here import NeedsAnswer, Stack
from evolver.records.recipe import Value, part_rows

# Scalars of a piece: those of a few experts stay in a core's cache.
PIECE, GPU_PIECE = 1 << 18, 1 << 26
# A sample takes so many neighbours at a time: memory is read by lines of a cache.
RUN_ROWS = 8
# Smaller tensors are done before a kernel is found.
FUSE_FROM = 1 << 13

SaidOnce = TypeVar("SaidOnce")


@dataclass
class InputTensors:
    """One tensor of every input.

    Args:
        name: of the tensor.
        inputs: E tensors of one shape, any floating dtype.
        base: of the same shape.
        ids: one id an input; what is drawn for an input depends on it, not on its place in the row.
        depth: 0 in the first layer, 1 in the last; None outside the layers.
        statistics: of every input, by the method's parameter; None where not every input has one for this tensor.
    """

    name: str
    inputs: Sequence[Tensor]
    base: Tensor
    ids: Sequence[str]
    depth: float | None = None
    statistics: Mapping[str, Stack | None] = field(default_factory=dict)

    def part(self, part: tuple[int, int]) -> InputTensors:
        """Some rows of the tensor, see ``Place``, as if they were a tensor of their own.

        Raises ValueError where there are statistics, which are of the whole tensor.
        """
        if self.statistics:
            raise ValueError(f"{self.name}: statistics are of whole tensors, so a part of one cannot be merged")
        rows = part_rows(part, len(by_rows(self.base)))
        inputs = [by_rows(tensor)[rows] for tensor in self.inputs]
        return replace(
            self, name=f"{self.name}[{rows.start}:{rows.stop}]", inputs=inputs, base=by_rows(self.base)[rows]
        )


def by_rows(tensor: Tensor) -> Tensor:
    """A tensor with at least one dimension: a scalar is a row."""
    return tensor if tensor.dim() else tensor.view(1)


class _Made(Exception):  # not an error: the way out of a call that was for nothing else
    def __init__(self, tensors: Stack) -> None:
        self.tensors = tensors


@dataclass
class _Piece:
    """Makes draws and the like for one piece; in plain code, when they are asked for."""

    pieces: Pieces
    start: int
    shape: Sequence[int]
    leave: bool = False

    def depth(self) -> Tensor | None:
        return self.pieces.depth

    def draws(self, seed: int) -> Stack:
        return self.pieces.drawn(seed).piece(self.start * self.pieces.columns, self.shape)

    def once(self, make: Callable[[], Stack]) -> Stack:
        made = self.remembered()
        if made is None:
            made = make()
            if all(m.dtype == torch.bool and m.is_cpu for m in made):
                self.pieces.memory[self.start] = [np.packbits(m.numpy()) for m in made]
        if self.leave:
            raise _Made(made)
        return made

    def remembered(self) -> Stack | None:
        """What was made for the piece when another question was asked."""
        bits, size = self.pieces.memory.get(self.start), math.prod(self.shape)
        if bits is None:
            return None
        unpacked = (np.unpackbits(b, count=size).view(np.bool_) for b in bits)
        return [torch.from_numpy(mask).view(*self.shape) for mask in unpacked]


class Pieces:
    """One tensor in pieces, and the calls of a method on them."""

    def __init__(
        self,
        method: Method,
        values: Mapping[str, Value],
        whole: InputTensors,
        kernels: Kernels | None,
        piece: int | None,
    ) -> None:
        self.method, self.values, self.whole, self.piece = method, values, whole, piece
        base = whole.base
        self.size, self.device = base.numel(), base.device
        shape = _rows_and_columns(method, values, base)
        self.flats = [t.reshape(shape) for t in (*whole.inputs, base)]
        self.columns = self.flats[0].shape[-1] if method.rows else 1
        numbers, self.flags = method.handed(values, self.device)
        self.numbers = dict(sorted(numbers.items()))
        self.depth = None if whole.depth is None else torch.tensor(whole.depth, dtype=torch.float64)
        self._given, self.kernels = kernels, kernels if self.size >= FUSE_FROM else None
        self.probed = Probe([], None)
        self.step = self._rows_of(piece or self._usual())
        self.memory: dict[int, list[NDArray[np.uint8]]] = {}
        self._loops: dict[int, Recorded | None] = {}
        self._masks: dict[RankMask, Tensor] = {}

    def of(self, whole: InputTensors) -> Pieces:
        """The same method on another tensor."""
        other = Pieces(self.method, self.values, whole, self._given, self.piece)
        other.probed = self.probed
        return other

    def question(self, known: Sequence[Tensor]) -> NeedsAnswer | None:
        """What the method has to know next; None if it knows enough."""
        if not self.method.asks:
            return None
        recorded = self._recorded(known)
        return self._probe(known) if recorded is None else recorded.record.asked

    def _probe(self, known: Sequence[Tensor]) -> NeedsAnswer | None:
        """The next question, found by a call on a few scalars, and notes on what the method has drawn and made."""
        few = [f[: 1 if self.method.rows else 8] for f in self.flats]
        zeros = [torch.zeros(few[0].shape, device=self.device)] * len(self.whole.inputs)
        self.probed = Probe(zeros, self.depth)
        try:
            self._step(known, False).merged([*few, *known, *self.numbers.values()], self.probed)
        except NeedsAnswer as asked:
            return asked
        return None

    def drawn(self, seed: int) -> random.Drawn:
        """The draws of all inputs."""
        names = [f"{self.whole.name}#{i}" for i in self.whole.ids]
        return random.Drawn(seed, names, self.device, self._given)

    def merge(self, known: Sequence[Tensor]) -> Tensor:
        """The merged scalars, in the base's dtype, flat."""
        out = torch.empty_like(self.flats[-1])
        if recorded := self._recorded(known):
            recorded.merge(out.view(-1))
            return out
        for _ in self._run(known, lambda said: None, out):
            pass
        return out

    def sum(self, known: Sequence[Tensor]) -> Tensor:
        """The answer to a question for a sum."""
        if recorded := self._recorded(known):
            return recorded.reduced(torch.float64)
        return sum((p.double() for p in self._run(known, _first)), torch.zeros((), dtype=torch.float64))

    def maximum(self, known: Sequence[Tensor]) -> Tensor:
        """The answer to a question for a maximum."""
        if recorded := self._recorded(known):
            return recorded.reduced(torch.float32)
        return reduce(torch.maximum, self._run(known, _first))

    def scores(self, known: Sequence[Tensor]) -> Iterator[Stack]:
        """What the pieces say to a question of order, flat."""
        if recorded := self._recorded(known):
            return iter([recorded.scores()])
        return self._run(known, lambda scores: [s.reshape(-1) for s in scores])

    def taken(self, known: Sequence[Tensor], edges: Tensor) -> Iterator[order.Taken]:
        """What the pieces say to a question of order, counted against ``edges``."""
        if recorded := self._recorded(known):
            return recorded.taken(edges)
        there = edges.to(self.device)
        return self._run(known, lambda scores: order.take(scores, there))

    def _run(
        self, known: Sequence[Tensor], hear: Callable[[Stack], SaidOnce], out: Tensor | None = None
    ) -> Iterator[SaidOnce]:
        step = self._step(known, out is not None)
        kernel = self._kernel(step, known, out)

        def work(start: int) -> SaidOnce:
            inputs, end = self._cut(start, out)
            piece, fixed = _Piece(self, start, inputs[0].shape), [*known, *self.numbers.values()]
            if kernel and inputs[0].numel() > 1:
                drawn = piece.draws(cast(int, self.flags["seed"])) if step.draws else []
                handed = _flat([*drawn, *map(_as_bytes, self._made(step, known, piece))])
                return hear(kernel([*_flat(inputs), *fixed, *handed, *self._place(step), *_flat(end)]))
            return hear(step(*inputs, *fixed, *end, sources=piece))

        return map(work, range(0, max(1, self.flats[0].shape[0]), self.step))

    def _recorded(self, known: Sequence[Tensor]) -> Recorded | None:
        """The method on this tensor by the loop in C, where there is one that can do what the method does."""
        if len(known) not in self._loops:
            self._loops[len(known)] = self._record(known)
        return self._loops[len(known)]

    def _record(self, known: Sequence[Tensor]) -> Recorded | None:
        loops = native.library() if self.device.type == "cpu" else None
        piece = self.step * self.columns
        whole = self.flats[0].shape[0] <= self.step
        if loops is None or not self.size or not all(execute.handles(loops, f.dtype) for f in self.flats):
            return None
        if not (whole or piece % random.BLOCK == 0):  # blocks of draws and runs of sums begin with a piece
            return None
        found = record(self._step(known, False), known, list(self.numbers.values()), self.depth)
        if found is None or (found.program.masks and not self.method.rows):
            return None
        words = [] if found.seed is None else self.drawn(found.seed).plain_words
        return Recorded(loops, found, [f.reshape(-1) for f in self.flats], words, piece, self.columns, self._masks)

    def _kernel(self, step: Step, known: Sequence[Tensor], out: Tensor | None) -> Kernel | None:
        """The compiled step, where there is one. On rows, one that is handed what looks at whole rows."""
        if self.kernels is None or (self.method.rows and not step.made):
            return None
        inputs, end = self._cut(0, out)
        fixed, handed = [*known, *self.numbers.values()], [torch.float32] * step.draws + list(self.probed.made)
        like = [_as_bytes(torch.empty(inputs[0].numel(), dtype=dtype, device=self.device)) for dtype in handed]
        long = [True] * len(inputs) + [False] * len(fixed) + [True] * len(like) + [False] * step.depth
        given = [*_flat(inputs), *fixed, *like, *self._place(step), *_flat(end)]
        return self.kernels.get(step, given, [*long, *[True] * step.merges], step.identity)

    def _made(self, step: Step, known: Sequence[Tensor], piece: _Piece) -> Stack:
        """What the method wants made once for the piece."""
        if not step.made:
            return []
        if (made := piece.remembered()) is not None:
            return made
        inputs, _ = self._cut(piece.start, None)
        try:
            step(*inputs, *known, *self.numbers.values(), sources=replace(piece, leave=True))
        except _Made as way_out:
            return way_out.tensors
        raise AssertionError(f"{self.method.name} asks for what it makes now and then only")

    def _cut(self, start: int, out: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """The pieces of inputs and base, and of what is written to."""
        place = slice(start, start + self.step)
        return [f[place] for f in self.flats], [] if out is None else [out[place]]

    def _place(self, step: Step) -> list[Tensor]:
        return [self.depth] if step.depth and self.depth is not None else []

    def sample(self, known: Sequence[Tensor], count: int) -> Sequence[Tensor]:
        """What about ``count`` scalars from all over the tensor say to the next question."""
        length = self.flats[0].shape[0]
        run = 1 if self.method.rows else max(1, min(RUN_ROWS, length))
        places = order.spread(max(1, count // (self.columns * run)), length // run).to(self.device)
        runs = [f[: length // run * run].unflatten(0, (-1, run)) for f in self.flats]
        picked = [r.index_select(0, places).flatten(0, 1) for r in runs]
        none = [torch.zeros(picked[0].shape, device=self.device)] * len(self.whole.inputs)
        if recorded := self._recorded(known):
            return recorded.scores([p.reshape(-1) for p in picked])
        blind = Probe(none, self.depth)  # questions of order come before draws, so any will do
        return self._step(known, False)(*picked, *known, *self.numbers.values(), sources=blind)

    def _step(self, known: Sequence[Tensor], merges: bool) -> Step:
        return Step(
            self.method, self.flags, len(self.whole.inputs), len(known), tuple(self.numbers), self.probed.drawn,
            len(self.probed.made), self.probed.deep, self.whole.base.dim() < 2, merges,
        )  # fmt: skip

    def _usual(self) -> int:
        return PIECE if self.device.type == "cpu" else GPU_PIECE

    def _rows_of(self, scalars: int) -> int:
        """Rows (or scalars) of a piece: whole blocks of draws, where such a piece is not far too large."""
        unit = random.BLOCK // math.gcd(random.BLOCK, self.columns)
        if unit * self.columns <= max(scalars, 1 << 20):
            return max(1, scalars // (unit * self.columns)) * unit
        return max(1, scalars // self.columns)


def _rows_and_columns(method: Method, values: Mapping[str, Value], base: Tensor) -> tuple[int, ...]:
    """The shape in which a method sees a tensor."""
    if not method.rows:
        return (-1,)
    if base.dim() < 2:
        return (1, -1)
    sliced = method.slices is not None and base.dim() > 2 and method.slices(values)
    return (-1, base[0].numel()) if sliced else (-1, base.shape[-1])


def _first(said: Stack) -> Tensor:
    return said[0]


def _flat(pieces: Sequence[Tensor]) -> list[Tensor]:
    """Whole rows as the scalars that kernels take."""
    return [p.reshape(-1) if p.dim() else p for p in pieces]


def _as_bytes(tensor: Tensor) -> Tensor:
    """Bools as 0 or 1: a kernel that reads bools is not vectorised."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
