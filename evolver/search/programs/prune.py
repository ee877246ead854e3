"""GPTailor's space: how many layers go, which ones, and from which experts each of the others is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evolver.records import Choice, Knob
from evolver.records.recipe import Recipe
from evolver.search.programs.sources import Sources, Unbranched, blended, taken_apart, whole_or_program
from evolver.search.programs.swap import groups_of

CHOSEN = 0.5  # a source is among those of a layer if its number is not below


@dataclass(frozen=True)
class Prune(Unbranched):
    """Removes the layers of the lowest priorities, and makes the others from the sources that are chosen for their
    group: from several by task arithmetic with a scale of the group, from one as it is, and from none the base's.

    Each layer that may go has a priority, and one number says how many go, so that every point is a valid program.
    With a single source there is nothing to choose, and all layers are that source's.

    Attributes:
        groups: the number of groups of layers that are made from the same sources.
        ends: the source of what lies outside the layers.
        least, most: how many layers are removed.
        protect: the number of layers at each end that stay.
    """

    sources: Sources
    groups: int
    ends: str
    least: int
    most: int
    protect: int

    @property
    def knobs(self) -> tuple[Knob | Choice, ...]:
        own = [Knob("removed", self.least, self.most + 1)] if self.least < self.most else []
        own += [Knob(f"priority@{layer}", 0.0, 1.0) for layer in self._free()]
        if self._chooses:
            for name, _ in groups_of(self.sources.depth, self.groups):
                own += [Knob(f"chosen[{source}]@{name}", 0.0, 1.0) for source in self.sources.names]
                own.append(Knob(f"scale@{name}", 0.0, 1.0))
        return (*self.sources.knobs, *own)

    def decode(self, values: Mapping[str, Any]) -> Recipe:
        models, layers = self.sources.at(values), list[tuple[Recipe, int]]()
        gone = self._removed(values)
        for name, span in groups_of(self.sources.depth, self.groups):
            made = self._made(models, values, name)
            layers += [(made, layer) for layer in span if layer not in gone]
        return whole_or_program(layers, models[self.ends], self.sources.depth)

    def encode(self, recipe: Recipe) -> dict[str, Any] | None:
        parts = taken_apart(recipe, self.sources.depth)
        if parts is None or self.sources.name(parts[1]) != self.ends:
            return None
        layers, outer = {layer: model for model, layer in parts[0]}, parts[1]
        kept, gone = [layer for _, layer in parts[0]], set(range(self.sources.depth)) - layers.keys()
        if kept != sorted(layers) or not self.least <= len(gone) <= self.most or gone - set(self._free()):
            return None
        used = [m for model in layers.values() for m in (blended(model) or ((model,), 0.0))[0]]
        found = self.sources.coefficients([outer, *layers.values(), *used])
        if found is None:
            return None
        found |= {"removed": len(gone) + 0.5} if self.least < self.most else {}
        found |= {f"priority@{layer}": 0.0 if layer in gone else 1.0 for layer in self._free()}
        for name, span in groups_of(self.sources.depth, self.groups):
            choice = self._choice([layers[layer] for layer in span if layer in layers], name)
            if choice is None:
                return None
            found |= choice
        return found

    def encode_equal(self, mass: float) -> dict[str, Any]:
        """All layers from all sources, with equal weights, without the last layers that may go: the later a layer, the
        lower its priority, as in the first of the paper's three ways to begin.
        """
        found = self.sources.equal(mass)
        found |= {"removed": self.most + 0.5} if self.least < self.most else {}
        found |= {f"priority@{layer}": 1 - layer / self.sources.depth for layer in self._free()}
        for name, _ in groups_of(self.sources.depth, self.groups):
            found |= self._numbers(name, self.sources.names, mass / len(self.sources.names))
        return found

    @property
    def _chooses(self) -> bool:
        return len(self.sources.names) > 1

    def _free(self) -> range:
        return range(self.protect, self.sources.depth - self.protect)

    def _removed(self, values: Mapping[str, Any]) -> set[int]:
        count = min(self.most, math.floor(values["removed"])) if self.least < self.most else self.least
        return set(sorted(self._free(), key=lambda layer: (values[f"priority@{layer}"], -layer))[:count])

    def _made(self, models: Mapping[str, Recipe], values: Mapping[str, Any], group: str) -> Recipe:
        """The model that the layers of a group are taken from."""
        if not self._chooses:
            return models[self.sources.names[0]]
        chosen = [model for name, model in models.items() if values[f"chosen[{name}]@{group}"] >= CHOSEN]
        if len(chosen) < 2:
            return chosen[0] if chosen else self.sources.base
        return self.sources.blend(chosen, values[f"scale@{group}"])

    def _numbers(self, group: str, names: Sequence[str], scale: float) -> dict[str, Any]:
        """The numbers of a group that is made from these sources."""
        if not self._chooses:
            return {}
        chosen = {f"chosen[{name}]@{group}": 0.75 if name in names else 0.25 for name in self.sources.names}
        return {**chosen, f"scale@{group}": min(max(scale, 0.0), 1.0)}

    def _choice(self, models: Sequence[Recipe], group: str) -> dict[str, Any] | None:
        """The numbers of a group whose layers are taken from these models; None where no numbers give them."""
        even, made = 1 / len(self.sources.names), {model.id: model for model in models}
        if not made:  # no layer of the group is left, so its numbers do not matter
            return self._numbers(group, self.sources.names, even)
        model = next(iter(made.values()))
        if len(made) > 1 or (not self._chooses and self.sources.name(model) is None):
            return None
        if (name := self.sources.name(model)) is not None:
            return self._numbers(group, [name], even)
        if model.id == self.sources.base.id:
            return self._numbers(group, [], even)
        inputs, scale = blended(model) or ((), 0.0)
        names = [name for m in inputs if (name := self.sources.name(m)) is not None]
        whole = len(names) == len(inputs) > 1 and self.sources.blend(inputs, scale).id == model.id
        return self._numbers(group, names, scale) if whole and 0 <= scale <= 1 else None
