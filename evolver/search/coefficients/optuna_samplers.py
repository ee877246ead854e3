"""Searches over merge coefficients by Optuna's samplers.

The coefficients are the total mass and the weights of the experts, which sum to 1, or other settings of a merge method;
for the whole model or for each layer group. The Optuna study is kept in memory and rebuilt by replaying the results. It
is told results in the order of the candidates only.

With TPE, candidate k is proposed on all results but the last ``in_flight - 1``, so that as many workers can be busy;
inside of halving, on all results of the batches before its own. With CMA-ES and NSGA-II, a generation of ``population``
candidates is proposed on all results of the generations before it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import optuna
from optuna.study import StudyDirection
from pydantic import Field

from evolver.config.section import Section
from evolver.errors import BadInput
from evolver.records import Candidate, Choice, Knob, Result
from evolver.records.objective import Objective, values_of
from evolver.search.base import Ordered, Setup, Space, algorithm


class CoefficientSettings(Section):
    """Which coefficients are searched. All of Optuna's samplers share these settings."""

    method: str = Field("task_arithmetic", description="merge method whose settings are tuned")
    layer_groups: int = Field(
        1,
        ge=1,
        le=10_000,
        description="number of groups of layers that get coefficients of their own; 1: one set for the whole model",
    )
    tune: list[str] | None = Field(
        None,
        min_length=1,
        description="names of the settings to tune; default: lambda (total mass), weight (weights that sum to 1), and "
        "settings without a default; all numbers of a method that has neither lambda nor weight",
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="fixed settings of the method, each as one value, a list (a gradient over the layers), or a list "
        "of {filter, value}",
    )


class TPESettings(CoefficientSettings):
    """Settings of the tree-structured Parzen estimator."""

    algorithm: Literal["tpe"] = Field(description="name of this search")
    startup: int = Field(
        10, ge=1, le=1_000_000, description="number of candidates that are drawn at random at the beginning"
    )
    in_flight: int = Field(1, ge=1, le=100_000, description="number of candidates in evaluation at the same time")


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


class NSGA2Settings(CoefficientSettings):
    """Settings of NSGA-II."""

    algorithm: Literal["nsga2"] = Field(description="name of this search")
    population: int = Field(12, ge=2, le=100_000, description="number of candidates of a generation")


class Coefficients(Ordered):
    """A search over a space of named numbers and choices by one of Optuna's samplers.

    Args:
        space: what is searched.
        sampler: Optuna's sampler.
        name: name of the search, which is noted with every candidate.
        objectives: number of objectives; more is better in all of them.
    """

    def __init__(
        self, setup: Setup, space: Space, sampler: optuna.samplers.BaseSampler, name: str, objectives: int = 1
    ) -> None:  # fmt: skip
        super().__init__(setup)
        self.space, self.name = space, name
        optuna.logging.set_verbosity(logging.WARNING)
        self.study = optuna.create_study(directions=[StudyDirection.MAXIMIZE] * objectives, sampler=sampler)
        # The first candidate is the merge with equal weights that sum to 1, which is a good guess without any results.
        self.study.enqueue_trial(space.encode_equal(mass=1.0))
        self._trials: dict[int, optuna.trial.Trial] = {}
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            k.name: _distribution(k) for k in space.knobs
        }

    def inform(self, pairs: Sequence[tuple[Candidate, Result]]) -> None:
        """See ``Informed``: models that lie in the search space become finished trials, from which TPE draws. CMA-ES
        and NSGA-II count trials of their own generations only.
        """
        told = set[str]()
        for candidate, result in pairs:
            if candidate.recipe.id not in told and self.receive(candidate, result):
                told.add(candidate.recipe.id)

    def receive(self, candidate: Candidate, result: Result) -> bool:
        """See ``Receives``: a model that lies in the search space becomes a finished trial."""
        point, values = self.space.encode(candidate.recipe), self.values(result)
        if point is None or values is None:
            return False
        given = values if isinstance(values, Sequence) else [values]
        self.study.add_trial(optuna.trial.create_trial(params=point, distributions=self._distributions, values=given))
        return True

    def propose(self, k: int) -> Candidate:
        trial = self.study.ask(self._distributions)
        self._trials[k] = trial
        return Candidate(k, self.space.decode(trial.params), self.name)

    def learn(self, candidate: Candidate, result: Result) -> None:
        trial, values = self._trials.pop(candidate.number), self.values(result)
        for number, violation in sorted(result.violations.items()) if self.constrained else ():
            trial.set_constraint(number, violation)
        if values is None:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(trial, values)

    def values(self, result: Result) -> float | Sequence[float] | None:
        """The objective values that the sampler is told of a result; None if the candidate failed."""
        return result.score

    @property
    def constrained(self) -> bool:
        """Whether the sampler takes constraints, and is told by how much a candidate breaks each of them."""
        return True


@algorithm("tpe", TPESettings)
class TPE(Coefficients):
    """The tree-structured Parzen estimator (Watanabe 2023, arXiv 2304.11127), by Optuna, multivariate.

    It models the densities of good and of poor candidates and proposes where their ratio is highest. Unlike ``cmaes``
    it also tunes choices, needs no generations, and assumes no single optimum around which the score falls off. With
    several candidates in evaluation, pending ones count as poor (constant liar).
    """

    def __init__(self, setup: Setup, settings: TPESettings) -> None:
        if setup.together > 1 and settings.in_flight > 1:
            raise BadInput(
                f"search.in_flight: inside halving, {setup.together} candidates are evaluated at the same time; leave "
                "in_flight out."
            )
        several = max(setup.together, settings.in_flight) > 1
        sampler = optuna.samplers.TPESampler(
            seed=setup.seed, n_startup_trials=settings.startup, multivariate=True, constant_liar=several
        )
        super().__init__(setup, _space(setup, settings), sampler, "tpe")
        self.in_flight = settings.in_flight

    def waits_for(self, k: int) -> int:
        together = self.setup.together
        return max(0, k - self.in_flight + 1) if together == 1 else k - k % together


@algorithm("cmaes", CMAESSettings)
class CMAES(Coefficients):
    """Covariance matrix adaptation evolution strategy (Hansen 2016, arXiv 1604.00772), by Optuna.

    It draws a generation of candidates from a normal distribution and moves the distribution towards the best of them.
    Unlike ``tpe`` it tunes numbers only and learns how they depend on each other; it assumes that the score changes
    smoothly with them.
    """

    def __init__(self, setup: Setup, settings: CMAESSettings) -> None:
        space = _space(setup, settings)
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
        super().__init__(setup, _space(setup, settings), sampler, "nsga2", len(self.objectives))
        self.population = settings.population

    def waits_for(self, k: int) -> int:
        return k - k % self.population

    def values(self, result: Result) -> Sequence[float] | None:
        return None if result.score is None else values_of(self.objectives, result.tasks)


def default_population(dimensions: int) -> int:
    """The default population of CMA-ES, 4 + ⌊3 ln d⌋ for d dimensions (Hansen 2016, table 1)."""
    return 4 + math.floor(3 * math.log(dimensions))


def _space(setup: Setup, settings: CoefficientSettings) -> Space:
    return setup.maker.space(settings.method, settings.layer_groups, settings.tune, settings.settings)


def _distribution(knob: Knob | Choice) -> optuna.distributions.BaseDistribution:
    if isinstance(knob, Choice):
        return optuna.distributions.CategoricalDistribution(knob.options)
    return optuna.distributions.FloatDistribution(knob.low, knob.high, log=knob.log)
