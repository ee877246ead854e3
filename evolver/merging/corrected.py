"""A search space whose models go through further merge methods, one after the other, each of which gets one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from evolver.errors import BadInput
from evolver.merging.mergekit import RecipeSpace
from evolver.merging.settings.alternatives import Alternatives
from evolver.merging.settings.genome import Genome
from evolver.records import Choice, Knob
from evolver.records.recipe import Merge, Recipe

RecipeType = TypeVar("RecipeType", bound=Recipe)
# What the names of all dimensions of corrections begin with.
AFTER = "after."


@dataclass(frozen=True)
class Corrected:
    """The models of a space, corrected. A dimension of a correction is called by ``after``, its method and its own
    name, as in ``after.aim.omega``; it counts whatever a point chooses otherwise.

    Args:
        inner: the space of the merges.
        steps: the spaces of the corrections in their order, each over one model; no method is there twice.
    """

    inner: Genome | Alternatives | RecipeSpace
    steps: tuple[Genome, ...]

    @property
    def tune(self) -> tuple[str, ...]:
        """The settings that are tuned."""
        own = [f"{AFTER}{step.method.name}.{name}" for step in self.steps for name in step.tune]
        return (*self.inner.tune, *own)

    @property
    def knobs(self) -> tuple[Knob | Choice, ...]:
        """The dimensions of the merges, and after them those of the corrections."""
        own = [replace(k, name=self._name(step, k.name)) for step in self.steps for k in step.knobs]
        return (*self.inner.knobs, *own)

    @property
    def branches(self) -> Mapping[str, Corrected]:
        """See ``Space``."""
        return {name: replace(self, inner=branch) for name, branch in self.inner.branches.items()}

    def within(self, branch: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Space``: dimensions of corrections have one name in all branches."""
        own = {name: value for name, value in values.items() if name.startswith(AFTER)}
        rest = {name: value for name, value in values.items() if name not in own}
        return {**self.inner.within(branch, rest), **own}

    def decode(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe of a point: the merge, and each correction over what is before it."""
        made = self.inner.decode({k: v for k, v in values.items() if not k.startswith(AFTER)})
        points = [{k.name: values[self._name(step, k.name)] for k in step.knobs} for step in self.steps]
        return corrected(made, self.steps, points)

    def encode(self, recipe: Recipe) -> dict[str, Any] | None:
        """See ``Space``: the corrections are taken off, the last one first."""
        out: dict[str, Any] = {}
        for step in reversed(self.steps):
            if not isinstance(recipe, Merge) or len(recipe.inputs) != 1:
                return None
            found = step.encode(replace(recipe, inputs=step.experts))
            if found is None:
                return None
            out |= self._named(step, found)
            (recipe,) = recipe.inputs
        inner = self.inner.encode(recipe)
        if inner is None:
            return None
        return inner | {knob.name: out[knob.name] for knob in self.knobs if knob.name in out}

    def encode_equal(self, mass: float) -> dict[str, Any]:
        """The equal point of the merges, with the corrections at their defaults."""
        return {**self.inner.encode_equal(mass), **self._defaults()}

    def encode_weights(
        self, names: Sequence[str], weighing: Callable[[Mapping[str, float]], tuple[Sequence[float], float]]
    ) -> dict[str, Any] | None:
        """See ``Genome.encode_weights``, with the corrections at their defaults."""
        found = self.inner.encode_weights(names, weighing) if isinstance(self.inner, Genome) else None
        return None if found is None else {**found, **self._defaults()}

    def axes(self, levels: Callable[[str], int]) -> tuple[tuple[dict[str, Any], ...], ...]:
        """See ``Space``: a setting of a correction is asked for by its name here."""
        out = [*self.inner.axes(levels)]
        for step in self.steps:
            axes = step.axes(lambda name, step=step: levels(self._name(step, name)))  # type: ignore[misc]
            out += [tuple(self._named(step, point) for point in axis) for axis in axes]
        return tuple(out)

    def _defaults(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for step in self.steps:
            given = {k.name: step.method.settings.get(k.name) for k in step.knobs}
            usual = {k: s.default for k, s in given.items() if s is not None and isinstance(s.default, float)}
            out |= self._named(step, {**step.encode_equal(1.0), **usual})
        return out

    def _named(self, step: Genome, point: Mapping[str, Any]) -> dict[str, Any]:
        return {self._name(step, name): value for name, value in point.items()}

    @staticmethod
    def _name(step: Genome, name: str) -> str:
        return f"{AFTER}{step.method.name}.{name}"


def corrected(made: RecipeType, steps: Sequence[Genome], points: Sequence[Mapping[str, Any]]) -> RecipeType | Merge:
    """A model, and each correction over what is before it; every one has a point of its space."""
    found: RecipeType | Merge = made
    for step, point in zip(steps, points, strict=True):
        node = step.decode(point)
        assert isinstance(node, Merge)
        found = replace(node, inputs=(found,))
    return found


def refuse_twice(methods: Sequence[str], place: str) -> None:
    """Raises BadInput, naming ``place``, where one method is to correct twice."""
    for number, name in enumerate(methods):
        if name in methods[:number]:
            raise BadInput(f"{place}[{number}].method: {name} corrects twice; list each method once.")
