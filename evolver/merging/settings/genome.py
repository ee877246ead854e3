"""Between a search space and a recipe: settings × experts × places as named knobs, and values back into rules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evolver.errors import BadInput, nearest
from evolver.merging.methods import Method, Range, Setting, Simplex
from evolver.merging.settings.division import Blend, Division, Groups, division_of
from evolver.merging.settings.placed import fixed_rules
from evolver.records import Choice, Knob
from evolver.records.recipe import Expert, Merge, Place, Recipe, Rule, Statistic

# A weight on the simplex is drawn as e / Σ e with e = -log(u): uniform u then means uniform weights (Dirichlet(1)).
# The ends are cut off so that no weight is exactly 0 or 1.
LOW_U, HIGH_U = 0.001, 0.999
MOST_WEIGHTS = 100_000


@dataclass(frozen=True)
class Genome:
    """What is tuned (``tune``) and what is fixed (``fixed``) of a method, for the whole model or for places of it."""

    method: Method
    experts: tuple[Expert, ...]
    base: Expert
    division: Division
    tune: tuple[str, ...]
    fixed: tuple[Rule, ...]
    statistics: tuple[Statistic, ...] = ()

    @property
    def knobs(self) -> tuple[Knob | Choice, ...]:
        """The search space, in a fixed order: ``setting[expert]@place``."""
        return tuple(knob for suffix in self.division.suffixes for name in self.tune for knob in self._of(name, suffix))

    @property
    def branches(self) -> Mapping[str, Genome]:
        """None: the method is settled."""
        return {}

    def within(self, branch: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Space``: there is no branch."""
        return dict(values)

    def decode(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe that one point of the space stands for."""
        at = {suffix: self._settings(values, suffix) for suffix in self.division.suffixes}
        parts = self.division.parts if self.tune else ()
        tuned = [Rule.of(self._blended(at, blend), place) for place, blend in parts]
        return Merge(self.method.name, self.experts, self.base, (*self.fixed, *tuned), self.statistics)

    def encode(self, recipe: Recipe) -> dict[str, Any] | None:
        """The inverse of ``decode`` up to rounding, as many points stand for the same weights; None for a model that
        the space does not hold.
        """
        if not isinstance(recipe, Merge) or (recipe.method, recipe.inputs) != (self.method.name, self.experts):
            return None
        values = self._tuned_parts(recipe.rules)
        if values is None or any(v.keys() != set(self.tune) for v in values):
            return None
        out: dict[str, Any] = {}
        for name in self.tune:
            unmixed = self.division.unblended([v[name] for v in values])
            if unmixed is None:
                return None
            for suffix, value in unmixed.items():
                out |= self._point(name, suffix, value)
        out = {knob.name: out[knob.name] for knob in self.knobs}
        within = all(isinstance(k, Choice) or k.low <= out[k.name] <= k.high for k in self.knobs)
        return out if within else None

    def _tuned_parts(self, rules: tuple[Rule, ...]) -> list[dict[str, Any]] | None:
        """The tuned settings of every part of the model; None where rules are not made as those of ``decode``, and
        do not say the same of the whole model either.
        """
        count, parts = len(self.fixed), [place for place, _ in self.division.parts] if self.tune else []
        if rules[:count] == self.fixed and [rule.place for rule in rules[count:]] == parts:
            return [dict(rule.values) for rule in rules[count:]]
        if any(rule.place != Place() for rule in (*rules, *self.fixed)):
            return None
        said, fixed = _joined(rules), _joined(self.fixed)
        tuned = {name: said.pop(name) for name in self.tune if name in said}
        return [tuned for _ in parts] if said == fixed else None

    def encode_weights(
        self, names: Sequence[str], weighing: Callable[[Mapping[str, float]], tuple[Sequence[float], float]]
    ) -> dict[str, Any] | None:
        """The point at which every place has the weights and the total mass that a function gives; None where weights
        that sum to 1 are not tuned.

        Args:
            names: of the base's tensors.
            weighing: is given the tensors that take a place's coefficients, with their shares of them.
        """
        simplices = [name for name in self.tune if isinstance(self.method.settings[name].search, Simplex)]
        if not simplices:
            return None
        out = self.encode_equal(1.0)
        masses = {knob.name: knob for knob in self.knobs if isinstance(knob, Knob) and knob.name.startswith("lambda")}
        for suffix, shares in self.division.tensors(names).items():
            weights, mass = weighing(shares)
            for name in simplices:
                out |= self._point(name, suffix, weights)
            if knob := masses.get(f"lambda{suffix}"):
                out[knob.name] = min(max(mass, knob.low), knob.high)
        return out

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

    def axes(self, levels: Callable[[str], int]) -> tuple[tuple[dict[str, Any], ...], ...]:
        """See ``Space``: of a number so many values at equal distances from end to end, of weights all those whose
        parts are multiples of 1 / (levels - 1), and every word.
        """
        return tuple(self._axis(name, suffix, levels(name)) for suffix in self.division.suffixes for name in self.tune)

    def _axis(self, name: str, suffix: str, levels: int) -> tuple[dict[str, Any], ...]:
        if isinstance(self.method.settings[name].search, Simplex):
            return tuple(self._point(name, suffix, weights) for weights in _lattice(len(self.experts), levels - 1))
        (knob,) = self._of(name, suffix)
        if isinstance(knob, Choice):
            return tuple({knob.name: option} for option in knob.options)
        return tuple({knob.name: knob.at(i / (levels - 1) if levels > 1 else 0.5)} for i in range(levels))

    def _of(self, name: str, suffix: str) -> list[Knob | Choice]:
        """The knobs of one setting at one place."""
        setting = self.method.settings[name]
        if isinstance(setting.search, Simplex):
            return [Knob(f"{name}[{e.name}]{suffix}", LOW_U, HIGH_U) for e in self.experts]
        if isinstance(setting.search, Range):
            return [Knob(f"{name}{suffix}", setting.search.low, setting.search.high, setting.search.log)]
        return [Choice(f"{name}{suffix}", setting.options)]

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

    def _settings(self, values: Mapping[str, Any], suffix: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name in self.tune:
            if isinstance(self.method.settings[name].search, Simplex):
                e = [-math.log(values[f"{name}[{x.name}]{suffix}"]) for x in self.experts]
                out[name] = tuple(v / math.fsum(e) for v in e)
            else:
                out[name] = values[f"{name}{suffix}"]
        return out

    def _blended(self, at: Mapping[str, Mapping[str, Any]], blend: Blend) -> dict[str, Any]:
        """The settings of a part of the model, given those of its places. Numbers are interpolated; a word holds from
        its knot to the next.
        """
        out = dict(at[blend[0][0]])
        for name in self.tune if len(blend) > 1 else ():
            if isinstance(self.method.settings[name].search, Simplex):
                columns = zip(*([share * v for v in at[suffix][name]] for suffix, share in blend), strict=True)
                out[name] = tuple(math.fsum(column) for column in columns)
            elif self.method.settings[name].search is not None:
                out[name] = math.fsum(share * at[suffix][name] for suffix, share in blend)
        return out


def _joined(rules: Sequence[Rule]) -> dict[str, Any]:
    """The settings of rules for the whole model, of which the last one counts."""
    return {name: value for rule in rules for name, value in rule.values}


def _lattice(experts: int, parts: int) -> list[tuple[float, ...]]:
    """All weights of so many experts that are multiples of 1 / parts and sum to 1 (a simplex lattice, Scheffé 1958);
    with no parts, equal weights alone.

    Raises BadInput where they are too many to be listed.
    """
    if parts < 1:
        return [(1.0 / experts,) * experts]
    if (count := math.comb(parts + experts - 1, experts - 1)) > MOST_WEIGHTS:
        raise BadInput(
            f"search.levels: weights of {experts} experts in steps of 1/{parts} are {count} combinations; write fewer "
            "levels."
        )
    out = []
    for bars in itertools.combinations(range(parts + experts - 1), experts - 1):
        ends = itertools.pairwise((-1, *bars, parts + experts - 1))
        out.append(tuple((b - a - 1) / parts for a, b in ends))
    return out


def genome(
    method: Method,
    experts: Sequence[Expert],
    base: Expert,
    names: Sequence[str],
    groups: Groups,
    tune: Sequence[str] | None,
    settings: Mapping[str, Any],
    place: str,
    statistics: tuple[Statistic, ...] = (),
    classes: bool = False,
    knots: int | None = None,
    fixed_alone: bool = False,
) -> Genome:
    """A genome, checked. Without ``tune``, total mass, simplex weights and what has no default are tuned; of a method
    that has none of these, all of its numbers.

    Args:
        names: of the base's tensors.
        settings: those that stay fixed, in the forms of ``placed``.
        statistics: that the method asks for.
        groups, classes, knots: see ``division_of``.
        fixed_alone: whether there may be nothing to tune.

    Raises BadInput that names ``place``.
    """
    chosen = _tuned(method, tune, settings, place)
    if not (chosen or fixed_alone):
        raise BadInput(f"{place}.method: {method.name} has nothing to tune; choose task_arithmetic, ties or another.")
    division = division_of(names, groups, classes, knots, place)
    examples = {n: _example(method.settings[n]) for n in chosen}
    fixed = fixed_rules(method, settings, [e.name for e in experts], names, f"{place}.settings", examples)
    return Genome(method, tuple(experts), base, division, chosen, fixed, statistics)


def _tuned(method: Method, tune: Sequence[str] | None, settings: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """The names of the settings that are tuned; raises BadInput that names ``place``."""
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
    return tuple(tune)


def _example(setting: Setting) -> bool | float | str:
    """A valid value of a setting that a search will choose."""
    if setting.options:
        return setting.options[0]
    return setting.search.low if isinstance(setting.search, Range) else 1.0
