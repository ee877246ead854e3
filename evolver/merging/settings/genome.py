"""Between a search space and a recipe: settings × experts × layer groups as named knobs, and values back into rules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evolver.errors import BadInput, nearest
from evolver.merging.methods import Method, Range, Setting, Simplex
from evolver.merging.settings.placed import fixed_rules
from evolver.records import Choice, Knob
from evolver.records.recipe import Expert, Merge, Place, Recipe, Rule, Statistic, layer_of

# A weight on the simplex is drawn as e / Σ e with e = -log(u): uniform u then means uniform weights (Dirichlet(1)).
# The ends are cut off so that no weight is exactly 0 or 1.
LOW_U, HIGH_U = 0.001, 0.999


@dataclass(frozen=True)
class Genome:
    """What is tuned (``tune``) and what is fixed (``fixed``) of a method, for the whole model or for layer groups."""

    method: Method
    experts: tuple[Expert, ...]
    base: Expert
    layers: int
    groups: int
    tune: tuple[str, ...]
    fixed: tuple[Rule, ...]
    statistics: tuple[Statistic, ...] = ()

    @property
    def knobs(self) -> tuple[Knob | Choice, ...]:
        """The search space, in a fixed order: ``setting[expert]@group``."""
        out: list[Knob | Choice] = []
        for suffix, _ in self._places():
            for name in self.tune:
                search = self.method.settings[name].search
                if isinstance(search, Simplex):
                    out += [Knob(f"{name}[{e.name}]{suffix}", LOW_U, HIGH_U) for e in self.experts]
                elif isinstance(search, Range):
                    out.append(Knob(f"{name}{suffix}", search.low, search.high, search.log))
                else:
                    out.append(Choice(f"{name}{suffix}", self.method.settings[name].options))
        return tuple(out)

    def decode(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe that one point of the space stands for."""
        tuned = [Rule.of(self._settings(values, suffix), place) for suffix, place in self._places()]
        return Merge(self.method.name, self.experts, self.base, (*self.fixed, *tuned), self.statistics)

    def encode(self, recipe: Recipe) -> dict[str, Any] | None:
        """The inverse of ``decode`` up to rounding, as many points stand for the same weights; None for a model that
        the space does not hold.
        """
        places = self._places()
        count = len(self.fixed)
        if not isinstance(recipe, Merge) or (recipe.method, recipe.inputs) != (self.method.name, self.experts):
            return None
        tuned = recipe.rules[count:]
        if recipe.rules[:count] != self.fixed or [r.place for r in tuned] != [place for _, place in places]:
            return None
        out: dict[str, Any] = {}
        for (suffix, _), rule in zip(places, tuned, strict=True):
            values = dict(rule.values)
            if values.keys() != set(self.tune):
                return None
            for name in self.tune:
                out |= self._point(name, suffix, values[name])
        within = all(isinstance(k, Choice) or k.low <= out[k.name] <= k.high for k in self.knobs)
        return out if within else None

    def _point(self, name: str, suffix: str, value: Any) -> dict[str, Any]:
        """The values of the knobs of one setting. The numbers behind weights are chosen so that their mean is 1, the
        mean of those that a search draws.
        """
        if not isinstance(self.method.settings[name].search, Simplex):
            return {f"{name}{suffix}": value}
        total = math.fsum(value) or 1.0
        numbers = [math.exp(-len(value) * v / total) for v in value]
        names = [f"{name}[{e.name}]{suffix}" for e in self.experts]
        return {n: min(max(u, LOW_U), HIGH_U) for n, u in zip(names, numbers, strict=True)}

    def encode_equal(self, mass: float) -> dict[str, Any]:
        """The point with equal weights, what is chosen at its default and, where it is tuned, the given total mass: a
        start for searches.
        """
        out: dict[str, Any] = {}
        for knob in self.knobs:
            if isinstance(knob, Choice):
                out[knob.name] = self.method.settings[knob.name.partition("@")[0]].default
                continue
            middle = math.sqrt(knob.low * knob.high) if knob.log else 0.5 * (knob.low + knob.high)
            out[knob.name] = min(max(mass, knob.low), knob.high) if knob.name.startswith("lambda") else middle
        return out

    def _settings(self, values: Mapping[str, Any], suffix: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name in self.tune:
            if isinstance(self.method.settings[name].search, Simplex):
                e = [-math.log(values[f"{name}[{x.name}]{suffix}"]) for x in self.experts]
                out[name] = tuple(v / math.fsum(e) for v in e)
            else:
                out[name] = values[f"{name}{suffix}"]
        return out

    def _places(self) -> list[tuple[str, Place]]:
        if self.groups == 1:
            return [("", Place())]
        bounds = [round(g * self.layers / self.groups) for g in range(self.groups + 1)]
        ranges = list(itertools.pairwise(bounds))
        return [("@outside", Place(outside=True))] + [(f"@{a}-{b - 1}", Place((a, b))) for a, b in ranges]


def genome(
    method: Method,
    experts: Sequence[Expert],
    base: Expert,
    names: Sequence[str],
    groups: int,
    tune: Sequence[str] | None,
    settings: Mapping[str, Any],
    place: str,
    statistics: tuple[Statistic, ...] = (),
) -> Genome:
    """A genome, checked. Without ``tune``, total mass, simplex weights and what has no default are tuned; of a method
    that has none of these, all of its numbers.

    Args:
        names: of the base's tensors.
        settings: those that stay fixed, in the forms of ``placed``.
        statistics: that the method asks for.

    Raises BadInput that names ``place``.
    """
    layers = 1 + max((layer_of(n) or 0 for n in names), default=0)
    searchable = {n for n, s in method.settings.items() if s.search is not None or s.options}
    if tune is None:
        needed = [n for n, s in method.settings.items() if s.required and n not in settings]
        usual = [n for n in ("lambda", "weight", *needed) if n in searchable]
        tune = usual or [n for n, s in method.settings.items() if s.search is not None and n not in settings]
    for name in tune:
        if name not in searchable:
            raise BadInput(
                f"{place}.tune: {method.name} has nothing to tune called {name!r}; {nearest(name, searchable)}"
            )
        if name in settings:
            raise BadInput(f"{place}.settings.{name}: {name} is tuned; remove it here or in {place}.tune.")
    if len(set(tune)) < len(tune):
        raise BadInput(f"{place}.tune: a setting is listed twice; list each setting once.")
    if not tune:
        raise BadInput(f"{place}.method: {method.name} has nothing to tune; choose task_arithmetic, ties or another.")
    if not 1 <= groups <= layers:
        raise BadInput(f"{place}.layer_groups: {groups} groups of {layers} layers; write a number from 1 to {layers}.")
    examples = {n: _example(method.settings[n]) for n in tune}
    fixed = fixed_rules(method, settings, [e.name for e in experts], names, f"{place}.settings", examples)
    return Genome(method, tuple(experts), base, layers, groups, tuple(tune), fixed, statistics)


def _example(setting: Setting) -> bool | float | str:
    """A valid value of a setting that a search will choose."""
    if setting.options:
        return setting.options[0]
    return setting.search.low if isinstance(setting.search, Range) else 1.0
