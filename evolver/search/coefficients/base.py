"""Searches over merge coefficients by Optuna's samplers: what all of them share.

The coefficients are the total mass and the weights of the experts, which sum to 1, or other settings of a merge method;
for the whole model or for each layer group. The Optuna study is kept in memory and rebuilt by replaying the results. It
is told results in the order of the candidates only.

With TPE, candidate k is proposed on all results but the last ``in_flight - 1``, so that as many workers can be busy;
inside of halving, on all results of the batches before its own. With CMA-ES and NSGA-II, a generation of ``population``
candidates is proposed on all results of the generations before it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.study import StudyDirection
from pydantic import Field

from evolver.config.section import Section
from evolver.records import Candidate, Choice, Knob, Result
from evolver.search.base import Ordered, Setup, Space


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
            point, values = self.space.encode(candidate.recipe), self.values(result)
            if point is None or values is None or candidate.recipe.id in told:
                continue
            told.add(candidate.recipe.id)
            given = values if isinstance(values, Sequence) else [values]
            self.study.add_trial(
                optuna.trial.create_trial(params=point, distributions=self._distributions, values=given)
            )

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


def space_of(setup: Setup, settings: CoefficientSettings) -> Space:
    """The search space that the settings describe."""
    return setup.maker.space(settings.method, settings.layer_groups, settings.tune, settings.settings)


def _distribution(knob: Knob | Choice) -> optuna.distributions.BaseDistribution:
    if isinstance(knob, Choice):
        return optuna.distributions.CategoricalDistribution(knob.options)
    return optuna.distributions.FloatDistribution(knob.low, knob.high, log=knob.log)
