"""Evolver: the weights of the experts as a population (Du et al., Findings of ACL 2024).

Stand-alone, each member is challenged by its own offspring and replaced when the offspring's dev score is higher; the
best member wins. With a merger, the score is that of the merged population with the offspring in its parent's place.
Both as the authors released them, with one deliberate difference: their second form returned the population that was
best on the *test* set; here nothing but the dev set is ever looked at.

``mode: sequential`` is the released order, each candidate knowing all results before it. ``mode: generational``
challenges a frozen population with a whole generation at once, so that as many workers as members are busy. ``mode:
steady`` keeps ``in_flight`` candidates under way, each knowing all results but the last ``in_flight - 1``; with a
merger, an accepted candidate's population is the one that it was made from, with the child in it.
"""

from __future__ import annotations

import random
from typing import Any, Literal

from pydantic import Field

from evolver.config import Section
from evolver.errors import BadInput
from evolver.records import Candidate, Cross, Recipe, Result
from evolver.search.ahead import RunsAhead
from evolver.search.base import Ordered, Setup, algorithm

Strategy = Literal["evolver", "rand/1", "best/1", "current-to-best/1", "rand/2"]
PARTNERS = {"evolver": 1, "rand/1": 3, "best/1": 3, "current-to-best/1": 3, "rand/2": 5}
LED_BY_BEST = ("best/1", "current-to-best/1")


class EvolverSettings(Section):
    """Settings of the Evolver search; the defaults are the released ones."""

    algorithm: Literal["evolver"]
    mode: Literal["sequential", "generational", "steady"] = "sequential"
    in_flight: int = Field(1, ge=1, description="steady: candidates that may be evaluated at the same time")
    merger: dict[str, Any] | None = Field(None, description="merge method and its settings, as {method: simple}")
    strategy: Strategy = "evolver"
    F: float = Field(0.5, gt=0, le=2, description="scale of the mutation")
    Cr: float = Field(0.5, gt=0, le=1, description="probability of a scalar to take the mutant's value")
    generations: int = Field(15, ge=1, description="generations, T in the paper")


@algorithm("evolver", EvolverSettings, incumbent=True)
def build_evolver(setup: Setup, settings: EvolverSettings) -> Ordered:
    """The form that the settings ask for."""
    if setup.together > 1 and settings.mode != "generational":
        raise BadInput(f"search.mode: {settings.mode} proposes candidates one by one, no batches; write generational.")
    if settings.in_flight > 1 and settings.mode != "steady":
        raise BadInput(f"search.in_flight: {settings.mode} decides it itself; leave it out, or write mode: steady.")
    needed = PARTNERS[settings.strategy] + 1
    if len(setup.experts) < needed:
        raise BadInput(
            f"search.strategy: {settings.strategy} needs {needed} experts and there are {len(setup.experts)}; "
            "write evolver, or give more experts."
        )
    return Alone(setup, settings) if settings.merger is None else Merged(setup, settings)


def offspring(
    population: list[Recipe], i: int, leader: int | None, settings: EvolverSettings, draw: random.Random
) -> Cross:
    """The child of member ``i``: mutated with partners drawn without replacement, led by ``leader`` where given."""
    others = [j for j in range(len(population)) if j != i]
    chosen = draw.sample(others, PARTNERS[settings.strategy])
    if leader is not None and leader != i:
        chosen = [leader, *[j for j in chosen if j != leader]][: len(chosen)]
    partners = tuple(population[j] for j in chosen)
    return Cross(population[i], partners, settings.strategy, settings.F, settings.Cr, draw.getrandbits(32))


def _score(result: Result) -> float:
    return result.score if result.score is not None else float("-inf")


def _challenge(setup: Setup, score: float, items: tuple[float, ...]) -> tuple[float | None, tuple[float, ...]]:
    """The bar and the rival of a candidate that has to be better than an incumbent."""
    if not setup.early_stopping or score == float("-inf"):
        return None, ()
    return score, items if setup.racing else ()


def _rejected(candidate: Candidate) -> Result:
    return Result(candidate.number, candidate.recipe.id, "ok", bound=candidate.bar, stage=candidate.stage)


class Alone(RunsAhead):
    """Stand-alone: N scores of the experts first, then every member is challenged once a generation."""

    def __init__(self, setup: Setup, settings: EvolverSettings) -> None:
        self.size = len(setup.experts)
        super().__init__(setup, limit=self.size * (1 + settings.generations))
        self.settings = settings
        self.population: list[Recipe] = list(setup.experts)
        self.scores: list[float] = [float("-inf")] * self.size
        self.items: list[tuple[float, ...]] = [()] * self.size

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
        bar, rival = _challenge(self.setup, self.scores[i], self.items[i])
        return Candidate(k, child, "evolver", tuple(p.id for p in child.inputs), bar, rival=rival)

    def learn(self, candidate: Candidate, result: Result) -> None:
        i = candidate.number % self.size
        if candidate.number < self.size or result.beats(self.scores[i]):
            self.population[i], self.scores[i], self.items[i] = candidate.recipe, _score(result), result.items

    def assume(self, candidate: Candidate) -> Result | None:
        return None if candidate.number < self.size else _rejected(candidate)

    def _leader(self, k: int, i: int, draw: random.Random) -> int | None:
        """The best other member, or None for a random one.

        As released: random with probability 0.5 + 0.5 / (T - t), so that the best leads early and never at the end.
        """
        best = max((j for j in range(self.size) if j != i), key=lambda j: self.scores[j])
        if self.settings.strategy in LED_BY_BEST:
            return best
        left = self.settings.generations - (k // self.size - 1)
        at_random = draw.random() < 0.5 + 0.5 / left
        return None if at_random or self.settings.strategy != "evolver" else best


class Merged(RunsAhead):
    """With a merger: one score for the whole population, the dev score of its merge."""

    def __init__(self, setup: Setup, settings: EvolverSettings) -> None:
        self.size = len(setup.experts)
        super().__init__(setup, limit=1 + self.size * settings.generations)
        self.settings = settings
        self.merge = setup.maker.merger(settings.merger or {"method": "simple"})
        self.population: list[Recipe] = list(setup.experts)
        self.score = float("-inf")
        self.items: tuple[float, ...] = ()
        self._members: dict[int, list[Recipe]] = {}
        self._best: tuple[Result, list[Recipe]] | None = None

    def waits_for(self, k: int) -> int:
        if k == 0:
            return 0
        if self.settings.mode == "steady":
            return max(1, k - self.settings.in_flight + 1)
        return k if self.settings.mode == "sequential" else 1 + (k - 1) // self.size * self.size

    def propose(self, k: int) -> Candidate:
        if k == 0:
            return Candidate(0, self.merge(self.population), "evolver/initial")
        self._adopt_best()
        generation, place = divmod(k - 1, self.size)
        order = list(range(self.size))
        random.Random(f"{self.setup.seed}:order:{generation}").shuffle(order)
        i = order[place]
        draw = random.Random(f"{self.setup.seed}:merged:{k}")
        child = offspring(self.population, i, None, self.settings, draw)
        members: list[Recipe] = [*self.population[:i], child, *self.population[i + 1 :]]
        self._members[k] = members
        bar, rival = _challenge(self.setup, self.score, self.items)
        return Candidate(k, self.merge(members), "evolver+merger", tuple(p.id for p in child.inputs), bar, rival=rival)

    def learn(self, candidate: Candidate, result: Result) -> None:
        if candidate.number == 0:
            self.score, self.items = _score(result), result.items
            return
        members = self._members.pop(candidate.number)
        if result.beats(_score(self._best[0]) if self._best else self.score):
            self._best = (result, members)

    def assume(self, candidate: Candidate) -> Result | None:
        return None if candidate.number == 0 else _rejected(candidate)

    def _adopt_best(self) -> None:
        """Go on from the best of what was learnt since: the last one, or the best of a generation."""
        if self._best:
            result, self.population = self._best
            self.score, self.items = _score(result), result.items
            self._best = None
