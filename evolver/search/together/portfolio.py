"""A portfolio of searches: the further ahead a search is, the more of the candidates are its own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from evolver.config.section import Section
from evolver.errors import BadInput
from evolver.records import UNKNOWN, Candidate, Result, Standing
from evolver.search.base import Setup, algorithm
from evolver.search.together.turns import Arm, Turns

# The total mass that it begins with evolves, as the best one is another on every pool of experts.
EVOLVER = {
    "algorithm": "evolver",
    "mode": "generational",
    "generations": 1_000_000,
    "merger": {"method": "task_arithmetic", "lambda": 1.0},
    "adapt": ["lambda"],
}


def usual_arms(layers: int) -> dict[str, dict[str, Any]]:
    """Two baselines, which any search should beat, and the ways to search beside them that models of so many layers
    allow.
    """
    return {
        "tuned mass": {"algorithm": "tpe", "tune": ["lambda"]},
        "random": {"algorithm": "random"},
        "coefficients": {"algorithm": "cmaes", "layer_groups": min(3, layers)},
        "ties": {"algorithm": "tpe", "method": "ties"},
        "evolver": EVOLVER,
        "weights": {"algorithm": "shade", "generations": 1_000_000},
    }


class PortfolioSettings(Section):
    """Settings of a portfolio."""

    algorithm: Literal["portfolio"] = Field(description="name of this search")
    arms: dict[str, dict[str, Any]] | None = Field(
        None,
        description="the searches, by names of your own: algorithm and settings of each. Default: task arithmetic with "
        "its total mass tuned, random coefficients, cmaes with three layer groups (or as many as there are layers), "
        "tpe over ties, evolver with a merger whose total mass evolves, and shade",
    )
    turn: int = Field(4, ge=1, le=10_000, description="number of candidates that an arm proposes in one turn, at most")
    eta: float = Field(
        2.0,
        ge=1,
        le=100,
        description="how many times more candidates a search gets than the one that ranks behind it; 1: as many",
    )


@algorithm("portfolio", PortfolioSettings, incumbent=True)
class Portfolio(Turns):
    """Several searches under one budget, shared as by successive halving (Jamieson and Talwalkar 2016, AISTATS).

    After one turn each, the arms are ranked by the best model that each has found. The next turn is that of the arm
    with the lowest n·eta^min(r, L), where n is the number of its candidates so far, r its rank from 0, and L = ⌈log of
    the number of arms to the base eta⌉, the number of halvings. So the arm that leads gets about half of all, the
    second half as many as the first, and so on, as in a bracket of successive halving; but no budget has to be known,
    and an arm that falls behind can come back.

    Unlike ``islands``, arms never see each other's models, so what each has found is its own. It assumes that a search
    that is ahead stays ahead.
    """

    def __init__(self, setup: Setup, settings: PortfolioSettings) -> None:
        arms = usual_arms(_layers(setup)) if settings.arms is None else settings.arms
        self.settings = settings
        self._scored: Counter[str] = Counter()
        self._best: dict[str, Standing] = {}
        self._halvings = math.ceil(math.log(max(2, len(arms)), settings.eta)) if settings.eta > 1 else 0
        super().__init__(setup, arms, "search.arms", settings.turn)

    def following(self) -> Sequence[Arm]:
        ranked = sorted(self.arms, key=lambda arm: self._best.get(arm.name, UNKNOWN), reverse=True)
        rank = {arm.name: min(place, self._halvings) for place, arm in enumerate(ranked)}
        return sorted(ranked, key=lambda arm: self._scored[arm.name] * self.settings.eta ** rank[arm.name])

    def learnt(self, arm: Arm, candidate: Candidate, result: Result) -> None:
        self._scored[arm.name] += 1
        self._best[arm.name] = max(self._best.get(arm.name, UNKNOWN), result.standing)


def _layers(setup: Setup) -> int:
    """The number of layers that can have coefficients of their own; 1 for models without layers."""
    try:
        return setup.maker.depth(anew=False)
    except BadInput:
        return 1
