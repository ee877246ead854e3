"""Linear mixtures of models: the base plus task vectors, each times a coefficient of its own.

Particles, members of a population and sampled points are such mixtures, so a search keeps one number for each model
that it starts from. What is made of mixtures by adding and scaling is a mixture again, without any rounding of weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from evolver.records import Standing
from evolver.records.recipe import Expert, Merge, Recipe, Rule

MixturePoint = tuple[float, ...]
# What has no part in a child: a model that breaks a constraint or failed, beside others that do not.
NO_SHARE = 0.0


def mixture_of(models: Sequence[Recipe], base: Expert, coefficients: Sequence[float]) -> Recipe:
    """The model base + Σ c·(model − base).

    What has a coefficient of 0 is left out, so the base and the models themselves are not merged anew.
    """
    used = [(model, c) for model, c in zip(models, coefficients, strict=True) if c != 0]
    if not used:
        return base
    if len(used) == 1 and used[0][1] == 1:
        return used[0][0]
    values = {"weight": tuple(c for _, c in used), "lambda": 1.0, "normalize": False}
    return Merge("task_arithmetic", tuple(model for model, _ in used), base, (Rule.of(values),))


def one_hot(place: int, count: int) -> MixturePoint:
    """The coefficients of model number ``place`` of ``count``."""
    return tuple(float(k == place) for k in range(count))


def combined(points: Sequence[Sequence[float]], weights: Sequence[float]) -> MixturePoint:
    """Σ weight·point."""
    pairs = list(zip(points, weights, strict=True))
    return tuple(math.fsum(w * point[k] for point, w in pairs) for k in range(len(points[0])))


def shares(standings: Sequence[Standing]) -> list[float]:
    """Non-negative numbers that sum to 1, proportional to the scores of these models.

    Where a score is negative, all are counted from the lowest one. A model that breaks a constraint or has no score has
    no share, unless that holds for all; then, and where all scores are 0, the shares are equal.
    """
    fine = [score for violation, score in standings if violation == 0]
    lowest = min([0.0, *fine])
    worth = [score - lowest if violation == 0 else NO_SHARE for violation, score in standings]
    total = math.fsum(worth)
    return [w / total for w in worth] if total > 0 else [1 / len(worth)] * len(worth)
