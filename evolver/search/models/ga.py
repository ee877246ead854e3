"""A genetic algorithm over mixtures of the experts, with children that lean towards the better parent."""

from __future__ import annotations

import random
from typing import Literal

from pydantic import Field

from evolver.config.section import Section
from evolver.records import Candidate, Result, Standing
from evolver.search.base import Ordered, Setup, algorithm
from evolver.search.models.mixtures import MixturePoint, combined, mixture_of, one_hot, shares


class GASettings(Section):
    """Settings of the genetic algorithm."""

    algorithm: Literal["ga"] = Field(description="name of this search")
    population: int = Field(
        10,
        ge=2,
        le=100_000,
        description="number of models in the population, and of children in a generation; the first population has all "
        "experts, even if they are more",
    )
    rate: float = Field(0.3, ge=0, le=1, description="probability that a coefficient of a child is mutated")
    sigma: float = Field(0.1, ge=0, le=10, description="standard deviation of what a mutation adds to a coefficient")


@algorithm("ga", GASettings)
class GA(Ordered):
    """A genetic algorithm with fitness-weighted crossover (GENOME, Zhang et al. 2025, arXiv 2503.01155).

    The first population is the experts and, where it is larger, mixtures of two random experts. Parents are drawn with
    chances that are proportional to their scores f, and the child of a and b is (f_a·a + f_b·b) / (f_a + f_b). The best
    of parents and children live on. Unlike GENOME, which adds noise to single weights, a mutation changes the
    coefficients of the experts' task vectors, so every member is a mixture of the experts. Unlike ``cmaes`` it assumes
    no shape of the score; it assumes that a mixture of two good models is good.
    """

    def __init__(self, setup: Setup, settings: GASettings) -> None:
        super().__init__(setup)
        self.settings, self.first = settings, max(settings.population, len(setup.experts))
        self.members: list[tuple[Standing, MixturePoint]] = []  # that were scored, the earliest first
        self._pending: dict[int, MixturePoint] = {}

    def waits_for(self, k: int) -> int:
        size = self.settings.population
        return 0 if k < self.first else self.first + (k - self.first) // size * size

    def propose(self, k: int) -> Candidate:
        draw = random.Random(f"{self.setup.seed}:ga:{k}")
        experts, initial = self.setup.experts, k < self.first
        found = self._initial(k, draw) if initial else self._child(draw)
        self._pending[k] = found
        used = tuple(e.id for e, c in zip(experts, found, strict=True) if c)
        recipe = mixture_of(experts, self.setup.base, found)
        return Candidate(k, recipe, "ga/initial" if initial else "ga", used)

    def learn(self, candidate: Candidate, result: Result) -> None:
        self.members.append((result.standing, self._pending.pop(candidate.number)))
        self.members.sort(key=lambda member: member[0], reverse=True)  # a stable sort: of equals the earlier one first
        del self.members[self.settings.population :]

    def _initial(self, k: int, draw: random.Random) -> MixturePoint:
        count = len(self.setup.experts)
        if k < count:
            return one_hot(k, count)
        pair, part = draw.sample(range(count), 2), draw.random()
        return combined([one_hot(i, count) for i in pair], [part, 1 - part])

    def _child(self, draw: random.Random) -> MixturePoint:
        one, other = _couple(shares([standing for standing, _ in self.members]), draw)
        (ours, a), (theirs, b) = self.members[one], self.members[other]
        child = combined([a, b], shares([ours, theirs]))
        return tuple(c + (draw.gauss(0, self.settings.sigma) if draw.random() < self.settings.rate else 0.0)
                     for c in child)  # fmt: skip


def _couple(chances: list[float], draw: random.Random) -> tuple[int, int]:
    """Two places that differ, drawn with these chances."""
    places = range(len(chances))
    (one,) = draw.choices(places, chances)
    left = [0.0 if place == one else chance for place, chance in zip(places, chances, strict=True)]
    (other,) = draw.choices(places, left if sum(left) > 0 else [float(place != one) for place in places])
    return one, other
