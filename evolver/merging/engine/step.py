"""One call of a merge method on a piece of a tensor, and what hands it what it asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evolver.kernels.compiled import identity_of
from evolver.kernels.machine import digest_of
from evolver.merging.methods import Method
from evolver.merging.methods.here import NeedsAnswer, PieceSource, PieceView, Stack


@dataclass(frozen=True)
class Step:
    """One call of a method on a piece, as a function of nothing but tensors: what a kernel is made of.

    Its arguments, in order: E inputs, the base, answers, numbers by name, draws of E inputs, what is made once a piece,
    the depth, and the piece of the merged tensor to write to.
    """

    method: Method
    flags: Mapping[str, Any]
    experts: int
    known: int
    numbers: tuple[str, ...]
    draws: int
    made: int
    depth: bool
    vector: bool
    merges: bool

    def __call__(self, *tensors: Tensor, sources: PieceSource | None = None) -> tuple[Tensor, ...]:
        """Writes the merged piece, in its dtype; or returns what the piece says to the next question.

        ``sources`` know the depth and make the rest; without them all that is among the tensors.
        """
        try:
            merged = self.merged(tensors, sources)
        except NeedsAnswer as asked:
            return tuple(asked.value)
        tensors[-1].copy_(merged)
        return ()

    def merged(self, tensors: Sequence[Tensor], sources: PieceSource | None = None) -> Tensor:
        """The merged piece, float32. Raises Asked for what the method has to know first."""
        rest = iter(tensors)
        inputs, base = [next(rest).float() for _ in range(self.experts)], next(rest)
        known = [next(rest) for _ in range(self.known)]
        numbers = {n: next(rest) for n in self.numbers}
        handed = sources or Given(
            [next(rest) for _ in range(self.draws)],
            [next(rest) for _ in range(self.made)],
            next(rest) if self.depth else None,
        )
        origin = base.float()
        if self.method.on_deltas:
            inputs = [i - origin for i in inputs]
        here = PieceView(inputs, origin, known, handed, self.vector)
        given = {**numbers, **self.flags, **({"here": here} if self.method.asks else {})}
        merged = self.method.function(inputs, **given)
        return origin + merged if self.method.on_deltas else merged

    @property
    def identity(self) -> str:
        """What a kernel is specialised on."""
        flags = {k: v for k, v in self.flags.items() if k != "seed"}  # draws are handed in
        fixed = {k: v for k, v in vars(self).items() if k not in ("method", "flags")}
        code = digest_of(inspect.getfile(self.method.function))
        return identity_of(method=self.method.name, code=code, flags=sorted(flags.items()), **fixed)


@dataclass
class Given:
    """What a kernel is handed."""

    given: Stack
    made: Stack
    place: Tensor | None

    def depth(self) -> Tensor | None:
        return self.place

    def draws(self, _: int) -> Stack:
        return self.given

    def once(self, _: Callable[[], Stack]) -> Stack:
        return self.made


@dataclass
class Probe:
    """Stands in where a method is called to see what it asks for: draws nothing, and takes notes."""

    zeros: Stack
    place: Tensor | None
    drawn: int = 0
    deep: bool = False
    made: Sequence[torch.dtype] = ()

    def depth(self) -> Tensor | None:
        self.deep = self.place is not None
        return self.place

    def draws(self, _: int) -> Stack:
        self.drawn = len(self.zeros)
        return self.zeros

    def once(self, make: Callable[[], Stack]) -> Stack:
        made = make()
        self.drawn, self.made = 0, [m.dtype for m in made]  # draws were for what is made
        return made
