"""A genetic algorithm over merge coefficients: one objective, the score."""

from __future__ import annotations

from typing import Any, Literal

import optuna
from optuna.samplers.nsgaii import PolynomialMutation, SBXCrossover
from pydantic import Field

from evolver.records import Candidate, Knob
from evolver.search.base import Setup, algorithm
from evolver.search.coefficients.base import Coefficients, CoefficientSettings, space_of, stated

# How near children are to their parents: the distribution indices of the two operators (Deb and Agrawal 1995).
CROSSOVER_INDEX, MUTATION_INDEX = 15.0, 20.0


class GeneticSettings(CoefficientSettings):
    """Settings of the genetic algorithm."""

    algorithm: Literal["genetic"] = Field(description="name of this search")
    population: int = Field(12, ge=2, le=100_000, description="number of candidates of a generation")
    steps: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="number of equal steps into which the range of every number is divided, so that 10 allows 11 "
        "values; weights that sum to 1 and numbers on a log scale are not divided. Default: any value",
    )


@algorithm("genetic", GeneticSettings)
class Genetic(Coefficients):
    """A genetic algorithm with simulated binary crossover and polynomial mutation (Deb and Agrawal 1995; Deb et al.
    2002), by Optuna's NSGA-II with one objective.

    Of a generation and the one before it, the best candidates are the parents of the next generation; each parent is
    the better one of two that are drawn. Unlike ``nsga2`` it goes by the score alone and needs no second task; unlike
    ``cmaes`` it learns no directions, and it also tunes words. It assumes that good candidates have good neighbours,
    and that settings of two good candidates go well together. With ``steps``, children are often equal to earlier
    candidates, whose results the ledger holds, so they cost nothing.
    """

    def __init__(self, setup: Setup, settings: GeneticSettings) -> None:
        self.population, self.steps = settings.population, settings.steps
        sampler = stated(
            optuna.samplers.NSGAIISampler,
            seed=setup.seed,
            population_size=settings.population,
            mutation=stated(PolynomialMutation, eta=MUTATION_INDEX),
            mutation_prob=None,
            crossover=stated(SBXCrossover, eta=CROSSOVER_INDEX, uniform_crossover_prob=0.5, use_child_gene_prob=0.5),
            crossover_prob=0.9,
            swapping_prob=0.5,
        )
        super().__init__(setup, space_of(setup.maker, settings), sampler, "genetic")

    def waits_for(self, k: int) -> int:
        return k - k % self.population

    def propose(self, k: int) -> Candidate:
        trial = self.draw(k)
        self._trials[k] = trial
        return Candidate(k, self.space.decode({**trial.params, **self._stepped(trial.params)}), self.name)

    def _stepped(self, values: dict[str, Any]) -> dict[str, float]:
        """The numbers of a point, each moved to the nearest of its steps."""
        count = self.steps
        if count is None:
            return {}
        plain = [knob for knob in self.space.knobs if isinstance(knob, Knob) and not knob.log and "[" not in knob.name]
        shares = {knob: (values[knob.name] - knob.low) / (knob.high - knob.low) for knob in plain}
        return {knob.name: knob.at(round(share * count) / count) for knob, share in shares.items()}
