"""A merge method applied to one tensor: its questions answered by passes over all pieces, then merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from evolver.kernels.compiled import Kernels
from evolver.merging.engine import order
from evolver.merging.engine.pieces import InputTensors, Pieces
from evolver.merging.methods import Method
from evolver.merging.methods.here import NeedsAnswer, Stack
from evolver.records.recipe import Value


@dataclass
class AllTensors:
    """All floating tensors that a merge goes over, for what a method asks of the model as a whole.

    ``tensors`` yields them afresh every time; nothing of them is kept.
    """

    size: int
    tensors: Callable[[], Iterable[InputTensors]]
    known: dict[str, Tensor] = field(default_factory=dict)


def apply(
    method: Method,
    values: Mapping[str, Value],
    whole: InputTensors,
    model: AllTensors | None = None,
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
    if method.whole:
        return _apply_whole(method, values, whole)
    pieces = Pieces(method, values, whole, kernels, piece)
    known: list[Tensor] = []
    while (question := pieces.question(known)) is not None:
        known.append(_answer(pieces, question, known, model).to(whole.base.device))
    return pieces.merge(known).view(whole.base.shape)


def _apply_whole(method: Method, values: Mapping[str, Value], whole: InputTensors) -> Tensor:
    """The merged tensor by a method that wants whole ones; it asks nothing, and no kernel replaces it."""
    numbers, flags = method.handed(values, whole.base.device)
    handed = {parameter: whole.statistics.get(parameter) for parameter in method.statistics}
    origin = whole.base.float()
    inputs = [i.float() - origin if method.on_deltas else i.float() for i in whole.inputs]
    try:
        merged = method.function(inputs, **numbers, **flags, **handed)
    except FloatingPointError as error:
        raise FloatingPointError(f"{method.name} of {whole.name}: {error}") from error
    return (origin + merged if method.on_deltas else merged).to(whole.base.dtype).view(whole.base.shape)


def _answer(pieces: Pieces, asked: NeedsAnswer, known: Sequence[Tensor], model: AllTensors | None) -> Tensor:
    if asked.scope == "tensor" or model is None:
        return _answered([pieces], pieces.size, asked, known)
    # Settings that vary by place ask differently.
    ranks = asked.counts(model.size) if asked.counts else None
    question = f"{asked.kind} {ranks} {[n.tolist() for n in (*known, *asked.given)]}"
    if question not in model.known:
        model.known[question] = _answered(_OfModel(pieces, model), model.size, asked, known)
    return model.known[question]


def _answered(parts: Iterable[Pieces], size: int, asked: NeedsAnswer, known: Sequence[Tensor]) -> Tensor:
    """The answer for one tensor, or for several with so many scalars in all."""
    if asked.kind == "sum":
        return sum((p.sum(known) for p in parts), torch.zeros((), dtype=torch.float64))
    if asked.kind == "maximum":
        return reduce(torch.maximum, (p.maximum(known) for p in parts))
    assert asked.counts is not None  # every question of order has them
    return order.kth_largest(_Scores(parts, size, known), asked.counts(size))


@dataclass
class _OfModel:
    """A method on every tensor of a model; afresh each time."""

    pieces: Pieces
    model: AllTensors

    def __iter__(self) -> Iterator[Pieces]:
        return (self.pieces.of(whole) for whole in self.model.tensors())


@dataclass
class _Scores:
    """The scores that a method asks the order of, over one tensor or all."""

    parts: Iterable[Pieces]
    size: int
    known: Sequence[Tensor]

    def sample(self, count: int) -> Tensor:
        share = count / self.size
        found = [p.sample(self.known, math.ceil(share * p.size)) for p in self.parts]
        return torch.stack([torch.cat([row.reshape(-1) for row in rows]) for rows in zip(*found, strict=True)])

    def taken(self, edges: Tensor) -> Iterator[order.Taken]:
        return (taken for part in self.parts for taken in part.taken(self.known, edges))

    def pieces(self) -> Iterator[Stack]:
        return (scores for part in self.parts for scores in part.scores(self.known))
