"""Random search over merge coefficients."""

from __future__ import annotations

from typing import Literal

import optuna
from pydantic import Field

from evolver.search.base import Setup, algorithm
from evolver.search.coefficients.base import space_of
from evolver.search.coefficients.independent import Independent, IndependentSettings


class RandomSettings(IndependentSettings):
    """Settings of random search."""

    algorithm: Literal["random"] = Field(description="name of this search")


@algorithm("random", RandomSettings)
class RandomSearch(Independent):
    """Random search (Bergstra & Bengio 2012, JMLR 13): after the merge with equal weights, uniform draws.

    Numbers are uniform in their range (on a log scale where the setting has one), weights are uniform among all that
    sum to 1, and of several methods each is as likely as another one. It learns nothing, so it is what every other
    search has to beat, and unlike theirs its candidates can be scored all at the same time. It assumes nothing.
    """

    def __init__(self, setup: Setup, settings: RandomSettings) -> None:
        super().__init__(setup, space_of(setup.maker, settings), settings, "random")

    def draw(self, k: int) -> optuna.trial.Trial:
        return self.draw_branch()
