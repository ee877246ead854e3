"""The space of layer swapping: a source for each layer, or for each group of layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from evolver.records import Choice, Knob
from evolver.records.recipe import Recipe
from evolver.search.programs.sources import MERGE, Sources, Unbranched, taken_apart, whole_or_program

# Of 32 layers, how many at the bottom and at the top the paper takes from the outer model.
PUBLISHED_DEPTH, BOTTOM, TOP = 32, 5, 2
SOURCE_OUTSIDE = "source@outside"


def groups_of(depth: int, count: int) -> list[tuple[str, range]]:
    """So many groups of neighbouring layers, as equal as possible, each with its name, such as ``0-3``."""
    bounds = itertools.pairwise(round(g * depth / count) for g in range(count + 1))
    return [(f"{start}-{end - 1}", range(start, end)) for start, end in bounds]


@dataclass(frozen=True)
class Swap(Unbranched):
    """For every group of layers, and for what lies outside the layers, one of the sources (a choice each).

    Attributes:
        groups: the number of groups.
        ends: the source of what lies outside the layers; None: it is searched, too.
    """

    sources: Sources
    groups: int
    ends: str | None

    @property
    def knobs(self) -> tuple[Knob | Choice, ...]:
        places = [f"source@{name}" for name, _ in groups_of(self.sources.depth, self.groups)]
        outside = [] if self.ends else [SOURCE_OUTSIDE]
        return (*self.sources.knobs, *(Choice(place, self.sources.names) for place in (*outside, *places)))

    def decode(self, values: Mapping[str, Any]) -> Recipe:
        models = self.sources.at(values)
        groups = groups_of(self.sources.depth, self.groups)
        layers = [(models[values[f"source@{name}"]], layer) for name, span in groups for layer in span]
        return whole_or_program(layers, models[self.ends or values[SOURCE_OUTSIDE]], self.sources.depth)

    def encode(self, recipe: Recipe) -> dict[str, Any] | None:
        parts = taken_apart(recipe, self.sources.depth)
        if parts is None or [layer for _, layer in parts[0]] != list(range(self.sources.depth)):
            return None
        layers, outer = parts
        coefficients = self.sources.coefficients([outer, *(model for model, _ in layers)])
        if coefficients is None:
            return None
        found: dict[str, Any] = {}
        for name, span in groups_of(self.sources.depth, self.groups):
            models = {self.sources.name(layers[layer][0]) for layer in span}
            found[f"source@{name}"] = models.pop() if len(models) == 1 else None
        own = self.sources.name(outer)
        if None in (own, *found.values()) or own != (self.ends or own):
            return None
        return {**coefficients, **({} if self.ends else {SOURCE_OUTSIDE: own}), **found}

    def encode_equal(self, mass: float) -> dict[str, Any]:
        """The merge with equal weights, if it is a source; else the published program: a body of one expert within the
        layers of another one.
        """
        return {**self.sources.equal(mass), **dict(self._first())}

    def _first(self) -> Iterator[tuple[str, str]]:
        depth, names = self.sources.depth, self.sources.names
        outer, body = (MERGE, MERGE) if MERGE in names else (self.ends or names[0], next(self._others(), names[0]))
        if not self.ends:
            yield SOURCE_OUTSIDE, outer
        bottom, top = (max(1, round(count * depth / PUBLISHED_DEPTH)) for count in (BOTTOM, TOP))
        for name, span in groups_of(depth, self.groups):
            within = bottom <= (span[0] + span[-1]) / 2 < depth - top
            yield f"source@{name}", body if within else outer

    def _others(self) -> Iterator[str]:
        return (name for name in self.sources.names if name != (self.ends or self.sources.names[0]))
