"""A portfolio of searches: a bandit gives the next candidates to the search that has paid lately."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from evolver.config.section import Section
from evolver.errors import BadInput
from evolver.records import UNKNOWN, Candidate, Result, Standing
from evolver.search.base import Setup, algorithm
from evolver.search.together.turns import Arm, Turns

MERGER = {"method": "task_arithmetic", "lambda": 1.0}


def usual_arms(layers: int) -> dict[str, dict[str, Any]]:
    """Two baselines, which any search should beat, and the ways to search beside them that models of so many layers
    allow.
    """
    arms: dict[str, dict[str, Any]] = {
        "tuned mass": {"algorithm": "tpe", "tune": ["lambda"]},
        "random": {"algorithm": "random"},
        "coefficients": {"algorithm": "cmaes"},
        "layers": {"algorithm": "cmaes", "layer_groups": min(3, layers)},
        "ties": {"algorithm": "tpe", "method": "ties"},
        "evolver": {"algorithm": "evolver", "mode": "generational", "generations": 1_000_000, "merger": MERGER},
    }
    return {name: arm for name, arm in arms.items() if name != "layers" or layers > 1}


class PortfolioSettings(Section):
    """Settings of a portfolio. The defaults of window and exploration are those of OpenTuner for far longer runs."""

    algorithm: Literal["portfolio"] = Field(description="name of this search")
    arms: dict[str, dict[str, Any]] | None = Field(
        None,
        description="the searches, by names of your own: algorithm and settings of each. Default: task arithmetic with "
        "its total mass tuned, random coefficients, cmaes, cmaes with three layer groups (or as many as there are "
        "layers), tpe over ties, and evolver with a merger",
    )
    turn: int = Field(4, ge=1, le=10_000, description="number of candidates that an arm proposes in one turn, at most")
    window: int = Field(100, ge=2, le=1_000_000, description="number of turns that the bandit remembers")
    exploration: float = Field(
        0.05, ge=0, le=100, description="how much the bandit prefers arms that had few turns lately; 0: not at all"
    )


@algorithm("portfolio", PortfolioSettings, incumbent=True)
class Portfolio(Turns):
    """Several searches under one budget by an AUC bandit (Fialho et al. 2010, GECCO; Ansel et al. 2014, OpenTuner).

    Every arm has one turn at first. Then the arm with the highest AUC + C·√(2 ln n / n_arm) follows, where n is the
    number of turns in the window and n_arm those of the arm. The AUC of an arm is Σ i·V_i / Σ i over its turns in the
    window, oldest first, with V_i = 1 if the turn found a new best of all arms: recent success counts most.

    Unlike ``islands``, arms never see each other's models, so what each has found is its own. It assumes that a search
    that has just improved the best score is more likely to do so again. No arm is ever given up for good.
    """

    def __init__(self, setup: Setup, settings: PortfolioSettings) -> None:
        self.settings = settings
        self._turns: list[tuple[int, bool]] = []  # of each turn the arm, and whether it found a new best
        self._best: Standing = UNKNOWN
        self._found = False
        self._playing = -1
        arms = usual_arms(_layers(setup)) if settings.arms is None else settings.arms
        super().__init__(setup, arms, "search.arms", settings.turn)

    def following(self) -> Sequence[Arm]:
        open_ = [n for n, arm in enumerate(self.arms) if not arm.search.done]
        self._playing = max(open_, key=lambda n: (self._worth(n), -n))
        return [self.arms[self._playing]]

    def learnt(self, arm: Arm, candidate: Candidate, result: Result) -> None:
        if result.complete and result.standing > self._best:
            self._found = self._found or self._best != UNKNOWN  # the very first result improves on nothing
            self._best = result.standing

    def turn_over(self) -> None:
        self._turns.append((self._playing, self._found))
        self._turns = self._turns[-self.settings.window :]
        self._found = False

    def _worth(self, number: int) -> float:
        """The bandit's index of an arm; infinite for one that has had no turn in the window."""
        own = [found for arm, found in self._turns if arm == number]
        if not own:
            return math.inf
        area = sum(i for i, found in enumerate(own, 1) if found) / (len(own) * (len(own) + 1) / 2)
        return area + self.settings.exploration * math.sqrt(2 * math.log(len(self._turns)) / len(own))


def _layers(setup: Setup) -> int:
    """The number of layers that can have coefficients of their own; 1 for models without layers."""
    try:
        return setup.maker.depth(anew=False)
    except BadInput:
        return 1
