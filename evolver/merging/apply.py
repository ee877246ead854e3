"""A merge method applied to one tensor in pieces that fit a core's cache, with fused kernels where that pays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from evolver.merging import order, random
from evolver.merging.compiled import can_compile, fresh
from evolver.merging.here import Asked, Here
from evolver.merging.methods import Method
from evolver.records import Value

# Scalars of a piece for each thread: a few experts' pieces stay in a core's cache.
PIECE = 1 << 16
# Fused kernels write nothing in between; their pieces only bound what a question makes of a tensor.
FUSED_PIECE = 1 << 21
# Stacks of tensors up to this size are kept between the passes of an eager merge (bytes).
HOLD = 1 << 26


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
    compiled: bool = False,
    piece: int | None = None,
) -> Tensor:
    """The merged tensor, in the base's shape and dtype: computed in float32, rounded once.

    Args:
        values: complete settings.
        model: answers to questions with ``scope: global``; without it the tensor stands for the model.
        compiled: use fused kernels, where this machine can build them; the bits are the same.
        piece: scalars that are handled at a time, about.
    """
    pieces = _Pieces(method, values, whole, compiled, piece)
    known: list[Tensor] = []
    while (question := pieces.question(known)) is not None:
        known.append(_answer(pieces, question, known, model).to(whole.base.device))
    out = torch.empty(whole.base.numel(), dtype=whole.base.dtype, device=whole.base.device)
    for start, merged in pieces.run(known):
        out[start : start + merged.numel()] = merged.reshape(-1)
    return out.view(whole.base.shape)


def _answer(pieces: _Pieces, asked: Asked, known: Sequence[Tensor], model: Model | None) -> Tensor:
    if asked.kind == "sum":
        total = torch.zeros((), dtype=torch.float64, device=asked.value.device)
        for _, part in pieces.run(known):
            total = total + part.double()
        return total
    if asked.kind == "maximum":
        largest = torch.tensor(-torch.inf, device=asked.value.device)
        for _, part in pieces.run(known):
            largest = torch.maximum(largest, part)
        return largest
    assert asked.counts is not None  # every question of order has them
    if asked.scope == "global" and model is not None:
        return _global_order(pieces, asked, known, model)
    size = pieces.whole.base.numel()
    return order.kth_largest(lambda: (part for _, part in pieces.run(known)), asked.counts(size), size)


def _global_order(pieces: _Pieces, asked: Asked, known: Sequence[Tensor], model: Model) -> Tensor:
    assert asked.counts is not None
    ranks = asked.counts(model.size)
    question = f"{len(known)} {ranks}"  # settings that vary by place ask differently
    if question not in model.known:

        def scores() -> Iterator[Tensor]:
            for whole in model.tensors():
                for _, part in pieces.of(whole).run(known):
                    yield part

        model.known[question] = order.kth_largest(scores, ranks, model.size)
    return model.known[question]


class _Pieces:
    """One tensor in pieces, and the calls of a method on them."""

    def __init__(
        self, method: Method, values: Mapping[str, Value], whole: Whole, compiled: bool, piece: int | None
    ) -> None:
        self.method, self.values, self.whole, self.piece = method, values, whole, piece
        base = whole.base
        device = base.device
        shape = (-1, base.shape[-1]) if base.dim() > 1 else (1, -1)
        self.flats = [t.reshape(shape if method.rows else -1) for t in whole.inputs]
        self.origin = base.reshape(shape if method.rows else -1)
        self.columns = self.origin.shape[-1] if method.rows else 1
        # Methods on rows sort, which no fused kernel does.
        self.compiled = compiled and not method.rows and can_compile(device)
        usual = FUSED_PIECE if self.compiled else PIECE * torch.get_num_threads()
        self.step = self._rows_of(piece or (usual if device.type == "cpu" else 1 << 26))
        self.aligned = self.step * self.columns % random.BLOCK == 0
        self.compiled = self.compiled and self.aligned
        self.numbers, self.flags = method.handed(values, device)
        streams = [random.stream_of(f"{whole.name}#{i}") for i in whole.ids]
        self.streams = torch.tensor(streams, dtype=torch.int64, device=device)
        self.depth = None if whole.depth is None else torch.tensor(whole.depth, dtype=torch.float64)
        self._held: list[tuple[Tensor, Tensor]] | None = None

    def of(self, whole: Whole) -> _Pieces:
        """The same method on another tensor."""
        return _Pieces(self.method, self.values, whole, self.compiled, self.piece)

    def question(self, known: Sequence[Tensor]) -> Asked | None:
        """What the method has to know next, found by a call on a few scalars; None if it knows enough."""
        if not self.method.asks:
            return None
        few = slice(0, 1 if self.method.rows else 8)
        try:
            self._call(_stack(self.method.on_deltas, [f[few] for f in self.flats], self.origin[few]), 0, known)
        except Asked as asked:
            return asked
        return None

    def run(self, known: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """For every piece its place, and what it says to the next question; if there is none, the merged scalars."""
        if self.compiled:
            yield from self._run_compiled(known)
            return
        for number, prepared in enumerate(self._prepared()):
            start = number * self.step * self.columns
            try:
                out = self._call(prepared, start, known)
                out = prepared[1] + out if self.method.on_deltas else out
            except Asked as asked:
                out = asked.value
            yield start, out

    def _run_compiled(self, known: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        kernel = _kernel(self.method.function, len(self.flats), len(known), tuple(sorted(self.flags.items())))
        for place in self._places():
            start = place.start * self.columns
            first = torch.tensor(start, device=self.origin.device)
            out = kernel(
                self.method.function, self.method.on_deltas, self.method.asks, [f[place] for f in self.flats],
                self.origin[place], list(known), self.streams, first, self.depth, self.whole.base.dim() < 2,
                self.numbers, self.flags,
            )  # fmt: skip
            yield start, out

    def _call(self, prepared: tuple[Tensor, Tensor], start: int, known: Sequence[Tensor]) -> Tensor:
        stack, base = prepared
        first = torch.tensor(start, device=base.device)
        vector = self.whole.base.dim() < 2
        here = Here(stack, base, known, self.streams, first, self.aligned, self.depth, vector)
        return _method(self.method.function, self.method.asks, here, self.numbers, self.flags)

    def _prepared(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._held is not None:
            yield from self._held
            return
        held: list[tuple[Tensor, Tensor]] | None = [] if self.whole.base.numel() * len(self.flats) * 4 <= HOLD else None
        for place in self._places():
            prepared = _stack(self.method.on_deltas, [f[place] for f in self.flats], self.origin[place])
            if held is not None:
                held.append(prepared)
            yield prepared
        self._held = held

    def _places(self) -> Iterator[slice]:
        for start in range(0, max(1, self.origin.shape[0]), self.step):
            yield slice(start, start + self.step)

    def _rows_of(self, scalars: int) -> int:
        """Rows (or scalars) of a piece: whole blocks of draws, where such a piece is not far too large."""
        unit = random.BLOCK // math.gcd(random.BLOCK, self.columns)
        if unit * self.columns <= max(scalars, 1 << 20):
            return max(1, scalars // (unit * self.columns)) * unit
        return max(1, scalars // self.columns)


def _stack(on_deltas: bool, flats: Sequence[Tensor], origin: Tensor) -> tuple[Tensor, Tensor]:
    base = origin.float()
    stack = torch.empty(len(flats), *base.shape, dtype=torch.float32, device=base.device)
    for e, flat in enumerate(flats):
        if on_deltas:
            torch.sub(flat.float(), base, out=stack[e])
        else:
            stack[e].copy_(flat)
    return stack, base


def _method(
    function: Callable[..., Tensor], asks: bool, here: Here, numbers: Mapping[str, Tensor], flags: Mapping[str, Any]
) -> Tensor:
    if asks:
        return function(here.stack, here=here, **numbers, **flags)
    return function(here.stack, **numbers, **flags)


def _step(
    function: Callable[..., Tensor],
    on_deltas: bool,
    asks: bool,
    flats: Sequence[Tensor],
    origin: Tensor,
    known: Sequence[Tensor],
    streams: Tensor,
    first: Tensor,
    depth: Tensor | None,
    vector: bool,
    numbers: Mapping[str, Tensor],
    flags: Mapping[str, Any],
) -> Tensor:
    """One piece as one kernel: read, subtract, merge, add, round; or what the piece says to a question."""
    base = origin.float()
    stack = torch.stack([f.float() - base if on_deltas else f.float() for f in flats])
    here = Here(stack, base, known, streams, first, True, depth, vector)
    try:
        merged = _method(function, asks, here, numbers, flags)
    except Asked as asked:
        return asked.value
    return (base + merged if on_deltas else merged).to(origin.dtype)


@cache
def _kernel(
    function: Callable[..., Tensor], experts: int, questions: int, flags: tuple[tuple[str, Any], ...]
) -> Callable[..., Tensor]:
    del function, experts, questions, flags  # one kernel each
    return fresh(_step)
