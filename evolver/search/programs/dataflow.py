"""The data-flow space of Sakana AI: all layers of all sources in a row, several times, and which of them are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evolver.records import Choice, Knob
from evolver.records.recipe import Recipe
from evolver.search.programs.sources import Sources, Unbranched, taken_apart, whole_or_program

ON, OFF = 0.5, -0.5  # the numbers of slots that are used, and of those that are not, where a point is made


@dataclass(frozen=True)
class DataFlow(Unbranched):
    """Slot t of r·M slots holds layer t mod M of the row of M layers, and is used where its indicator is above 0.

    The row consists of the layers of the first source, then those of the second one, and so on, without the protected
    layers at their ends. The protected layers of the outer model stand before and behind the slots.

    Attributes:
        ends: the outer model, from which also comes what lies outside the layers.
        repeats: r, how often the row comes.
        most: the most layers of a model; of more slots with an indicator above 0, those with the highest are used.
        protect: the number of layers at each end of the sources that are no slots.
    """

    sources: Sources
    ends: str
    repeats: int
    most: int
    protect: int

    @property
    def knobs(self) -> tuple[Knob | Choice, ...]:
        return (*self.sources.knobs, *(Knob(self._name(slot), -1.0, 1.0) for slot in range(len(self._slots))))

    def decode(self, values: Mapping[str, Any]) -> Recipe:
        models, slots, depth = self.sources.at(values), self._slots, self.sources.depth
        numbers = [values[self._name(slot)] for slot in range(len(slots))]
        highest = sorted(range(len(slots)), key=lambda slot: (-numbers[slot], slot))[: self.most - 2 * self.protect]
        used = [slot for slot in sorted(highest) if numbers[slot] > 0]
        if not used and not self.protect:  # a model has at least one layer
            used = highest[:1]
        outer = [(self.ends, layer) for layer in range(depth)]
        row = [*outer[: self.protect], *(slots[slot] for slot in used), *outer[depth - self.protect :]]
        return whole_or_program([(models[name], layer) for name, layer in row], models[self.ends], depth)

    def encode(self, recipe: Recipe) -> dict[str, Any] | None:
        parts = taken_apart(recipe, self.sources.depth)
        if parts is None or len(parts[0]) > self.most:
            return None
        layers, outer = parts
        coefficients = self.sources.coefficients([outer, *(model for model, _ in layers)])
        names = [(self.sources.name(model), layer) for model, layer in layers]
        edge, depth = [(self.ends, layer) for layer in range(self.sources.depth)], self.sources.depth
        inner = names[self.protect : len(names) - self.protect]
        whole = [*edge[: self.protect], *inner, *edge[depth - self.protect :]]
        if coefficients is None or self.sources.name(outer) != self.ends or whole != names:
            return None
        used = self._places(inner)
        return None if used is None else {**coefficients, **self._numbers(used)}

    def encode_equal(self, mass: float) -> dict[str, Any]:
        """The outer model as it is: its own layers are used once, and nothing else."""
        once = [slot for slot, (name, _) in enumerate(self._slots) if name == self.ends]
        return {**self.sources.equal(mass), **self._numbers(once[: self.sources.depth - 2 * self.protect])}

    @cached_property
    def _slots(self) -> list[tuple[str, int]]:
        inner = range(self.protect, self.sources.depth - self.protect)
        return [(name, layer) for name in self.sources.names for layer in inner] * self.repeats

    def _name(self, slot: int) -> str:
        """Such as ``used[maths:7]@2`` for the second time that the row comes."""
        name, layer = self._slots[slot]
        return f"used[{name}:{layer}]@{slot * self.repeats // len(self._slots) + 1}"

    def _numbers(self, used: Sequence[int]) -> dict[str, Any]:
        wanted = set(used)
        return {self._name(slot): ON if slot in wanted else OFF for slot in range(len(self._slots))}

    def _places(self, layers: Sequence[tuple[str | None, int]]) -> list[int] | None:
        """The first slots that hold these layers in this order; None where they do not fit."""
        slots, out, at = self._slots, list[int](), 0
        for layer in layers:
            while at < len(slots) and slots[at] != layer:
                at += 1
            if at == len(slots):
                return None
            out.append(at)
            at += 1
        return out
