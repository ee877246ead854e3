"""Searches over merge coefficients by Optuna's samplers: what all of them share.

The coefficients are the total mass and the weights of the experts, which sum to 1, or other settings of a merge method;
for the whole model or for places of it. The method itself may be one of several. The Optuna study is kept in memory and
rebuilt by replaying the results. It is told results in the order of the candidates only.

With TPE and GP, candidate k is proposed on all results but the last ``in_flight - 1``, so that as many workers can be
busy; inside of halving, on all results of the batches before its own. With CMA-ES, NSGA-II and NSGA-III, a generation
of ``population`` candidates is proposed on all results of the generations before it. Random draws, Sobol sequences and
grids wait for no results.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.samplers.nsgaii import BaseCrossover, BaseMutation
from optuna.study import Study, StudyDirection
from pydantic import Field, field_validator

from evolver.config.corrections import AfterSettings
from evolver.config.recipes import RECIPE_KEY
from evolver.config.section import Section
from evolver.errors import BadInput
from evolver.records import Candidate, Choice, Knob, Result
from evolver.search.base import Maker, Ordered, Setup, Space

# What a trial has beside its point if the search did not propose it: the number of the candidate that was received.
RECEIVED = "received"


class CoefficientSettings(Section):
    """Which coefficients are searched. All of Optuna's samplers share these settings."""

    method: str | list[str] = Field(
        "task_arithmetic",
        description="merge method whose settings are tuned; with a list, the method is searched, too, and tune and "
        "settings hold for those of the methods that have them",
    )
    layer_groups: int | Literal["per-layer"] = Field(
        1,
        description="number of groups of layers that get coefficients of their own, up to 10,000; 1: one set for the "
        "whole model; per-layer: a set for every layer",
    )
    tensor_classes: bool = Field(
        False,
        description="whether attention, MLP, norms and all other tensors get coefficients of their own, told apart by "
        "the tensors' names",
    )
    knots: int | None = Field(
        None,
        ge=2,
        le=10_000,
        description="instead of layer_groups: coefficients at so many knots at equal distances along the layers, "
        "interpolated on straight lines between them, as a gradient in settings is",
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

    after: list[AfterSettings] = Field(
        default_factory=list,
        description="methods that every merge goes through, one after the other, such as aim; their numbers are tuned, "
        "too",
    )
    recipe: str | dict[str, Any] | list[dict[str, Any]] | None = Field(
        None,
        description="instead of all settings above but after: a mergekit file in which values are left free, as "
        "{search: [0, 1.5]} or ?; each of them is a dimension of the search. Its path, or the file itself as a mapping",
    )

    @field_validator("layer_groups", mode="before")
    @classmethod
    def _some_groups(cls, groups: Any) -> Any:
        if groups != "per-layer" and (type(groups) is not int or not 1 <= groups <= 10_000):
            raise ValueError(f"{groups!r} is not usable; write a number from 1 to 10000, or per-layer")
        return groups

    @field_validator("method")
    @classmethod
    def _some_method(cls, method: str | list[str]) -> str | list[str]:
        if not method:
            raise ValueError("no method is named; write one, such as task_arithmetic, or a list of several")
        return method


class Coefficients(Ordered):
    """A search over a space of named numbers and choices by one of Optuna's samplers.

    Args:
        space: what is searched.
        sampler: Optuna's sampler.
        name: name of the search, which is noted with every candidate.
        objectives: number of objectives; more is better in all of them.
        limit: number of candidates after which the search ends; None: no limit of its own.
    """

    def __init__(
        self, setup: Setup, space: Space, sampler: BaseSampler, name: str, objectives: int = 1,
        limit: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(setup, limit)
        self.space, self.name = space, name
        optuna.logging.set_verbosity(logging.WARNING)
        self.study = optuna.create_study(directions=[StudyDirection.MAXIMIZE] * objectives, sampler=sampler)
        self._trials: dict[int, optuna.trial.Trial] = {}
        self.distributions: dict[str, optuna.distributions.BaseDistribution] = {
            k.name: _distribution(k) for k in space.knobs
        }
        self.start()

    def start(self) -> None:
        """Line up the first candidates: of every method the merge with equal weights that sum to 1, which is a good
        guess without any results.
        """
        for point in equal_points(self.space):
            self.study.enqueue_trial(point)

    @property
    def studies(self) -> Mapping[str, Study]:
        """The studies that the search consists of, by what tells them apart."""
        return {"": self.study}

    def trial_of(self, number: int) -> tuple[str, int]:
        """The study of a candidate that was asked for and not told yet, and the number of its trial there."""
        return "", self._trials[number].number

    def inform(self, pairs: Sequence[tuple[Candidate, Result]]) -> None:
        """See ``Informed``: models that lie in the search space become finished trials, from which TPE and GP learn.
        CMA-ES, NSGA-II and NSGA-III count trials of their own generations only.
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
        own = {name: self.distributions[name] for name in point}
        broken = dict(self.violations(result)) if self.constrained else {}
        self.study.add_trial(
            optuna.trial.create_trial(
                params=point, distributions=own, values=given, constraints=broken or None,
                user_attrs={RECEIVED: candidate.number},
            )
        )  # fmt: skip
        return True

    def propose(self, k: int) -> Candidate:
        trial = self.draw(k)
        self._trials[k] = trial
        return Candidate(k, self.space.decode(trial.params), self.name)

    def draw(self, k: int) -> optuna.trial.Trial:
        """Ask the sampler for the point of candidate ``k``. Of several methods, the dimensions of all are drawn."""
        return self.study.ask(self.distributions)

    def draw_branch(self) -> optuna.trial.Trial:
        """Ask the sampler for a method first, and then for the dimensions of this method alone."""
        if not self.space.branches:
            return self.study.ask(self.distributions)
        trial = self.study.ask()
        choice, *_ = self.space.knobs
        branch = str(_suggest(trial, choice.name, self.distributions[choice.name]))
        for name in branch_names(self.space, branch):
            _suggest(trial, name, self.distributions[name])
        return trial

    def learn(self, candidate: Candidate, result: Result) -> None:
        trial, values = self._trials.pop(candidate.number), self.values(result)
        for number, violation in sorted(self.violations(result).items()) if self.constrained else ():
            trial.set_constraint(number, violation)
        if values is None:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(trial, values)

    def values(self, result: Result) -> float | Sequence[float] | None:
        """The objective values that the sampler is told of a result; None if the candidate failed."""
        return result.score

    def violations(self, result: Result) -> Mapping[str, float]:
        """By how much a candidate breaks each constraint, as the sampler is told it."""
        return result.violations

    @property
    def constrained(self) -> bool:
        """Whether the sampler takes constraints, and is told by how much a candidate breaks each of them."""
        return True


Sampling = TypeVar("Sampling", bound=BaseSampler | BaseMutation | BaseCrossover)


def stated(kind: Callable[..., Sampling], **settings: Any) -> Sampling:
    """One of Optuna's samplers, or a part of one, with these settings, without the warnings that one of them is
    experimental, or will go with Optuna 6. They are stated because Optuna's defaults have changed from release to
    release.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return kind(**settings)


def space_of(maker: Maker, settings: CoefficientSettings) -> Space:
    """The search space that the settings describe.

    Raises BadInput for settings that a mergekit file says itself.
    """
    if settings.recipe is None:
        return maker.space(
            settings.method, settings.layer_groups, settings.tune, settings.settings, settings.tensor_classes,
            settings.knots, settings.after,
        )  # fmt: skip
    for key, field in CoefficientSettings.model_fields.items():
        given = getattr(settings, key) != field.get_default(call_default_factory=True)
        if given and key not in (RECIPE_KEY, "after"):
            raise BadInput(
                f"search.{key}: what is searched stands in the file that search.{RECIPE_KEY} names; leave {key} out."
            )
    return maker.space_in(settings.recipe, settings.after)


def equal_points(space: Space) -> list[dict[str, Any]]:
    """The points with equal weights that sum to 1: one, or one for each of the methods among which a point chooses."""
    equal = space.encode_equal(mass=1.0)
    return [{**equal, **space.within(branch, {})} for branch in space.branches] or [equal]


def branch_names(space: Space, branch: str) -> list[str]:
    """The names of the dimensions of a point that chooses this branch; the choice itself comes first."""
    return list(space.within(branch, {knob.name: knob for knob in space.branches[branch].knobs}))


def refuse_in_flight(setup: Setup, in_flight: int | None) -> None:
    """Raises BadInput for candidates in flight inside of halving, which decides itself how many there are."""
    if setup.together > 1 and in_flight not in (None, 1):
        raise BadInput(
            f"search.in_flight: inside halving, {setup.together} candidates are evaluated at the same time; leave "
            "in_flight out."
        )


def _suggest(trial: optuna.trial.Trial, name: str, kind: optuna.distributions.BaseDistribution) -> Any:
    if isinstance(kind, optuna.distributions.CategoricalDistribution):
        return trial.suggest_categorical(name, kind.choices)
    assert isinstance(kind, optuna.distributions.FloatDistribution)
    return trial.suggest_float(name, kind.low, kind.high, log=kind.log)


def _distribution(knob: Knob | Choice) -> optuna.distributions.BaseDistribution:
    if isinstance(knob, Choice):
        return optuna.distributions.CategoricalDistribution(knob.options)
    return optuna.distributions.FloatDistribution(knob.low, knob.high, log=knob.log)
