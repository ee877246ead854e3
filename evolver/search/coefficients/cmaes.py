"""CMA-ES over merge coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, runtime_checkable

import optuna
from pydantic import Field

from evolver.errors import BadInput
from evolver.records import Candidate, Choice, Result
from evolver.records.leaders import leaders
from evolver.search.base import Ordered, Setup, Space, algorithm
from evolver.search.coefficients.base import Coefficients, CoefficientSettings, space_of, stated
from evolver.threads import single_thread


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


@runtime_checkable
class Started(Protocol):
    """A search space that says where the search begins: there the first generation is drawn."""

    @property
    def start(self) -> Mapping[str, float]:
        """A point of the space."""
        ...


@algorithm("cmaes", CMAESSettings)
def build_cmaes(setup: Setup, settings: CMAESSettings) -> CMAES | CMAESByMethod:
    """Covariance matrix adaptation evolution strategy (Hansen 2016, arXiv 1604.00772), by Optuna.

    It draws a generation of candidates from a normal distribution and moves the distribution towards the best of them.
    Unlike ``tpe`` it tunes numbers only and learns how they depend on each other; it assumes that the score changes
    smoothly with them. Of a list of methods, each has a search of its own; see ``CMAESByMethod``.

    Raises BadInput for settings that are no numbers.
    """
    space = space_of(setup.maker, settings)
    if not space.branches:
        return CMAES(setup, settings, space)
    return CMAESByMethod(setup, {name: CMAES(setup, settings, branch) for name, branch in space.branches.items()})


class CMAES(Coefficients):
    """CMA-ES over the settings of one method."""

    def __init__(self, setup: Setup, settings: CMAESSettings, space: Space) -> None:
        for knob in space.knobs:
            if isinstance(knob, Choice) and settings.recipe is not None:
                raise BadInput(
                    f"search.recipe: cmaes can only tune numbers, and {knob.name} is a choice among words; write one "
                    "of them in the file, or search with tpe or nsga2."
                )
            if isinstance(knob, Choice):
                raise BadInput(
                    f"search.tune: cmaes can only tune numbers, and {knob.name.partition('@')[0]} is a choice among "
                    "words; fix it in search.settings, or search with tpe or nsga2."
                )
        dimensions = len(space.knobs)
        self.population, self.penalty = settings.population or default_population(dimensions), settings.penalty
        self.settings = settings
        mean = dict(space.start) if isinstance(space, Started) else None
        super().__init__(setup, space, self._sampler(setup.seed, mean), "cmaes")

    def _sampler(self, seed: int, mean: dict[str, Any] | None) -> optuna.samplers.CmaEsSampler:
        """Optuna's sampler, whose first generation lies around a point; None: around the middle of all ranges."""
        sigma = self.settings.sigma
        return stated(
            optuna.samplers.CmaEsSampler,
            seed=seed,
            x0=mean,
            n_startup_trials=1,
            independent_sampler=optuna.samplers.RandomSampler(seed=seed),
            warn_independent_sampling=False,
            popsize=self.population,
            sigma0=1 / 6 if sigma is None else sigma,  # Optuna scales every range to one of length 1
            use_separable_cma=False,
            with_margin=False,
            lr_adapt=False,
        )

    def inform(self, pairs: Sequence[tuple[Candidate, Result]]) -> None:
        """See ``Informed``: the first generation is drawn around the best model that lies in the search space."""
        points = (self.space.encode(candidate.recipe) for candidate, _ in leaders(pairs))
        if (mean := next((point for point in points if point is not None), None)) is not None:
            self.study.sampler = self._sampler(self.setup.seed, mean)

    def draw(self, k: int) -> optuna.trial.Trial:
        with single_thread():
            return super().draw(k)

    def waits_for(self, k: int) -> int:
        # Candidate 0 is the enqueued first point, which belongs to no generation.
        return 0 if k == 0 else 1 + (k - 1) // self.population * self.population

    def values(self, result: Result) -> float | None:
        return None if result.score is None else result.score - self.penalty * result.violation

    @property
    def constrained(self) -> bool:
        return False


class CMAESByMethod(Ordered):
    """One CMA-ES for each of several methods, which take turns: every round holds a generation of each.

    They learn nothing from each other, because their dimensions are not the same. Every method gets the same number of
    generations to the end, good or poor. That wastes what the poor ones get; a search that gives more to what pays
    would be better, and ``tpe`` does so.

    Args:
        searches: by the name of the method.
    """

    def __init__(self, setup: Setup, searches: Mapping[str, CMAES]) -> None:
        super().__init__(setup)
        self.searches = searches
        self._names = list(searches)
        self._round = sum(search.population for search in searches.values())

    @property
    def studies(self) -> Mapping[str, optuna.study.Study]:
        """See ``Coefficients.studies``: one for each method."""
        return {name: search.study for name, search in self.searches.items()}

    def trial_of(self, number: int) -> tuple[str, int]:
        """See ``Coefficients.trial_of``."""
        name, own = self.place_of(number)
        return name, self.searches[name].trial_of(own)[1]

    def place_of(self, number: int) -> tuple[str, int]:
        """The method of a candidate, and its number in the search of this method.

        The first candidates are the first points of each, which belong to no generation; rounds come after them.
        """
        if number < len(self._names):
            return self._names[number], 0
        turn, place = divmod(number - len(self._names), self._round)
        for name, search in self.searches.items():
            if place < search.population:
                return name, 1 + turn * search.population + place
            place -= search.population
        raise AssertionError("a round holds a generation of every search")

    def waits_for(self, k: int) -> int:
        """The results of the generations of its own search, and of the searches before it in their last round."""
        count = len(self._names)
        if k < count:
            return 0
        name, own = self.place_of(k)
        turn = (own - 1) // self.searches[name].population
        if turn == 0:
            return self._names.index(name) + 1
        before = sum(self.searches[n].population for n in self._names[: self._names.index(name) + 1])
        return count + (turn - 1) * self._round + before

    def inform(self, pairs: Sequence[tuple[Candidate, Result]]) -> None:
        """See ``Coefficients.inform``: every search takes what lies in its space."""
        for search in self.searches.values():
            search.inform(pairs)

    def propose(self, k: int) -> Candidate:
        name, own = self.place_of(k)
        return replace(self.searches[name].propose(own), number=k)

    def learn(self, candidate: Candidate, result: Result) -> None:
        name, own = self.place_of(candidate.number)
        self.searches[name].learn(replace(candidate, number=own), result)


def default_population(dimensions: int) -> int:
    """The default population of CMA-ES, 4 + ⌊3 ln d⌋ for d dimensions (Hansen 2016, table 1)."""
    return 4 + math.floor(3 * math.log(dimensions))
