"""Evolver without a merger."""

from __future__ import annotations

import random
from collections.abc import Sequence

from evolver.records import UNKNOWN, Candidate, ItemAnswer, Result, Standing
from evolver.records.leaders import leaders
from evolver.search.ahead import RunsAhead
from evolver.search.base import Setup
from evolver.search.challenge import challenge, rejected
from evolver.search.evolution.offspring import LED_BY_BEST, LED_BY_ONE_OF_THE_BEST, best_places, offspring
from evolver.search.evolution.population import first_population, led_by
from evolver.search.evolution.settings import EvolverSettings


class Alone(RunsAhead):
    """Evolver without a merger: the population is scored first, then each member gets one child per generation.

    A child that beats its own parent takes the parent's place; the members are independent apart from lending weights.
    """

    def __init__(self, setup: Setup, settings: EvolverSettings, size: int) -> None:
        self.size = size
        super().__init__(setup, limit=self.size * (1 + settings.generations))
        self.settings = settings
        self.population = first_population(setup, size)
        self.standings: list[Standing] = [UNKNOWN] * self.size
        self.items: list[tuple[ItemAnswer, ...]] = [()] * self.size

    def inform(self, pairs: Sequence[tuple[Candidate, Result]]) -> None:
        """See ``Informed``: the best models so far are the first population; it is filled up as usual."""
        self.population = led_by([c.recipe for c, _ in leaders(pairs)], self.population)

    def receive(self, candidate: Candidate, result: Result) -> bool:
        """See ``Receives``: a model that is better than the worst member takes its place."""
        worst = min(range(self.size), key=lambda i: self.standings[i])
        if result.standing <= self.standings[worst] or candidate.recipe in self.population:
            return False
        self.population[worst], self.standings[worst] = candidate.recipe, result.standing
        self.items[worst] = result.items
        return True

    def waits_for(self, k: int) -> int:
        if k < self.size:
            return 0
        if self.settings.mode == "steady":
            return max(self.size, k - self.settings.in_flight + 1)
        return k if self.settings.mode == "sequential" else k - k % self.size

    def propose(self, k: int) -> Candidate:
        i = k % self.size
        if k < self.size:
            return Candidate(k, self.population[i], "evolver/initial")
        draw = random.Random(f"{self.setup.seed}:evolver:{k}")
        child = offspring(self.population, i, self._leader(k, i, draw), self.settings, draw)
        asked = challenge(self.setup, k, self.standings[i], self.items[i])
        return Candidate(k, child, "evolver", tuple(p.id for p in child.inputs), asked)

    def learn(self, candidate: Candidate, result: Result) -> None:
        i = candidate.number % self.size
        if candidate.number < self.size or result.standing > self.standings[i]:
            self.population[i], self.standings[i], self.items[i] = candidate.recipe, result.standing, result.items

    def assume(self, candidate: Candidate) -> Result | None:
        return None if candidate.number < self.size else rejected(candidate)

    def _leader(self, k: int, i: int, draw: random.Random) -> int | None:
        """The member that has to be the first partner: the best other one, or None if partners are drawn at random.

        With the paper's strategy, as in the released code, partners are random with probability 0.5 + 0.5 / (T - t) in
        generation t of T. So the best member leads in early generations most often, and never in the last one.
        """
        best = max((j for j in range(self.size) if j != i), key=lambda j: self.standings[j])
        if self.settings.strategy in LED_BY_BEST:
            return best
        if self.settings.strategy == LED_BY_ONE_OF_THE_BEST:
            return draw.choice([j for j in best_places(self.standings, self.settings.p) if j != i])
        left = self.settings.generations - (k // self.size - 1)
        at_random = draw.random() < 0.5 + 0.5 / left
        return None if at_random or self.settings.strategy != "evolver" else best
