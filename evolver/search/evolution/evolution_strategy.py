"""An evolution strategy on weights: seeded noise around one model, and steps against what it says of the slope.

Papers: Salimans et al. 2017, "Evolution strategies as a scalable alternative to reinforcement learning" (seeds, pairs
and ranks); Qiu et al. 2025, arXiv 2509.24372 (the weights of language models); Sarkar et al. 2025, arXiv 2511.16652
(EGGROLL: noise of low rank); arXiv 2606.28373 (MERGEvolve: it starts at a merge); Schweighofer et al. 2026, arXiv
2605.30148 (decay towards the start).

A generation scores the present mean θ and n models around it, in n/2 pairs θ ± sigma·σ·ε of the same noise, where σ is
a number for each tensor (see ``evolver.records.noise``). With a utility u for each score, the mean then moves to

    θ ← θ₀ + (1 − decay)·(θ − θ₀) + learning_rate·σ/n · Σ_i u_i ε_i    (the noise of a pair's second model is −ε)

As θ₀ never changes, θ − θ₀ is a sum of (seed, coefficient) pairs, and that is all that the search keeps of a model.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from evolver.config.section import Section
from evolver.errors import BadInput
from evolver.records import Candidate, Result
from evolver.records.noise import Distribution, Noise
from evolver.records.recipe import Recipe
from evolver.search.base import Ordered, Setup, algorithm

# A default learning rate in sigmas.
RATE_OF_SIGMA = 4.0
# Of a coefficient, so that nothing but its own digits decides about an id.
COEFFICIENT_DECIMALS = 9
# A seed is a whole number that every reader of JSON keeps.
SEED_BITS = 53


class EvolutionStrategySettings(Section):
    """Settings of the evolution strategy. Lengths are in root mean squares of the tensor's task vectors."""

    algorithm: Literal["evolution_strategy"] = Field(description="name of this search")
    population: int = Field(
        16, ge=2, le=100_000, description="number of models around the mean in a generation, an even number"
    )
    sigma: float = Field(
        0.5,
        ge=0.001,
        le=100,
        description="size of the noise, in root mean squares of each tensor's task vectors: with 1, a model is as far "
        "from the mean as the experts are from the base on average",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=10_000,
        description="length of a step, with 1/sigma of the estimated slope in it as in the papers; default: 4·sigma",
    )
    utilities: Literal["ranks", "z-scores"] = Field(
        "ranks",
        description="what a generation's scores become: their ranks, from -1/2 to 1/2, or how many standard deviations "
        "they are from the mean",
    )
    decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the way back to the model that the search started from that every step goes, against "
        "forgetting what the tasks do not ask for",
    )
    distribution: Distribution = Field(
        "normal", description="of the noise: normal numbers, or 1 and -1 with equal probability (rademacher)"
    )
    rank: int = Field(
        0, ge=0, le=4096, description="rank of the noise of each matrix, as in EGGROLL; 0: every weight is drawn"
    )


@algorithm("evolution_strategy", EvolutionStrategySettings)
class EvolutionStrategy(Ordered):
    """An evolution strategy with seeded noise (ES at scale, arXiv 2509.24372; EGGROLL, 2511.16652), from a merge.

    It starts from the best of the models under ``start``, or from the average of the experts (MERGEvolve, 2606.28373).
    Unlike ``evolver`` and ``shade`` it recombines nothing: it adds noise in all weights, so it leaves whatever space
    the experts span, and unlike ``cmaes`` it learns a step and no shape of the noise. It assumes that scores change
    smoothly with the weights, and that there are many candidates for each weight that matters: it beats random noise
    where few do, and a hundred candidates for millions of weights may find nothing. A pair of which a model has failed
    says nothing and is left out of the step.

    Raises BadInput for an odd population.
    """

    def __init__(self, setup: Setup, settings: EvolutionStrategySettings) -> None:
        super().__init__(setup)
        if settings.population % 2:
            raise BadInput(
                f"search.population: evolution_strategy tries pairs of models, and {settings.population} is odd; write "
                f"{settings.population + 1}."
            )
        self.settings, self.size = settings, settings.population
        self.rate = RATE_OF_SIGMA * settings.sigma if settings.learning_rate is None else settings.learning_rate
        self.start: Recipe = setup.maker.merger({"method": "simple"})(setup.experts)
        # Where the strategy stands, and the coefficients by seed that it has gone from the start, the earliest first.
        self.mean, self.terms = self.start, dict[int, float]()
        # The generation: its number, its first candidate, the first around the mean, and their results by place.
        self._generation, self._first, self._around = 0, 0, 1
        self._results: dict[int, Result] = {}

    def inform(self, pairs: Sequence[tuple[Candidate, Result]]) -> None:
        """See ``Informed``: the search starts from the best model so far, the earliest of equals."""
        whole = [(c, r) for c, r in pairs if r.complete and r.score is not None]
        if whole:
            self.start = self.mean = max(whole, key=lambda pair: (pair[1].standing, -pair[0].number))[0].recipe
            self._around = 0  # it has its score

    def waits_for(self, k: int) -> int:
        end = self._around + self.size
        return self._first if k < end else end

    def propose(self, k: int) -> Candidate:
        if k == self._around + self.size:
            self._next_generation(k)
        if k < self._around:
            return Candidate(k, self.mean, "evolution_strategy/mean", (self.start.id,))
        pair, second = divmod(k - self._around, 2)
        coefficient = -self.settings.sigma if second else self.settings.sigma
        recipe = self._noise(self.mean, {self._seed(pair): coefficient})
        return Candidate(k, recipe, "evolution_strategy", (self.mean.id,))

    def learn(self, candidate: Candidate, result: Result) -> None:
        if candidate.number >= self._around:
            self._results[candidate.number - self._around] = result

    def _next_generation(self, k: int) -> None:
        """Move the mean, and begin with it, unless it stays where it is and is scored already."""
        terms = self._moved()
        moved = terms != self.terms
        self.terms, self._results = terms, {}
        self.mean = self._noise(self.start, terms) if terms else self.start
        self._generation, self._first, self._around = self._generation + 1, k, k + moved

    def _moved(self) -> dict[int, float]:
        """The terms of the mean after what a whole generation says."""
        pairs = self._pairs()
        shaped = UTILITIES[self.settings.utilities]([f for pair in pairs.values() for f in pair])
        terms = {seed: (1 - self.settings.decay) * c for seed, c in self.terms.items()}
        for pair, one, other in zip(pairs, shaped[::2], shaped[1::2], strict=True):
            seed = self._seed(pair)
            terms[seed] = terms.get(seed, 0.0) + self.rate / self.size * (one - other)
        rounded = {seed: round(c, COEFFICIENT_DECIMALS) for seed, c in terms.items()}
        return {seed: c for seed, c in rounded.items() if c}

    def _pairs(self) -> dict[int, tuple[float, float]]:
        """The fitness of the pairs of which both models have one, by the pair's place."""
        found = fitness_of([self._results[place] for place in range(self.size)])
        halves = enumerate(zip(found[::2], found[1::2], strict=True))
        return {pair: (one, other) for pair, (one, other) in halves if one is not None and other is not None}

    def _seed(self, pair: int) -> int:
        return random.Random(f"{self.setup.seed}:evolution_strategy:{self._generation}:{pair}").getrandbits(SEED_BITS)

    def _noise(self, point: Recipe, terms: Mapping[int, float]) -> Noise:
        settings, setup = self.settings, self.setup
        return Noise(point, setup.experts, setup.base, tuple(terms.items()), settings.distribution, settings.rank)


def fitness_of(results: Sequence[Result]) -> list[float | None]:
    """Numbers that order results as their standings do (Deb 2000, section 3); None where there is no score.

    A model that keeps the constraints has its score. Another one has the lowest score of those, or 0 without any, less
    what it breaks.
    """
    scored = [r for r in results if r.score is not None]
    lowest = min((r.score for r in scored if r.score is not None and r.feasible), default=0.0)
    return [None if r.score is None else r.score if r.feasible else lowest - r.violation for r in results]


def centred_ranks(fitness: Sequence[float]) -> list[float]:
    """Ranks from −1/2 for the worst to 1/2 for the best; equal numbers share the mean of their ranks."""
    ordered, last = sorted(fitness), max(1, len(fitness) - 1)
    return [(bisect_left(ordered, f) + bisect_right(ordered, f) - 1) / 2 / last - 0.5 for f in fitness]


def z_scores(fitness: Sequence[float]) -> list[float]:
    """How many standard deviations each number is above the mean; 0 where all are equal."""
    if not fitness:
        return []
    mean = math.fsum(fitness) / len(fitness)
    deviation = math.sqrt(math.fsum((f - mean) ** 2 for f in fitness) / len(fitness))
    return [(f - mean) / deviation if deviation else 0.0 for f in fitness]


UTILITIES = {"ranks": centred_ranks, "z-scores": z_scores}
