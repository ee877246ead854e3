"""NSGA-II over merge coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import optuna
from pydantic import Field

from evolver.errors import BadInput
from evolver.records import Result
from evolver.records.objective import Objective, values_of
from evolver.search.base import Setup, algorithm
from evolver.search.coefficients.base import Coefficients, CoefficientSettings, space_of


class NSGA2Settings(CoefficientSettings):
    """Settings of NSGA-II."""

    algorithm: Literal["nsga2"] = Field(description="name of this search")
    population: int = Field(12, ge=2, le=100_000, description="number of candidates of a generation")


@algorithm("nsga2", NSGA2Settings)
class NSGA2(Coefficients):
    """NSGA-II (Deb et al. 2002), by Optuna: every task is an objective of its own, or ``objectives`` says which are.

    Its generations move towards the Pareto front, the candidates that no other one beats in all objectives. Unlike
    ``tpe`` and ``cmaes`` it does not weigh them against each other while it searches. The winner of the run is still
    the candidate with the highest score.
    """

    def __init__(self, setup: Setup, settings: NSGA2Settings) -> None:
        if len(setup.tasks) < 2:
            raise BadInput(
                "search.algorithm: nsga2 needs at least two tasks, which are its objectives; choose tpe or cmaes."
            )
        sampler = optuna.samplers.NSGAIISampler(seed=setup.seed, population_size=settings.population)
        self.objectives = setup.objectives or tuple(Objective(task, {task: 1.0}) for task in setup.tasks)
        super().__init__(setup, space_of(setup, settings), sampler, "nsga2", len(self.objectives))
        self.population = settings.population

    def waits_for(self, k: int) -> int:
        return k - k % self.population

    def values(self, result: Result) -> Sequence[float] | None:
        return None if result.score is None else values_of(self.objectives, result.tasks)
