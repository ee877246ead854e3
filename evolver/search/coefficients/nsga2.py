"""NSGA-II over merge coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import optuna
from optuna.samplers.nsgaii import UniformCrossover
from pydantic import Field

from evolver.errors import BadInput
from evolver.records import Result
from evolver.records.objective import Objective, values_of
from evolver.search.base import Setup, algorithm
from evolver.search.coefficients.base import Coefficients, CoefficientSettings, space_of, stated


class NSGA2Settings(CoefficientSettings):
    """Settings of NSGA-II."""

    algorithm: Literal["nsga2"] = Field(description="name of this search")
    population: int = Field(12, ge=2, le=100_000, description="number of candidates of a generation")


class FrontSearch(Coefficients):
    """Generations that move towards the Pareto front: what NSGA-II and NSGA-III share.

    Of several methods, a candidate holds the settings of all, of which those of its own method count. The others are
    handed on to its children, which may use them again.

    Args:
        sampler: Optuna's sampler, with generations of ``population`` candidates.

    Raises BadInput for fewer than two tasks.
    """

    def __init__(
        self, setup: Setup, settings: CoefficientSettings, sampler: optuna.samplers.BaseSampler, name: str,
        population: int,
    ) -> None:  # fmt: skip
        self.objectives, self.population = objectives_for(setup, name), population
        super().__init__(setup, space_of(setup.maker, settings), sampler, name, len(self.objectives))

    def waits_for(self, k: int) -> int:
        return k - k % self.population

    def values(self, result: Result) -> Sequence[float] | None:
        return None if result.score is None else values_of(self.objectives, result.tasks)


@algorithm("nsga2", NSGA2Settings, several=True)
class NSGA2(FrontSearch):
    """NSGA-II (Deb et al. 2002), by Optuna: every task is an objective of its own, or ``objectives`` says which are.

    Its generations move towards the Pareto front, the candidates that no other one beats in all objectives. Unlike
    ``tpe`` and ``cmaes`` it does not weigh them against each other while it searches. Of equally good candidates it
    prefers those that are alone on their part of the front, which works for two or three objectives. The winner of the
    run is still the candidate with the highest score.
    """

    def __init__(self, setup: Setup, settings: NSGA2Settings) -> None:
        sampler = stated(
            optuna.samplers.NSGAIISampler,
            seed=setup.seed,
            population_size=settings.population,
            **genetic_operators(),
        )
        super().__init__(setup, settings, sampler, "nsga2", settings.population)


def genetic_operators() -> dict[str, object]:
    """How Optuna makes a child: with probability 0.9 each number comes from one of two parents, and each number is
    drawn anew with probability one in their count.
    """
    return {
        "mutation": None, "mutation_prob": None, "crossover": UniformCrossover(0.5), "crossover_prob": 0.9,
        "swapping_prob": 0.5,
    }  # fmt: skip


def objectives_for(setup: Setup, name: str) -> tuple[Objective, ...]:
    """The objectives of a run: those that it names, or every task.

    Raises BadInput for fewer than two tasks.
    """
    if len(setup.tasks) < 2:
        raise BadInput(
            f"search.algorithm: {name} needs at least two tasks, which are its objectives; choose tpe or cmaes."
        )
    return setup.objectives or tuple(Objective(task, {task: 1.0}) for task in setup.tasks)
