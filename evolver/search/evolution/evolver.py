"""Evolver: evolves the weights of the experts as a population.

Paper: Du et al., "Knowledge Fusion By Evolving Weights of Language Models", Findings of ACL 2024. There are two forms:

- ``Alone``, without a merger: every member of the population in turn gets a child, by mutation and crossover. The child
  replaces its parent if its dev score is higher. The best member wins.
- ``Merged``, with a merger: a child stands in its parent's place in the population, the whole population is merged, and
  the dev score of this merge decides whether the child stays.

Both follow the code that the authors released, with one deliberate difference: their second form returned the
population that was best on the *test* set. Here the search only ever sees the dev set.

The modes differ in which results a candidate is proposed on. ``sequential`` is the released order: each candidate is
proposed on all results before it. ``generational`` proposes a child of every member from the same population, so as
many workers as members are busy. ``steady`` keeps ``in_flight`` candidates in evaluation, so each is proposed on all
results but the last ``in_flight - 1``. In ``steady`` mode with a merger, an accepted candidate brings the population
that it was made from, with its child in it; children that were accepted in the meantime are not in it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from evolver.config.section import Section
from evolver.errors import BadInput
from evolver.records import UNKNOWN, Candidate, ItemAnswer, Result, Standing
from evolver.records.recipe import Cross, Merge, Recipe
from evolver.search.ahead import RunsAhead
from evolver.search.base import Ordered, Setup, algorithm
from evolver.search.challenge import challenge, rejected
from evolver.search.continued import best_models

Strategy = Literal["evolver", "rand/1", "best/1", "current-to-best/1", "rand/2"]
PARTNERS = {"evolver": 1, "rand/1": 3, "best/1": 3, "current-to-best/1": 3, "rand/2": 5}
LED_BY_BEST = ("best/1", "current-to-best/1")


class EvolverSettings(Section):
    """Settings of the Evolver search. The defaults are those of the code that the authors released."""

    algorithm: Literal["evolver"] = Field(description="name of this search")
    mode: Literal["sequential", "generational", "steady"] = Field(
        "sequential",
        description="sequential: one candidate after the other; generational: one child of every member of the "
        "population, all at the same time; steady: in_flight candidates at any time",
    )
    in_flight: int = Field(
        1, ge=1, le=100_000, description="with mode: steady, number of candidates in evaluation at the same time"
    )
    merger: dict[str, Any] | None = Field(
        None,
        description="merge method and its settings, such as {method: simple}: each candidate is a merge of the "
        "whole population; default: each candidate is a single member",
    )
    strategy: Strategy = Field(
        "evolver",
        description="how a mutant is made from other members: as in the paper (evolver), or by a form of "
        "differential evolution",
    )
    F: float = Field(0.5, gt=0, le=2, description="scale of the mutation")
    Cr: float = Field(
        0.5, gt=0, le=1, description="crossover rate: probability that a single weight takes the mutant's value"
    )
    generations: int = Field(15, ge=1, le=1_000_000, description="number of generations, T in the paper")


@algorithm("evolver", EvolverSettings, incumbent=True)
def build_evolver(setup: Setup, settings: EvolverSettings) -> Ordered:
    """Evolves the weights of the experts by mutation and crossover (Du et al. 2024, Findings of ACL).

    Unlike the coefficient searches it does not stay within the mixtures of the experts that one set of coefficients
    gives: every single weight may come from another member. It assumes that good weights of different experts can be
    combined one by one, as all experts come from one base.

    Raises BadInput for settings that do not fit together, and for too few experts.
    """
    if setup.together > 1 and settings.mode != "generational":
        raise BadInput(
            f"search.mode: {settings.mode} proposes candidates one by one, but halving needs batches; write "
            "generational."
        )
    if settings.in_flight > 1 and settings.mode != "steady":
        raise BadInput(
            f"search.in_flight: in mode {settings.mode}, the search itself decides how many candidates are evaluated "
            "at the same time; leave in_flight out, or write mode: steady."
        )
    needed = PARTNERS[settings.strategy] + 1
    if len(setup.experts) < needed:
        raise BadInput(
            f"search.strategy: {settings.strategy} needs {needed} experts, and the configuration has "
            f"{len(setup.experts)}; write evolver, or give more experts."
        )
    return Alone(setup, settings) if settings.merger is None else Merged(setup, settings)


def offspring(
    population: list[Recipe], i: int, leader: int | None, settings: EvolverSettings, draw: random.Random
) -> Cross:
    """The child of member ``i``.

    Args:
        leader: a member that has to be the first partner; None: all partners are drawn at random, without replacement.
    """
    others = [j for j in range(len(population)) if j != i]
    chosen = draw.sample(others, PARTNERS[settings.strategy])
    if leader is not None and leader != i:
        chosen = [leader, *[j for j in chosen if j != leader]][: len(chosen)]
    partners = tuple(population[j] for j in chosen)
    return Cross(population[i], partners, settings.strategy, settings.F, settings.Cr, draw.getrandbits(32))


class Alone(RunsAhead):
    """Evolver without a merger: the experts are scored first, then each member gets one child per generation.

    A child that beats its own parent takes the parent's place; the members are independent apart from lending weights.
    """

    def __init__(self, setup: Setup, settings: EvolverSettings) -> None:
        self.size = len(setup.experts)
        super().__init__(setup, limit=self.size * (1 + settings.generations))
        self.settings = settings
        self.population: list[Recipe] = list(setup.experts)
        self.standings: list[Standing] = [UNKNOWN] * self.size
        self.items: list[tuple[ItemAnswer, ...]] = [()] * self.size

    def inform(self, pairs: Sequence[tuple[Candidate, Result]]) -> None:
        """See ``Informed``: the best models so far are the first population; experts fill it up."""
        found = best_models(pairs)[: self.size]
        known = {recipe.id for recipe in found}
        self.population = [*found, *(e for e in self.setup.experts if e.id not in known)][: self.size]

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
        left = self.settings.generations - (k // self.size - 1)
        at_random = draw.random() < 0.5 + 0.5 / left
        return None if at_random or self.settings.strategy != "evolver" else best


class Merged(RunsAhead):
    """Evolver with a merger: the whole population has one score, the dev score of its merge.

    Unlike ``Alone``, a child counts for what it adds to the merge, not for its own score.
    """

    def __init__(self, setup: Setup, settings: EvolverSettings) -> None:
        self.size = len(setup.experts)
        super().__init__(setup, limit=1 + self.size * settings.generations)
        self.settings = settings
        self.merge = setup.maker.merger(settings.merger or {"method": "simple"})
        self.population: list[Recipe] = list(setup.experts)
        self.standing: Standing = UNKNOWN
        self.items: tuple[ItemAnswer, ...] = ()
        self._members: dict[int, list[Recipe]] = {}
        self._best: tuple[Result, list[Recipe]] | None = None

    def inform(self, pairs: Sequence[tuple[Candidate, Result]]) -> None:
        """See ``Informed``: the first population is the one whose merge is the best so far."""
        for recipe in best_models(pairs):
            if isinstance(recipe, Merge) and len(recipe.inputs) == self.size and self._is_merge(recipe):
                self.population = list(recipe.inputs)
                return

    def _is_merge(self, recipe: Merge) -> bool:
        """Whether a model is what this search's merger makes of the model's inputs."""
        try:
            return self.merge(recipe.inputs).id == recipe.id
        except BadInput:  # a method that asks for statistics takes offspring of experts only
            return False

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
        asked = challenge(self.setup, k, self.standing, self.items)
        return Candidate(k, self.merge(members), "evolver+merger", tuple(p.id for p in child.inputs), asked)

    def learn(self, candidate: Candidate, result: Result) -> None:
        if candidate.number == 0:
            self.standing, self.items = result.standing, result.items
            return
        members = self._members.pop(candidate.number)
        if result.standing > (self._best[0].standing if self._best else self.standing):
            self._best = (result, members)

    def assume(self, candidate: Candidate) -> Result | None:
        return None if candidate.number == 0 else rejected(candidate)

    def _adopt_best(self) -> None:
        """Continue from the best population learnt since the last proposal, such as the best one of a generation."""
        if self._best:
            result, self.population = self._best
            self.standing, self.items = result.standing, result.items
            self._best = None
