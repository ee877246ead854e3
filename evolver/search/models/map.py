"""MAP: a quadratic surrogate of every task's score, fitted to sampled mixtures, and the best points that it predicts.

First ``samples`` mixtures are scored. Then, again and again, a quadratic function of the experts' coefficients c is
fitted to each task's scores and to the run's score, q(c) = cᵀAc + bᵀc + d, by least squares with a ridge on A and b.
The next ``batch`` candidates are the point with the best predicted score, and points of the predicted Pareto front of
the tasks, those that add most to its hypervolume.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import minimize
from scipy.stats import qmc

from evolver.config.section import Section
from evolver.records import UNKNOWN, Candidate, Result, Standing
from evolver.records.objective import Objective, values_of
from evolver.search.base import Ordered, Setup, algorithm
from evolver.search.front import front, thinned
from evolver.search.models.mixtures import MixturePoint, mixture_of, one_hot
from evolver.threads import single_thread

# (points, experts), (points, objectives), and the numbers of a quadratic function (terms,).
Points = NDArray[np.float64]
# Points at which a surrogate is looked at, and the best of them from which its maximum is climbed.
PROBED, CLIMBED = 1024, 4
# Points of a predicted front that are compared by their hypervolume, which takes its time.
THINNED_FROM = 64
# Decimals of a coefficient: what a solver finds differs in later ones from one processor to another.
MAP_DECIMALS = 4
# Standard deviation of a point around the best one, where the predicted front has too few.
STRAY = 0.1


class MAPSettings(Section):
    """Settings of MAP."""

    algorithm: Literal["map"] = Field(description="name of this search")
    samples: int | None = Field(
        None,
        ge=3,
        le=1_000_000,
        description="number of mixtures that are scored before the first fit; default: (experts + 1)·(experts + 2), "
        "twice as many as the surrogate has numbers",
    )
    high: float = Field(1.0, ge=0.01, le=10, description="largest coefficient of an expert; the smallest is 0")
    ridge: float = Field(
        1e-4, ge=0, le=1e6, description="ridge on the surrogate's terms that are not constant, for each scored point"
    )
    batch: int = Field(4, ge=1, le=100_000, description="number of candidates that are proposed from one fit")


@algorithm("map", MAPSettings)
class MAP(Ordered):
    """MAP: merging with amortized Pareto fronts (Li et al. 2024, arXiv 2406.07529).

    The paper fits once to sampled mixtures and stops; here the predicted points are scored, and the fit is repeated
    with them. The paper puts the quadratic function into a sigmoid; here it is the score itself, so that each fit is
    one linear system and scores need not lie between 0 and 1. Unlike ``tpe`` and ``cmaes`` it assumes that a quadratic
    function of the coefficients describes the scores, and it needs few candidates where that is true. Constraints are
    not modelled: a point that breaks them helps the fit and is not the best one.
    """

    def __init__(self, setup: Setup, settings: MAPSettings) -> None:
        super().__init__(setup)
        count = len(setup.experts)
        self.settings, self.first = settings, settings.samples or (count + 1) * (count + 2)
        self.objectives = setup.objectives or tuple(Objective(task, {task: 1.0}) for task in setup.tasks)
        self.places = _samples(count, self.first, settings.high, setup.seed)
        # Scored points, each with the run's score and the values of the objectives.
        self.points: list[MixturePoint] = []
        self.values: list[tuple[float, ...]] = []
        self.best: tuple[Standing, MixturePoint] = (UNKNOWN, (settings.high / count,) * count)
        self._pending: dict[int, MixturePoint] = {}
        self._predicted: list[MixturePoint] = []

    def waits_for(self, k: int) -> int:
        size = self.settings.batch
        return 0 if k < self.first else self.first + (k - self.first) // size * size

    def propose(self, k: int) -> Candidate:
        place = self.places[k] if k < self.first else self._next(k)
        self._pending[k] = place
        experts = self.setup.experts
        used = tuple(e.id for e, c in zip(experts, place, strict=True) if c)
        recipe = mixture_of(experts, self.setup.base, place)
        return Candidate(k, recipe, "map/sample" if k < self.first else "map", used)

    def learn(self, candidate: Candidate, result: Result) -> None:
        place = self._pending.pop(candidate.number)
        values = values_of(self.objectives, result.tasks)
        if result.score is None or values is None:
            return
        self.points.append(place)
        self.values.append((result.score, *values))
        if result.standing > self.best[0]:
            self.best = (result.standing, place)

    def _next(self, k: int) -> MixturePoint:
        place = (k - self.first) % self.settings.batch
        if place == 0:
            with single_thread():
                self._predicted = self._predict(k)
        return self._predicted[place]

    def _predict(self, k: int) -> list[MixturePoint]:
        """The points of a batch, of which none was proposed before."""
        count, high = len(self.setup.experts), self.settings.high
        looked = high * qmc.Sobol(count, rng=np.random.default_rng([self.setup.seed, k])).random(PROBED)
        found: list[MixturePoint] = []
        if self.points:
            measured = np.asarray(self.points)
            fits = [fitted(measured, column, self.settings.ridge) for column in np.asarray(self.values).T]
            looked = np.concatenate([looked, measured])
            found = [_point(climbed(fits[0], looked, high)), *_spread(fits[1:], looked, self.settings.batch - 1)]
        draw = random.Random(f"{self.setup.seed}:map:{k}")
        known, out = set(self.points), list[MixturePoint]()
        while len(out) < self.settings.batch:
            place = found.pop(0) if found else _point([_near(c, high, draw) for c in self.best[1]])
            if place not in known:
                known.add(place)
                out.append(place)
        return out


def terms(points: Points) -> Points:
    """The terms of a quadratic function of each point: 1, c_i, and c_i·c_j for i ≤ j; (points, terms)."""
    one, other = np.triu_indices(points.shape[1])
    return np.concatenate([np.ones((len(points), 1)), points, points[:, one] * points[:, other]], axis=1)


def fitted(points: Points, scores: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    """The numbers of the quadratic function that is nearest to the scores of these points, (terms,).

    It minimises Σ (q(c) − score)² + points · ridge · |numbers but the constant|².
    """
    design = terms(points)
    damped = np.sqrt(len(points) * ridge) * np.eye(design.shape[1])[1:]
    middle = scores.mean()  # so that the ridge draws towards the mean where there are few points
    right = np.concatenate([scores - middle, np.zeros(len(damped))])
    numbers: NDArray[np.float64] = np.linalg.lstsq(np.concatenate([design, damped]), right)[0]
    numbers[0] += middle
    return numbers


def climbed(numbers: NDArray[np.float64], looked: Points, high: float) -> NDArray[np.float64]:
    """The point in [0, high]ⁿ with the highest prediction that is found from the best ones that were looked at."""
    count = looked.shape[1]
    slope, curve = numbers[1 : count + 1], np.zeros((count, count))
    curve[np.triu_indices(count)] = numbers[count + 1 :]
    curve = curve + curve.T  # the second derivatives

    def depth(point: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """What there is to be descended, and its gradient."""
        return -float(slope @ point + 0.5 * point @ curve @ point), -(slope + curve @ point)

    best = np.argsort(-(terms(looked) @ numbers), kind="stable")[:CLIMBED]
    ends = [minimize(depth, looked[i], jac=True, bounds=[(0.0, high)] * count).x for i in best]
    return min((np.asarray(end) for end in ends), key=lambda end: depth(end)[0])


def _spread(fits: Sequence[NDArray[np.float64]], looked: Points, count: int) -> list[MixturePoint]:
    """At most ``count`` points of the front that is predicted for several objectives."""
    if len(fits) < 2 or count < 1:
        return []
    predicted = np.stack([terms(looked) @ numbers for numbers in fits], axis=1)
    places = front(predicted)[:THINNED_FROM]  # any of them: the points fill the box evenly
    return [_point(looked[places[i]]) for i in thinned(predicted[places], count)]


def _samples(count: int, number: int, high: float, seed: int) -> list[MixturePoint]:
    """The experts, their average, and points that fill the box [0, high]ⁿ evenly."""
    # Powers of two fill the box evenly.
    filling = high * qmc.Sobol(count, rng=np.random.default_rng(seed)).random_base2(math.ceil(math.log2(number)))
    usual = [*(one_hot(i, count) for i in range(count)), _point([1 / count] * count)]
    return [*usual, *(_point(point) for point in filling)][:number]


def _near(coefficient: float, high: float, draw: random.Random) -> float:
    return min(high, max(0.0, coefficient + draw.gauss(0, STRAY * high)))


def _point(values: Sequence[float] | NDArray[np.float64]) -> MixturePoint:
    return tuple(round(float(value), MAP_DECIMALS) for value in values)
