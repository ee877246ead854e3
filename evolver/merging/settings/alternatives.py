"""A search space in which the merge method itself is a choice: beside it, each method has the settings of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from evolver.merging.settings.genome import Genome
from evolver.records import Choice, Knob
from evolver.records.recipe import Merge, Recipe

_METHOD = "method"


@dataclass(frozen=True)
class Alternatives:
    """The spaces of several methods as one. A knob of a method is called by its name and the method's before it, as in
    ``ties.density@0-2``, because the same word means another thing, or has another range, in another method.
    """

    branches: Mapping[str, Genome]

    @property
    def tune(self) -> tuple[str, ...]:
        """The settings that are tuned of any of the methods."""
        return tuple(dict.fromkeys(name for branch in self.branches.values() for name in branch.tune))

    @property
    def knobs(self) -> tuple[Knob | Choice, ...]:
        """The method, and after it the dimensions of all of them, of which those of one method count at a point."""
        own = (self.within(m, {k.name: k for k in branch.knobs}) for m, branch in self.branches.items())
        named = [replace(knob, name=name) for found in own for name, knob in found.items() if name != _METHOD]
        return (Choice(_METHOD, tuple(self.branches)), *named)

    def within(self, branch: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Space``: the method, and what belongs to the dimensions of its space under their names here."""
        return {_METHOD: branch, **{f"{branch}.{name}": value for name, value in values.items()}}

    def decode(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe of a point. Values of methods that the point does not choose are ignored."""
        branch = self.branches[values[_METHOD]]
        return branch.decode({k.name: values[f"{values[_METHOD]}.{k.name}"] for k in branch.knobs})

    def encode(self, recipe: Recipe) -> dict[str, Any] | None:
        """See ``Genome.encode``; the point has the dimensions of the recipe's method only."""
        if not isinstance(recipe, Merge) or recipe.method not in self.branches:
            return None
        found = self.branches[recipe.method].encode(recipe)
        return None if found is None else self.within(recipe.method, found)

    def encode_equal(self, mass: float) -> dict[str, Any]:
        """The first method with equal weights; the dimensions of the others stand at their equal weights, too."""
        out: dict[str, Any] = {}
        for name, branch in self.branches.items():
            out |= self.within(name, branch.encode_equal(mass))
        return {**out, _METHOD: next(iter(self.branches))}

    def axes(self, levels: Callable[[str], int]) -> tuple[tuple[dict[str, Any], ...], ...]:
        """There are none: no grid spans dimensions of which only a part counts. Each branch has its own."""
        raise NotImplementedError("ask the branches for their axes")
