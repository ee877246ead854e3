"""Searches that ask for no results: what random draws, Sobol sequences and grids share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from pydantic import Field

from evolver.records import Result
from evolver.search.base import Setup, Space
from evolver.search.coefficients.base import Coefficients, CoefficientSettings, refuse_in_flight


class IndependentSettings(CoefficientSettings):
    """Settings of searches whose candidates depend on no results."""

    in_flight: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="number of candidates in evaluation at the same time; it changes no candidate, only how many more "
        "are scored when a budget of items, patience or a target ends the search; default: 1 with such a budget, any "
        "number with another one",
    )


class Independent(Coefficients):
    """A search whose candidates depend on the seed alone, so that any number of them can be scored at the same time.

    Args:
        limit: number of candidates after which the search ends; None: no limit of its own.
    """

    def __init__(
        self, setup: Setup, space: Space, settings: IndependentSettings, name: str, limit: int | None = None
    ) -> None:
        refuse_in_flight(setup, settings.in_flight)
        budget = setup.budget
        looks = any(limit is not None for limit in (budget.items, budget.patience, budget.target))
        self.in_flight = settings.in_flight or (1 if looks else None)
        # Where a search makes its points itself, this sampler is asked for nothing.
        super().__init__(setup, space, optuna.samplers.RandomSampler(seed=setup.seed), name, limit=limit)

    def waits_for(self, k: int) -> int:
        if self.setup.together > 1:
            return k - k % self.setup.together
        return 0 if self.in_flight is None else max(0, k - self.in_flight + 1)

    def place(self, point: Mapping[str, Any]) -> optuna.trial.Trial:
        """A trial at a point that the search has made itself."""
        self.study.enqueue_trial(dict(point))
        return self.study.ask({name: self.distributions[name] for name in point})

    def tell(self, result: Result) -> None:
        super().tell(result)
        if self.in_flight is None:  # no candidate waits for results, so they would be kept to the end
            self._learn_up_to(len(self._asked))
