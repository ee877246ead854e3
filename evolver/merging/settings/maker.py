"""The making half, as the searches see it: search spaces and mergers, by the names of their methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evolver.errors import BadInput, nearest
from evolver.evaluation.collectors import collector_named
from evolver.merging import methods
from evolver.merging.settings.alternatives import Alternatives
from evolver.merging.settings.division import Groups
from evolver.merging.settings.genome import Genome, genome
from evolver.merging.settings.placed import fixed_rules
from evolver.records.recipe import Cross, Expert, Merge, Recipe, Statistic


class RecipeMaker:
    """Makes recipes of a run's experts for a search.

    Args:
        experts: their names.
        tensors: the names of the base's tensors.
        digests: of the base and the experts, by name; without them, names stand for them.
        sampled: the hash of the items that an expert's statistics are collected on, by its name; raises BadInput where
            none can be. Without it, a word stands for every hash.
    """

    def __init__(
        self, experts: Sequence[str], tensors: Sequence[str], digests: dict[str, str] | None = None,
        sampled: Callable[[str], str] = lambda _: "items",
    ) -> None:  # fmt: skip
        self.digests = digests or {n: n for n in ("base", *experts)}
        self.base = Expert("base", self.digests["base"])
        self.experts = tuple(Expert(n, self.digests[n]) for n in experts)
        self._names, self._sampled = list(tensors), sampled

    def space(
        self, method: str | Sequence[str], groups: Groups, tune: Sequence[str] | None, settings: Mapping[str, Any],
        classes: bool = False, knots: int | None = None,
    ) -> Genome | Alternatives:  # fmt: skip
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

    def _space_of(
        self, method: str, groups: Groups, tune: Sequence[str] | None, settings: Mapping[str, Any], classes: bool,
        knots: int | None,
    ) -> Genome:  # fmt: skip
        found = methods.get(method, "search.method")
        return genome(
            found, self.experts, self.base, self._names, groups, tune, settings, "search",
            self._statistics(found, self.experts), classes, knots,
        )  # fmt: skip

    def merger(self, settings: Mapping[str, Any]) -> Callable[[Sequence[Recipe]], Recipe]:
        given = dict(settings)
        method = methods.get(str(given.pop("method", "simple")), "search.merger.method")
        rules = fixed_rules(method, given, [e.name for e in self.experts], self._names, "search.merger")
        self._statistics(method, self.experts)  # what cannot be collected is refused now
        return lambda members: Merge(
            method.name, tuple(members), self.base, rules, self._statistics(method, members)
        )  # fmt: skip

    def _statistics(self, method: methods.Method, members: Sequence[Recipe]) -> tuple[Statistic, ...]:
        """What a method asks for, of every kind one a member.

        An offspring has none of its own: those of the expert in whose place it stands are used unchanged, as in the
        experiments of Evolver's authors.
        """
        kinds = dict.fromkeys(method.statistics.values())
        for kind in kinds:
            collector_named(kind)
        origins = [_origin(m, method.name) for m in members] if kinds else []
        return tuple(Statistic(kind, o, self._sampled(o.name)) for kind in kinds for o in origins)


def _origin(member: Recipe, method: str) -> Expert:
    """The expert in whose place a member of a population stands."""
    while isinstance(member, Cross):
        member = member.parent
    if not isinstance(member, Expert):
        raise BadInput(f"search: {method} needs statistics of experts, and a {member.describe()} is not an expert.")
    return member
