"""Evolver with a merger."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from evolver.records import UNKNOWN, Candidate, ItemAnswer, Result, Standing
from evolver.records.leaders import leaders
from evolver.records.recipe import Recipe
from evolver.search.ahead import RunsAhead
from evolver.search.base import Setup
from evolver.search.challenge import challenge, rejected
from evolver.search.evolution.adapting import AdaptingSettings
from evolver.search.evolution.offspring import offspring
from evolver.search.evolution.population import first_population
from evolver.search.evolution.settings import EvolverSettings

# Of the candidates, how many vary the merger's settings instead of the population.
SETTINGS_SHARE = 0.5


class Merged(RunsAhead):
    """Evolver with a merger: the whole population has one score, the dev score of its merge.

    Unlike ``Alone``, a child counts for what it adds to the merge, not for its own score. With ``adapt``, numbers of
    the merger such as the total mass evolve, too: in half of the candidates they change and the population does not
    (see ``AdaptingSettings``), in the others it is the other way round. If both changed at once, a child that harms
    would be accepted together with a better mass.
    """

    def __init__(self, setup: Setup, settings: EvolverSettings, size: int) -> None:
        self.size = size
        super().__init__(setup, limit=1 + self.size * settings.generations)
        self.settings = settings
        self.merge = setup.maker.merger(settings.merger or {"method": "simple"}, size, settings.adapt)
        self.numbers = AdaptingSettings(self.merge.knobs, self.merge.start)
        self.population = first_population(setup, size)
        self.standing: Standing = UNKNOWN
        self.items: tuple[ItemAnswer, ...] = ()
        self._pending: dict[int, tuple[list[Recipe], AdaptingSettings]] = {}
        self._best: tuple[Result, list[Recipe], AdaptingSettings] | None = None

    def inform(self, pairs: Sequence[tuple[Candidate, Result]]) -> None:
        """See ``Informed``: the first population is the one whose merge is the best so far."""
        for earlier, _ in leaders(pairs):
            found = self._found_in(earlier.recipe)
            if found is not None:
                self.population, self.numbers = found
                return

    def receive(self, candidate: Candidate, result: Result) -> bool:
        """See ``Receives``: a merge of as many members by the same method brings its population, if it is better."""
        better = result.standing > (self._best[0].standing if self._best else self.standing)
        found = self._found_in(candidate.recipe) if better else None
        if found is None:
            return False
        self._best = result, *found
        return True

    def _found_in(self, recipe: Recipe) -> tuple[list[Recipe], AdaptingSettings] | None:
        """The population and the numbers of a merge by the same method; None for another model."""
        parts = self.merge.parts_of(recipe)
        if parts is None or len(parts[0]) != self.size:
            return None
        return list(parts[0]), replace(self.numbers, values=parts[1])

    def waits_for(self, k: int) -> int:
        if k == 0:
            return 0
        if self.settings.mode == "steady":
            return max(1, k - self.settings.in_flight + 1)
        return k if self.settings.mode == "sequential" else 1 + (k - 1) // self.size * self.size

    def propose(self, k: int) -> Candidate:
        if k == 0:
            return Candidate(0, self.merge(self.population, self.numbers.values), "evolver/initial")
        self._adopt_best()
        generation, place = divmod(k - 1, self.size)
        order = list(range(self.size))
        random.Random(f"{self.setup.seed}:order:{generation}").shuffle(order)
        draw = random.Random(f"{self.setup.seed}:merged:{k}")
        child = offspring(self.population, order[place], None, self.settings, draw)
        asked = challenge(self.setup, k, self.standing, self.items)
        if self.merge.knobs and draw.random() < SETTINGS_SHARE:
            incumbent = self.merge(self.population, self.numbers.values)
            numbers = self.numbers.varied(draw)
            self._pending[k] = self.population, numbers
            merged = self.merge(self.population, numbers.values)
            return Candidate(k, merged, "evolver+settings", (incumbent.id,), asked)
        members = [child if j == order[place] else member for j, member in enumerate(self.population)]
        self._pending[k] = members, self.numbers
        merged = self.merge(members, self.numbers.values)
        return Candidate(k, merged, "evolver+merger", tuple(p.id for p in child.inputs), asked)

    def learn(self, candidate: Candidate, result: Result) -> None:
        if candidate.number == 0:
            self.standing, self.items = result.standing, result.items
            return
        members, numbers = self._pending.pop(candidate.number)
        if result.standing > (self._best[0].standing if self._best else self.standing):
            self._best = result, members, numbers

    def assume(self, candidate: Candidate) -> Result | None:
        return None if candidate.number == 0 else rejected(candidate)

    def _adopt_best(self) -> None:
        """Continue from the best population learnt since the last proposal, such as the best one of a generation."""
        if self._best:
            result, self.population, self.numbers = self._best
            self.standing, self.items = result.standing, result.items
            self._best = None
