"""A merge method applied to one tensor in pieces that fit a core's cache, by fused kernels where there are some."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from evolver.merging import order, random
from evolver.merging.here import Asked, Here, Stack
from evolver.merging.kernels import Kernels, digest_of, identity_of
from evolver.merging.methods import Method
from evolver.records import Value

# Scalars of a piece for each thread: a few experts' pieces stay in a core's cache. A kernel keeps nothing in between,
# so it takes longer ones, unless it is handed draws.
PIECE, FUSED_PIECE, GPU_PIECE = 1 << 16, 1 << 19, 1 << 26
# Smaller tensors are done before a kernel is found.
FUSE_FROM = 1 << 13

Last = Literal["out", "edges", "none"]


@dataclass
class Whole:
    """One tensor of every input.

    Args:
        name: of the tensor.
        inputs: E tensors of one shape, any floating dtype.
        base: of the same shape.
        ids: one id an input; what is drawn for an input depends on it, not on its place in the row.
        depth: 0 in the first layer, 1 in the last; None outside the layers.
    """

    name: str
    inputs: Sequence[Tensor]
    base: Tensor
    ids: Sequence[str]
    depth: float | None = None


@dataclass
class Model:
    """All floating tensors that a merge goes over, for what a method asks of the model as a whole.

    ``tensors`` yields them afresh every time; nothing of them is kept.
    """

    size: int
    tensors: Callable[[], Iterable[Whole]]
    known: dict[str, Tensor] = field(default_factory=dict)


def apply(
    method: Method,
    values: Mapping[str, Value],
    whole: Whole,
    model: Model | None = None,
    kernels: Kernels | None = None,
    piece: int | None = None,
) -> Tensor:
    """The merged tensor, in the base's shape and dtype: computed in float32, rounded once.

    Args:
        values: complete settings.
        model: answers to questions with ``scope: global``; without it the tensor stands for the model.
        kernels: fused kernels, where there are some; the bits are the same.
        piece: scalars that are handled at a time, about.
    """
    pieces = _Pieces(method, values, whole, kernels, piece)
    known: list[Tensor] = []
    while (question := pieces.question(known)) is not None:
        known.append(_answer(pieces, question, known, model).to(whole.base.device))
    return pieces.merge(known).view(whole.base.shape)


def _answer(pieces: _Pieces, asked: Asked, known: Sequence[Tensor], model: Model | None) -> Tensor:
    if asked.kind == "sum":
        return sum((part.double() for (part,) in pieces.ask(known)), torch.zeros((), dtype=torch.float64))
    if asked.kind == "maximum":
        largest, *others = (part for (part,) in pieces.ask(known))
        for other in others:
            largest = torch.maximum(largest, other)
        return largest
    assert asked.counts is not None  # every question of order has them
    if asked.scope == "tensor" or model is None:
        return order.kth_largest(_Scores([pieces], pieces.size, known), asked.counts(pieces.size))
    ranks = asked.counts(model.size)
    question = f"{len(known)} {ranks}"  # settings that vary by place ask differently
    if question not in model.known:
        scores = _Scores(_OfModel(pieces, model), model.size, known)
        model.known[question] = order.kth_largest(scores, ranks)
    return model.known[question]


@dataclass(frozen=True)
class Step:
    """One call of a method on a piece, as a function of nothing but tensors: what a kernel is made of.

    Its arguments, in order: E inputs, the base, answers, numbers by name, draws of E inputs, the depth, and what is in
    ``last``: the piece of the merged tensor to write to, or edges for a question of order.
    """

    method: Method
    flags: Mapping[str, Any]
    experts: int
    known: int
    numbers: tuple[str, ...]
    draws: bool
    depth: bool
    vector: bool
    last: Last

    def __call__(self, *tensors: Tensor, memory: dict[str, Any] | None = None) -> tuple[Tensor, ...]:
        """Writes the merged piece, in its dtype; or returns what the piece says to the next question.

        ``memory`` is what ``Here`` remembers of the piece; a kernel has none.
        """
        rest = iter(tensors)
        inputs, base = [next(rest).float() for _ in range(self.experts)], next(rest)
        known = [next(rest) for _ in range(self.known)]
        numbers = {n: next(rest) for n in self.numbers}
        draws = [next(rest) for _ in range(self.experts if self.draws else 0)]
        depth = next(rest) if self.depth else None
        origin = base.float()
        if self.method.on_deltas:
            inputs = [i - origin for i in inputs]
        here = Here(inputs, origin, known, lambda _: draws, depth, self.vector, memory)
        given = {**numbers, **self.flags, **({"here": here} if self.method.asks else {})}
        try:
            merged = self.method.function(inputs, **given)
        except Asked as asked:
            if self.last != "edges":
                return tuple(asked.value)
            scores, between, above = order.mark(asked.value, next(rest))
            return (*scores, *between, above)
        next(rest).copy_(origin + merged if self.method.on_deltas else merged)
        return ()

    @property
    def identity(self) -> str:
        """What a kernel is specialised on."""
        flags = {k: v for k, v in self.flags.items() if k != "seed"}  # draws are handed in
        fixed = {k: v for k, v in vars(self).items() if k not in ("method", "flags")}
        code = digest_of(inspect.getfile(self.method.function))
        return identity_of(method=self.method.name, code=code, flags=sorted(flags.items()), **fixed)


class _Pieces:
    """One tensor in pieces, and the calls of a method on them."""

    def __init__(
        self, method: Method, values: Mapping[str, Value], whole: Whole, kernels: Kernels | None, piece: int | None
    ) -> None:
        self.method, self.values, self.whole, self.piece = method, values, whole, piece
        base = whole.base
        self.size, self.device = base.numel(), base.device
        shape = (-1, base.shape[-1]) if method.rows and base.dim() > 1 else (1, -1) if method.rows else (-1,)
        self.flats = [t.reshape(shape) for t in (*whole.inputs, base)]
        self.columns = self.flats[0].shape[-1] if method.rows else 1
        numbers, self.flags = method.handed(values, self.device)
        self.numbers = dict(sorted(numbers.items()))
        self.draws = "seed" in self.flags
        self.depth = None if whole.depth is None or not method.asks else torch.tensor(whole.depth, dtype=torch.float64)
        self._given, self.kernels = kernels, kernels if self.size >= FUSE_FROM else None
        self.fused = self.kernels is not None and not method.rows  # those on rows sort, which no kernel does
        self.step = self._rows_of(piece or self._usual())
        self.memory: dict[int, dict[str, Any]] = {}
        self.remembers = self.device.type == "cpu" and not self.fused

    def of(self, whole: Whole) -> _Pieces:
        """The same method on another tensor."""
        return _Pieces(self.method, self.values, whole, self._given, self.piece)

    def question(self, known: Sequence[Tensor]) -> Asked | None:
        """What the method has to know next, found by a call on a few scalars; None if it knows enough."""
        if not self.method.asks:
            return None
        few = [f[: 1 if self.method.rows else 8] for f in self.flats]
        *inputs, base = (f.float() for f in few)
        if self.method.on_deltas:
            inputs = [i - base for i in inputs]
        none = [torch.zeros(base.shape, device=self.device)] * len(inputs)
        here = Here(inputs, base, known, lambda _: none, self.depth, self.whole.base.dim() < 2)
        try:
            self.method.function(inputs, here=here, **self.numbers, **self.flags)
        except Asked as asked:
            return asked
        return None

    def merge(self, known: Sequence[Tensor]) -> Tensor:
        """The merged scalars, in the base's dtype, flat."""
        out = torch.empty_like(self.flats[-1])
        for _ in self._run(known, "out", out):
            pass
        return out

    def ask(self, known: Sequence[Tensor], edges: Tensor | None = None) -> Iterator[Sequence[Tensor]]:
        """What every piece says to the next question."""
        return self._run(known, "none" if edges is None else "edges", edges)

    def _run(self, known: Sequence[Tensor], last: Last, extra: Tensor | None) -> Iterator[Sequence[Tensor]]:
        step, drawn, kernel = self._step(known, last), self._drawn(), None
        fixed = [*known, *self.numbers.values()]
        for start in range(0, max(1, self.flats[0].shape[0]), self.step):
            place = slice(start, start + self.step)
            inputs = [f[place] for f in self.flats]
            draws = drawn.piece(start * self.columns, inputs[0].shape) if drawn else []
            ends = [] if self.depth is None else [self.depth]
            if extra is not None:
                ends.append(extra[place] if last == "out" else extra)
            tensors = [*inputs, *fixed, *draws, *ends]
            if self.kernels and self.fused and not start:
                long = [True] * len(inputs) + [False] * len(fixed) + [True] * len(draws) + [False] * len(ends)
                long[-1] = long[-1] or last == "out"
                kernel = self.kernels.get(step, tensors, long, step.identity)
            if kernel and inputs[0].shape[0] > 1:
                yield kernel(tensors)
            else:
                yield step(*tensors, memory=self.memory.setdefault(start, {}) if self.remembers else None)

    def sample(self, known: Sequence[Tensor], count: int) -> Sequence[Tensor]:
        """What about ``count`` scalars from all over the tensor say to the next question."""
        places = order.spread(max(1, count // self.columns), self.flats[0].shape[0]).to(self.device)
        picked = [f.index_select(0, places) for f in self.flats]
        tensors = [*picked, *known, *self.numbers.values()]
        if self.draws:  # questions of order come before draws, so any will do
            tensors += [torch.zeros(picked[0].shape, device=self.device)] * len(self.whole.inputs)
        return self._step(known, "none")(*tensors, *([] if self.depth is None else [self.depth]))

    def _drawn(self) -> random.Drawn | None:
        if not self.draws:
            return None
        names = [f"{self.whole.name}#{i}" for i in self.whole.ids]
        return random.Drawn(typing.cast(int, self.flags["seed"]), names, self.device, self.kernels)

    def _step(self, known: Sequence[Tensor], last: Last) -> Step:
        return Step(
            self.method, self.flags, len(self.whole.inputs), len(known), tuple(self.numbers), self.draws,
            self.depth is not None, self.whole.base.dim() < 2, last,
        )  # fmt: skip

    def _usual(self) -> int:
        if self.device.type != "cpu":
            return GPU_PIECE
        return (FUSED_PIECE if self.fused and not self.method.asks else PIECE) * torch.get_num_threads()

    def _rows_of(self, scalars: int) -> int:
        """Rows (or scalars) of a piece: whole blocks of draws, where such a piece is not far too large."""
        unit = random.BLOCK // math.gcd(random.BLOCK, self.columns)
        if unit * self.columns <= max(scalars, 1 << 20):
            return max(1, scalars // (unit * self.columns)) * unit
        return max(1, scalars // self.columns)


@dataclass
class _OfModel:
    """A method on every tensor of a model; afresh each time."""

    pieces: _Pieces
    model: Model

    def __iter__(self) -> Iterator[_Pieces]:
        return (self.pieces.of(whole) for whole in self.model.tensors())


@dataclass
class _Scores:
    """The scores that a method asks the order of, over one tensor or all."""

    parts: Iterable[_Pieces]
    size: int
    known: Sequence[Tensor]

    def sample(self, count: int) -> Tensor:
        share = count / self.size
        found = [p.sample(self.known, math.ceil(share * p.size)) for p in self.parts]
        return torch.stack([torch.cat([row.reshape(-1) for row in rows]) for rows in zip(*found, strict=True)])

    def marked(self, edges: Tensor) -> Iterator[order.Marked]:
        for part in self.parts:
            for *rows, above in part.ask(self.known, edges.to(part.device)):
                flat = [r.reshape(-1) for r in rows]
                yield order.Marked(flat[: len(edges)], flat[len(edges) :], above)

    def pieces(self) -> Iterator[Stack]:
        for part in self.parts:
            for rows in part.ask(self.known):
                yield [r.reshape(-1) for r in rows]
