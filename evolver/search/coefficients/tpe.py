"""The tree-structured Parzen estimator over merge coefficients."""

from __future__ import annotations

from typing import Literal

import optuna
from pydantic import Field

from evolver.search.base import Setup, algorithm
from evolver.search.coefficients.base import Coefficients, CoefficientSettings, refuse_in_flight, space_of, stated


class TPESettings(CoefficientSettings):
    """Settings of the tree-structured Parzen estimator."""

    algorithm: Literal["tpe"] = Field(description="name of this search")
    startup: int = Field(
        10, ge=1, le=1_000_000, description="number of candidates that are drawn at random at the beginning"
    )
    in_flight: int = Field(1, ge=1, le=100_000, description="number of candidates in evaluation at the same time")


@algorithm("tpe", TPESettings)
class TPE(Coefficients):
    """The tree-structured Parzen estimator (Watanabe 2023, arXiv 2304.11127), by Optuna, multivariate.

    It models the densities of good and of poor candidates and proposes where their ratio is highest. Unlike ``cmaes``
    it also tunes choices, needs no generations, and assumes no single optimum around which the score falls off. With
    several candidates in evaluation, pending ones count as poor (constant liar). Of several methods, it models which
    one is good, and the settings of each on the candidates that had it.
    """

    def __init__(self, setup: Setup, settings: TPESettings) -> None:
        refuse_in_flight(setup, settings.in_flight)
        space = space_of(setup.maker, settings)
        sampler = stated(
            optuna.samplers.TPESampler,
            seed=setup.seed,
            n_startup_trials=settings.startup,
            n_ei_candidates=24,
            multivariate=True,
            group=bool(space.branches),
            constant_liar=max(setup.together, settings.in_flight) > 1,
        )
        super().__init__(setup, space, sampler, "tpe")
        self.in_flight = settings.in_flight

    def waits_for(self, k: int) -> int:
        together = self.setup.together
        return max(0, k - self.in_flight + 1) if together == 1 else k - k % together

    def draw(self, k: int) -> optuna.trial.Trial:
        return self.draw_branch()
