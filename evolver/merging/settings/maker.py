"""The making half, as the searches see it: search spaces and mergers, by the names of their methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evolver.merging import methods
from evolver.merging.settings.genome import Genome, genome
from evolver.merging.settings.placed import fixed_rules
from evolver.records import Expert, Merge, Recipe


class RecipeMaker:
    """Makes recipes of a run's experts for a search.

    Args:
        experts: their names.
        tensors: the names of the base's tensors.
        digests: of the base and the experts, by name; without them, names stand for them.
    """

    def __init__(self, experts: Sequence[str], tensors: Sequence[str], digests: dict[str, str] | None = None) -> None:
        self.digests = digests or {n: n for n in ("base", *experts)}
        self.base = Expert("base", self.digests["base"])
        self.experts = tuple(Expert(n, self.digests[n]) for n in experts)
        self._names = list(tensors)

    def space(self, method: str, groups: int, tune: Sequence[str] | None, settings: Mapping[str, Any]) -> Genome:
        found = methods.get(method, "search.method")
        return genome(found, self.experts, self.base, self._names, groups, tune, settings, "search")

    def merger(self, settings: Mapping[str, Any]) -> Callable[[Sequence[Recipe]], Recipe]:
        given = dict(settings)
        method = methods.get(str(given.pop("method", "simple")), "search.merger.method")
        rules = fixed_rules(method, given, [e.name for e in self.experts], self._names, "search.merger")
        return lambda members: Merge(method.name, tuple(members), self.base, rules)
