"""The making half, as the searches see it: search spaces and mergers, by the names of their methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from evolver.config.corrections import AfterSettings
from evolver.config.reading import check_section
from evolver.config.recipes import RECIPE_KEY, recipe_text
from evolver.errors import BadInput, nearest
from evolver.evaluation.collectors import collector_named
from evolver.merging import methods
from evolver.merging.corrected import Corrected, corrected, refuse_twice
from evolver.merging.mergekit import RecipeSpace, recipe_space
from evolver.merging.settings.adapted import adapted
from evolver.merging.settings.alternatives import Alternatives
from evolver.merging.settings.crossover import one_point
from evolver.merging.settings.division import Groups
from evolver.merging.settings.genome import Genome, genome
from evolver.merging.settings.placed import fixed_rules
from evolver.records import Knob
from evolver.records.recipe import Cross, Expert, Merge, Recipe, Rule, Statistic, layer_of

SpaceType = TypeVar("SpaceType", bound=Genome | Alternatives | RecipeSpace)


class RecipeMaker:
    """Makes recipes of a run's experts for a search.

    Args:
        experts: their names.
        tensors: the names of the base's tensors.
        digests: of the base and the experts, by name; without them, names stand for them.
        sampled: the hash of the items that an expert's statistics are collected on, by the statistic's kind and the
            expert's name; raises BadInput where none can be. Without it, a word stands for every hash.
        sizes: the number of scalars of every tensor; without it, all tensors count as equally large.
        counted: counts the layers, see ``depth``. Without it, the names say the number.
        places: where base and experts are, by name; without it, their names stand for them.
        seed: of merge methods in a mergekit file that draw at random.
        own: an offspring has statistics of its own, instead of those of the expert in whose place it stands.
        shapes: of the floating tensors, by name; without it, all tensors are single numbers.
        changes: measures the experts' task vectors, see ``Maker``; without it, all changes count as equally large.
        passes: how often statistics of a merge of the models are collected, each time on the merge of the pass before.
    """

    def __init__(
        self, experts: Sequence[str], tensors: Sequence[str], digests: dict[str, str] | None = None,
        sampled: Callable[[str, str], str] = lambda *_: "items", sizes: Mapping[str, int] | None = None,
        counted: Callable[[bool], int] | None = None, places: Mapping[str, str] | None = None, seed: int = 0,
        own: bool = False, shapes: Mapping[str, tuple[int, ...]] | None = None,
        changes: Callable[[], Mapping[str, tuple[float, ...]]] | None = None, passes: int = 1,
    ) -> None:  # fmt: skip
        self.digests = digests or {n: n for n in ("base", *experts)}
        self.base = Expert("base", self.digests["base"])
        self.experts = tuple(Expert(n, self.digests[n]) for n in experts)
        self._names, self._sampled, self._counted = list(tensors), sampled, counted
        self._own, self._passes = own, passes
        self.shapes = dict.fromkeys(self._names, (1,)) if shapes is None else shapes
        self.changes = changes or (lambda: {name: (1.0,) * len(self.experts) for name in self.shapes})
        self._places, self._seed = places or {n: n for n in self.digests}, seed
        self._sizes = dict.fromkeys(self._names, 1) if sizes is None else {n: sizes[n] for n in self._names}

    def space(
        self, method: str | Sequence[str], groups: Groups, tune: Sequence[str] | None, settings: Mapping[str, Any],
        classes: bool = False, knots: int | None = None, after: Sequence[AfterSettings] = (),
    ) -> Genome | Alternatives | Corrected:  # fmt: skip
        return self._corrected(self._space(method, groups, tune, settings, classes, knots), after)

    def _space(
        self, method: str | Sequence[str], groups: Groups, tune: Sequence[str] | None, settings: Mapping[str, Any],
        classes: bool, knots: int | None,
    ) -> Genome | Alternatives:  # fmt: skip
        """See ``space``: without corrections."""
        if isinstance(method, str):
            return self._space_of(method, groups, tune, settings, classes, knots)
        several = {name: methods.get(name, "search.method") for name in method}
        if len(several) < len(method):
            raise BadInput("search.method: a method is listed twice; list each method once.")
        known = {name for found in several.values() for name in found.settings}
        for name in (*(tune or ()), *settings):
            if name not in known:
                raise BadInput(f"search: none of the methods has a setting called {name!r}; {nearest(name, known)}")
        branches = {}
        for name, found in several.items():  # each method takes what it knows of what is given for all of them
            own = None if tune is None else [n for n in tune if n in found.settings]
            fixed = {n: v for n, v in settings.items() if n in found.settings}
            branches[name] = self._space_of(name, groups, own, fixed, classes, knots)
        return branches[method[0]] if len(method) == 1 else Alternatives(branches)

    def space_in(self, recipe: Any, after: Sequence[AfterSettings] = ()) -> RecipeSpace | Corrected:
        nodes = {self._places[node.name]: node for node in (self.base, *self.experts)}
        base, key = self._places["base"], f"search.{RECIPE_KEY}"
        found = recipe_space(recipe_text(recipe, key), self._names, nodes, base, key, self._seed)
        return self._corrected(found, after)

    def _corrected(self, space: SpaceType, after: Sequence[AfterSettings]) -> SpaceType | Corrected:
        """The space, or where there are corrections, that of the corrected models."""
        steps = self._corrections(after, "search.after")
        return Corrected(space, steps) if steps else space

    def _fixed_corrections(self, given: Any, place: str) -> tuple[Genome, ...]:
        """Those of a merger, of which nothing is tuned. Raises BadInput that names ``place``."""
        if not isinstance(given, list) or not all(isinstance(step, dict) for step in given):
            raise BadInput(f"{place}: {given!r} is no list of corrections; write one such as [{{method: aim}}].")
        steps = [check_section(AfterSettings, step, f"{place}[{n}]") for n, step in enumerate(given)]
        for number, step in enumerate(steps):
            if step.tune:
                raise BadInput(
                    f"{place}[{number}].tune: of the corrections of a merger, nothing is tuned; leave tune out, and "
                    "write numbers under settings."
                )
        return self._corrections([step.model_copy(update={"tune": []}) for step in steps], place)

    def _corrections(self, after: Sequence[AfterSettings], place: str) -> tuple[Genome, ...]:
        refuse_twice([step.method for step in after], place)
        return tuple(self._correction(step, f"{place}[{n}]") for n, step in enumerate(after))

    def _correction(self, step: AfterSettings, place: str) -> Genome:
        """The space of one correction, over a model that stands for the merge."""
        found, merge = methods.get(step.method, f"{place}.method"), Expert("merge", "merge")
        if own := [of.statistic for of in found.statistics.values() if not of.base]:
            raise BadInput(
                f"{place}.method: {found.name} needs statistics of the model that it gets ({', '.join(own)}), which "
                "are collected of experts only; write it under search.method."
            )
        statistics = self.statistics_of(found, self.experts)
        numbers = [n for n, s in found.settings.items() if isinstance(s.search, methods.Range) and n != "lambda"]
        tune = [n for n in numbers if n not in step.settings] if step.tune is None else step.tune
        given = (tune, step.settings, place, statistics)
        return genome(found, [merge], self.base, self._names, 1, *given, fixed_alone=True)

    def _space_of(
        self, method: str, groups: Groups, tune: Sequence[str] | None, settings: Mapping[str, Any], classes: bool,
        knots: int | None,
    ) -> Genome:  # fmt: skip
        found = methods.get(method, "search.method")
        return genome(
            found, self.experts, self.base, self._names, groups, tune, settings, "search",
            self.statistics_of(found, self.experts), classes, knots,
        )  # fmt: skip

    def merger(
        self, settings: Mapping[str, Any], members: int | None = None, adapt: Sequence[str] | bool = False
    ) -> RecipeMerger:
        given = dict(settings)
        steps = self._fixed_corrections(given.pop("after", []), "search.merger.after")
        method = methods.get(str(given.pop("method", "simple")), "search.merger.method")
        names = [e.name for e in self.experts]
        if members not in (None, len(names)):
            _refuse_by_expert(method, given, members or 0)
            names = [str(n) for n in range(members or 0)]
        else:
            self.statistics_of(method, self.experts)  # what cannot be collected is refused now
        knobs, start = adapted(method, given, adapt)
        fixed = {key: value for key, value in given.items() if key not in start}
        rules = fixed_rules(method, fixed, names, self._names, "search.merger", start)
        return RecipeMerger(method, self.base, rules, knobs, start, partial(self.statistics_of, method), steps)

    def crossover(self, first: Recipe, second: Recipe, ratio: float, point: float) -> Recipe:
        return Merge("split_slerp", (first, second), self.base, one_point(self._sizes, ratio, point))

    def depth(self, anew: bool) -> int:
        if self._counted is not None:
            return self._counted(anew)
        return 1 + max((layer_of(n) or 0 for n in self._names), default=0)

    def wanted_of_experts(self, wanted: methods.Of) -> tuple[Statistic, ...]:
        """What an annotation asks for, of every expert. Raises BadInput where it cannot be collected."""
        return self._statistics_of(wanted, self.experts, self.experts)

    def statistics_of(self, method: methods.Method, members: Sequence[Recipe]) -> tuple[Statistic, ...]:
        """What a method asks for, of every kind one a member.

        Of an offspring, those of the expert in whose place it stands are used unchanged, as in the experiments of
        Evolver's authors; or its own, on that expert's items.
        """
        kinds = dict.fromkeys(method.statistics.values())
        for kind in kinds:
            collector_named(kind.statistic)
        origins = [_origin(m, method.name) for m in members] if kinds else []
        of = members if self._own else origins
        return tuple(found for kind in kinds for found in self._statistics_of(kind, of, origins))

    def _statistics_of(
        self, kind: methods.Of, models: Sequence[Recipe], origins: Sequence[Expert]
    ) -> tuple[Statistic, ...]:  # fmt: skip
        """One statistic a model: its own, one of the base or one of a merge of all, on the items of its origin."""
        items = [self._sampled(kind.statistic, origin.name) for origin in origins]
        found = tuple(
            Statistic(kind.statistic, self.base if kind.base else model, own)
            for model, own in zip(models, items, strict=True)
        )
        for _ in range(self._passes if kind.merged else 0):
            merged = Merge(kind.merged, tuple(models), self.base, (), found)
            found = tuple(Statistic(kind.statistic, merged, own) for own in items)
        return found


@dataclass(frozen=True)
class RecipeMerger:
    """See ``Merger``.

    Args:
        rules: the settings that stay as they are.
        statistics: those that the method asks for, of the members.
        steps: corrections that every merge goes through, of which nothing is tuned.
    """

    method: methods.Method
    base: Expert
    rules: tuple[Rule, ...]
    knobs: tuple[Knob, ...]
    start: Mapping[str, float]
    statistics: Callable[[Sequence[Recipe]], tuple[Statistic, ...]]
    steps: tuple[Genome, ...]

    def __call__(self, members: Sequence[Recipe], values: Mapping[str, float] | None = None) -> Merge:
        varied = (Rule.of(self.start if values is None else values),) if self.knobs else ()
        rules = (*self.rules, *varied)
        made = Merge(self.method.name, tuple(members), self.base, rules, self.statistics(members))
        return corrected(made, self.steps, [{}] * len(self.steps))

    def parts_of(self, recipe: Recipe) -> tuple[tuple[Recipe, ...], Mapping[str, float]] | None:
        made = recipe
        for _ in self.steps:
            made = made.inputs[0] if len(made.inputs) == 1 else made
        if not isinstance(made, Merge) or (self.knobs and not made.rules):
            return None
        found = dict(made.rules[-1].values) if self.knobs else {}
        values = {k.name: v for k in self.knobs if isinstance(v := found.get(k.name), float) and k.low <= v <= k.high}
        try:
            return (made.inputs, values) if self(made.inputs, values).id == recipe.id else None
        except BadInput:  # a method that asks for statistics takes offspring of experts only
            return None


def _refuse_by_expert(method: methods.Method, given: Mapping[str, Any], members: int) -> None:
    """Raises BadInput for what only experts have, and not all members of a population."""
    if method.statistics:
        raise BadInput(
            f"search.population: {method.name} needs statistics of experts, and a population of {members} has members "
            "that are none; leave population out, or choose another merger."
        )
    for key, value in given.items():
        each = key in method.settings and method.settings[key].kind is tuple
        if each and (isinstance(value, dict) or _is_listed(value)):
            raise BadInput(
                f"search.merger.{key}: one number for each expert, but the population has {members} members; write one "
                "number for all of them, or leave population out."
            )


def _is_listed(value: Any) -> bool:
    """Whether a value is a list of numbers, one for each expert, and not one of {filter, value}."""
    return isinstance(value, list) and len(value) > 1 and not any(isinstance(v, dict) for v in value)


def _origin(member: Recipe, method: str) -> Expert:
    """The expert in whose place a member of a population stands."""
    while isinstance(member, Cross):
        member = member.parent
    if not isinstance(member, Expert):
        raise BadInput(f"search: {method} needs statistics of experts, and a {member.describe()} is not an expert.")
    return member
