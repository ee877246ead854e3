"""NSGA-III over merge coefficients."""

from __future__ import annotations

import math
from typing import Literal

import optuna
from pydantic import Field

from evolver.search.base import Setup, algorithm
from evolver.search.coefficients.base import CoefficientSettings, stated
from evolver.search.coefficients.nsga2 import FrontSearch, genetic_operators, objectives_for


class NSGA3Settings(CoefficientSettings):
    """Settings of NSGA-III."""

    algorithm: Literal["nsga3"] = Field(description="name of this search")
    population: int = Field(12, ge=2, le=100_000, description="number of candidates of a generation")
    divisions: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="number of steps between two objectives in which the reference directions are spread; default: as "
        "many as give no more directions than a generation has candidates",
    )


@algorithm("nsga3", NSGA3Settings, several=True)
class NSGA3(FrontSearch):
    """NSGA-III (Deb & Jain 2014, IEEE TEVC 18(4)), by Optuna: NSGA-II for many objectives.

    Unlike ``nsga2`` it does not ask how far a candidate is from its neighbours on the front, which tells little where
    nearly all candidates are on it. It spreads reference directions over the objectives (Das & Dennis 1998) and keeps
    candidates near the directions that have the fewest. It assumes that the whole front is wanted.
    """

    def __init__(self, setup: Setup, settings: NSGA3Settings) -> None:
        objectives = len(objectives_for(setup, "nsga3"))
        self.divisions = settings.divisions or default_divisions(objectives, settings.population)
        sampler = stated(
            optuna.samplers.NSGAIIISampler,
            seed=setup.seed,
            population_size=settings.population,
            reference_points=None,
            dividing_parameter=self.divisions,
            **genetic_operators(),
        )
        super().__init__(setup, settings, sampler, "nsga3", settings.population)


def default_divisions(objectives: int, population: int) -> int:
    """The largest p with at most so many directions: there are C(M + p - 1, p) for M objectives and p divisions (Deb &
    Jain 2014, equation 3); at least 1.
    """
    return next((p for p in range(1, 1000) if math.comb(objectives + p, p + 1) > population), 1000)
