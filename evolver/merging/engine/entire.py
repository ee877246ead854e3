"""One tensor of every input as it is, and the calls on it of a method that wants whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from evolver.kernels import random
from evolver.merging.engine import order
from evolver.merging.engine.pieces import InputTensors
from evolver.merging.methods import Method
from evolver.merging.methods.here import NeedsAnswer, PieceView, Stack
from evolver.records.recipe import Value


@dataclass
class _Sources:
    """What there is for a tensor that is its own only piece."""

    whole: InputTensors
    device: torch.device

    def depth(self) -> Tensor | None:
        return None if self.whole.depth is None else torch.tensor(self.whole.depth, dtype=torch.float64)

    def draws(self, seed: int) -> Stack:
        names = [f"{self.whole.name}#{i}" for i in self.whole.ids]
        return random.Drawn(seed, names, self.device, None).piece(0, self.whole.base.shape)

    def once(self, make: Callable[[], Stack]) -> Stack:
        return make()


class EntireTensor:
    """One tensor, seen at once: what ``Pieces`` is for methods that work piece by piece.

    A method may ask before it computes anything large: every question calls it anew.

    Raises FloatingPointError, which names method and tensor, where a method finds no numbers.
    """

    def __init__(self, method: Method, values: Mapping[str, Value], whole: InputTensors) -> None:
        self.method, self.values, self.whole = method, values, whole
        self.size, self.device = whole.base.numel(), whole.base.device
        self._merged: Tensor | None = None

    def of(self, whole: InputTensors) -> EntireTensor:
        """The same method on another tensor."""
        return EntireTensor(self.method, self.values, whole)

    def question(self, known: Sequence[Tensor]) -> NeedsAnswer | None:
        """What the method has to know next; None if it knows enough."""
        said = self._call(known)
        if isinstance(said, NeedsAnswer):
            return said
        self._merged = said
        return None

    def merge(self, known: Sequence[Tensor]) -> Tensor:
        """The merged scalars, in the base's dtype, flat."""
        merged = self._call(known) if self._merged is None else self._merged
        return cast(Tensor, merged).to(self.whole.base.dtype).reshape(-1)

    def sum(self, known: Sequence[Tensor]) -> Tensor:
        """The answer to a question for a sum."""
        return self._said(known)[0].double()

    def maximum(self, known: Sequence[Tensor]) -> Tensor:
        """The answer to a question for a maximum."""
        return self._said(known)[0]

    def scores(self, known: Sequence[Tensor]) -> Iterator[Stack]:
        """What the tensor says to a question of order, flat."""
        yield [score.reshape(-1) for score in self._said(known)]

    def taken(self, known: Sequence[Tensor], edges: Tensor) -> Iterator[order.Taken]:
        """What the tensor says to a question of order, counted against ``edges``."""
        return (order.take(scores, edges.to(self.device)) for scores in self.scores(known))

    def sample(self, known: Sequence[Tensor], count: int) -> Sequence[Tensor]:
        """What about ``count`` scalars from all over the tensor say to the next question."""
        places = order.spread(max(1, count), self.size).to(self.device)
        return [score.reshape(-1).index_select(0, places) for score in self._said(known)]

    def _said(self, known: Sequence[Tensor]) -> Stack:
        said = self._call(known)
        assert isinstance(said, NeedsAnswer), f"{self.method.name} asks of some tensors what it does not of others"
        return said.value

    def _call(self, known: Sequence[Tensor]) -> Tensor | NeedsAnswer:
        """The merged tensor, float32 in the base's shape, or what the method says to its next question."""
        numbers, flags = self.method.handed(self.values, self.device)
        handed = {parameter: self.whole.statistics.get(parameter) for parameter in self.method.statistics}
        origin = self.whole.base.float()
        inputs = [i.float() - origin if self.method.on_deltas else i.float() for i in self.whole.inputs]
        view = PieceView(inputs, origin, known, _Sources(self.whole, self.device), self.whole.base.dim() < 2)
        asking = {"here": view} if self.method.asks else {}
        try:
            merged = self.method.function(inputs, **numbers, **flags, **handed, **asking)
        except NeedsAnswer as asked:
            return asked
        except FloatingPointError as error:
            raise FloatingPointError(f"{self.method.name} of {self.whole.name}: {error}") from error
        return origin + merged if self.method.on_deltas else merged
