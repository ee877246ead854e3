"""Optuna's samplers over merge coefficients: total mass and simplex weights, for the model or for layer groups.

The study lives in memory and is rebuilt by replay; it is only ever told results in the order of the candidates. For
TPE, candidate k knows all results but the last ``in_flight - 1``, so that as many workers can be busy, or all those of
the batches before its own; for CMA-ES and NSGA-II, a generation of ``population`` candidates knows all generations
before it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import optuna
from optuna.study import StudyDirection
from pydantic import Field

from evolver.config import Section
from evolver.errors import BadInput
from evolver.records import Candidate, Choice, Knob, Result
from evolver.search.base import Ordered, Setup, Space, algorithm


class CoefficientSettings(Section):
    """Which coefficients are searched; shared by all of Optuna's samplers."""

    method: str = Field("task_arithmetic", description="merge method")
    layer_groups: int = Field(1, ge=1, description="groups of layers with coefficients of their own; 1: whole model")
    tune: list[str] | None = Field(
        None,
        min_length=1,
        description="settings to tune; default: total mass and simplex weights, or all numbers where it has neither",
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="fixed settings of the method: values, gradients over the layers, lists of {filter, value}",
    )


class TPESettings(CoefficientSettings):
    """Settings of the tree-structured Parzen estimator."""

    algorithm: Literal["tpe"]
    startup: int = Field(10, ge=1, description="candidates drawn at random before the model is used")
    in_flight: int = Field(1, ge=1, description="candidates that may be evaluated at the same time")


class CMAESSettings(CoefficientSettings):
    """Settings of CMA-ES."""

    algorithm: Literal["cmaes"]
    population: int | None = Field(None, ge=2, description="candidates of a generation; default 4 + 3 ln(dimensions)")
    sigma: float | None = Field(None, gt=0, description="first step size; default a sixth of the range")


class NSGA2Settings(CoefficientSettings):
    """Settings of NSGA-II."""

    algorithm: Literal["nsga2"]
    population: int = Field(12, ge=2, description="candidates of a generation")


class Coefficients(Ordered):
    """A search over named numbers by one of Optuna's samplers."""

    def __init__(
        self, setup: Setup, space: Space, sampler: optuna.samplers.BaseSampler, name: str, objectives: int = 1
    ) -> None:  # fmt: skip
        super().__init__(setup)
        self.space, self.name = space, name
        optuna.logging.set_verbosity(logging.WARNING)
        self.study = optuna.create_study(directions=[StudyDirection.MAXIMIZE] * objectives, sampler=sampler)
        # The equal-weights merge at the mass of an average is what every search can know without looking.
        self.study.enqueue_trial(space.encode_equal(mass=1.0))
        self._trials: dict[int, optuna.trial.Trial] = {}
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            k.name: _distribution(k) for k in space.knobs
        }

    def propose(self, k: int) -> Candidate:
        trial = self.study.ask(self._distributions)
        self._trials[k] = trial
        return Candidate(k, self.space.decode(trial.params), self.name)

    def learn(self, candidate: Candidate, result: Result) -> None:
        trial, values = self._trials.pop(candidate.number), self.values(result)
        if values is None:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(trial, values)

    def values(self, result: Result) -> float | Sequence[float] | None:
        """What the sampler is told of a result; None: it has failed."""
        return result.score


@algorithm("tpe", TPESettings)
class TPE(Coefficients):
    """Tree-structured Parzen estimator (Watanabe 2023, arXiv 2304.11127), multivariate, with constant liar."""

    def __init__(self, setup: Setup, settings: TPESettings) -> None:
        if setup.together > 1 and settings.in_flight > 1:
            raise BadInput(f"search.in_flight: candidates come in batches of {setup.together} here; leave it out.")
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
    """Covariance matrix adaptation (Hansen 2016, arXiv 1604.00772), a generation at a time."""

    def __init__(self, setup: Setup, settings: CMAESSettings) -> None:
        space = _space(setup, settings)
        for knob in space.knobs:
            if isinstance(knob, Choice):
                raise BadInput(
                    f"search.tune: cmaes tunes numbers, and {knob.name.partition('@')[0]} is a choice; fix it in "
                    "search.settings, or search with tpe or nsga2."
                )
        dimensions = len(space.knobs)
        self.population = settings.population or default_population(dimensions)
        sampler = optuna.samplers.CmaEsSampler(
            seed=setup.seed, popsize=self.population, sigma0=settings.sigma, n_startup_trials=1
        )
        super().__init__(setup, space, sampler, "cmaes")

    def waits_for(self, k: int) -> int:
        # Candidate 0 is the enqueued start, which is outside the generations.
        return 0 if k == 0 else 1 + (k - 1) // self.population * self.population


@algorithm("nsga2", NSGA2Settings)
class NSGA2(Coefficients):
    """NSGA-II (Deb et al. 2002): every task is an objective of its own, and the generations move towards the front of
    what no other candidate beats in all of them. The winner is the one of the highest score, as everywhere.
    """

    def __init__(self, setup: Setup, settings: NSGA2Settings) -> None:
        if len(setup.tasks) < 2:
            raise BadInput("search.algorithm: nsga2 needs two tasks at least, as objectives; choose tpe or cmaes.")
        sampler = optuna.samplers.NSGAIISampler(seed=setup.seed, population_size=settings.population)
        super().__init__(setup, _space(setup, settings), sampler, "nsga2", len(setup.tasks))
        self.population = settings.population

    def waits_for(self, k: int) -> int:
        return k - k % self.population

    def values(self, result: Result) -> Sequence[float] | None:
        return result.objectives(self.setup.tasks)


def default_population(dimensions: int) -> int:
    """4 + ⌊3 ln d⌋ (Hansen 2016, table 1)."""
    return 4 + math.floor(3 * math.log(dimensions))


def _space(setup: Setup, settings: CoefficientSettings) -> Space:
    return setup.maker.space(settings.method, settings.layer_groups, settings.tune, settings.settings)


def _distribution(knob: Knob | Choice) -> optuna.distributions.BaseDistribution:
    if isinstance(knob, Choice):
        return optuna.distributions.CategoricalDistribution(knob.options)
    return optuna.distributions.FloatDistribution(knob.low, knob.high, log=knob.log)
