"""CMA-ES over merge coefficients."""

from __future__ import annotations

import math
from typing import Literal

import optuna
from pydantic import Field

from evolver.errors import BadInput
from evolver.records import Choice, Result
from evolver.search.base import Setup, algorithm
from evolver.search.coefficients.base import Coefficients, CoefficientSettings, space_of


class CMAESSettings(CoefficientSettings):
    """Settings of CMA-ES."""

    algorithm: Literal["cmaes"] = Field(description="name of this search")
    population: int | None = Field(
        None,
        ge=2,
        le=100_000,
        description="number of candidates of a generation; default: 4 + 3 ln(dimensions), rounded down",
    )
    sigma: float | None = Field(None, gt=0, le=1000, description="initial step size; default: a sixth of the range")
    penalty: float = Field(
        10.0,
        ge=0,
        le=1e6,
        description="what a candidate that breaks constraints loses of its score in the eyes of the search, for each "
        "unit by which it breaks them",
    )


@algorithm("cmaes", CMAESSettings)
class CMAES(Coefficients):
    """Covariance matrix adaptation evolution strategy (Hansen 2016, arXiv 1604.00772), by Optuna.

    It draws a generation of candidates from a normal distribution and moves the distribution towards the best of them.
    Unlike ``tpe`` it tunes numbers only and learns how they depend on each other; it assumes that the score changes
    smoothly with them.
    """

    def __init__(self, setup: Setup, settings: CMAESSettings) -> None:
        space = space_of(setup, settings)
        for knob in space.knobs:
            if isinstance(knob, Choice):
                raise BadInput(
                    f"search.tune: cmaes can only tune numbers, and {knob.name.partition('@')[0]} is a choice among "
                    "words; fix it in search.settings, or search with tpe or nsga2."
                )
        dimensions = len(space.knobs)
        self.population, self.penalty = settings.population or default_population(dimensions), settings.penalty
        sampler = optuna.samplers.CmaEsSampler(
            seed=setup.seed, popsize=self.population, sigma0=settings.sigma, n_startup_trials=1
        )
        super().__init__(setup, space, sampler, "cmaes")

    def waits_for(self, k: int) -> int:
        # Candidate 0 is the enqueued first point, which belongs to no generation.
        return 0 if k == 0 else 1 + (k - 1) // self.population * self.population

    def values(self, result: Result) -> float | None:
        return None if result.score is None else result.score - self.penalty * result.violation

    @property
    def constrained(self) -> bool:
        return False


def default_population(dimensions: int) -> int:
    """The default population of CMA-ES, 4 + ⌊3 ln d⌋ for d dimensions (Hansen 2016, table 1)."""
    return 4 + math.floor(3 * math.log(dimensions))
