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
from evolver.merging.engine.entire import EntireTensor
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
    pieces: Pieces | EntireTensor = (
        EntireTensor(method, values, whole) if method.whole else Pieces(method, values, whole, kernels, piece)
    )
    known: list[Tensor] = []
    while (question := pieces.question(known)) is not None:
        known.append(_answer(pieces, question, known, model).to(whole.base.device))
    return pieces.merge(known).view(whole.base.shape)


def _answer(
    pieces: Pieces | EntireTensor, asked: NeedsAnswer, known: Sequence[Tensor], model: AllTensors | None
) -> Tensor:
    if asked.scope == "tensor" or model is None:
        return _answered([pieces], pieces.size, asked, known)
    # Settings that vary by place ask differently.
    ranks = asked.counts(model.size) if asked.counts else None
    question = f"{asked.kind} {ranks} {[n.tolist() for n in (*known, *asked.given)]}"
    if question not in model.known:
        model.known[question] = _answered(_OfModel(pieces, model), model.size, asked, known)
    return model.known[question]


def _answered(parts: Iterable[Pieces | EntireTensor], size: int, asked: NeedsAnswer, known: Sequence[Tensor]) -> Tensor:
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

    pieces: Pieces | EntireTensor
    model: AllTensors

    def __iter__(self) -> Iterator[Pieces | EntireTensor]:
        return (self.pieces.of(whole) for whole in self.model.tensors())


@dataclass
class _Scores:
    """The scores that a method asks the order of, over one tensor or all."""

    parts: Iterable[Pieces | EntireTensor]
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
