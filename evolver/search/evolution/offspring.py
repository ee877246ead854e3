"""The strategies of mutation, and the child of a member of a population."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from evolver.records import Standing
from evolver.records.recipe import Cross, Recipe
from evolver.search.evolution.settings import EvolverSettings

PARTNERS = {
    "evolver": 1, "rand/1": 3, "best/1": 3, "current-to-best/1": 3, "current-to-pbest/1": 3, "rand/2": 5,
}  # fmt: skip
LED_BY_BEST = ("best/1", "current-to-best/1")
LED_BY_ONE_OF_THE_BEST = "current-to-pbest/1"
# Of one model alone there is no choice among the best.
LEAST_BEST = 2


def offspring(
    population: Sequence[Recipe], i: int, leader: int | None, settings: EvolverSettings, draw: random.Random
) -> Cross:
    """The child of member ``i``.

    Args:
        leader: a member that has to be the first partner; None: all partners are drawn at random, without replacement.
    """
    others = [j for j in range(len(population)) if j != i]
    chosen = draw.sample(others, PARTNERS[settings.strategy])
    if leader is not None and leader != i:
        chosen = [leader, *[j for j in chosen if j != leader]][: len(chosen)]
    partners = tuple(population[j] for j in chosen)
    seed = draw.getrandbits(32)
    return Cross(population[i], partners, settings.strategy, settings.F, settings.Cr, seed, settings.mask)


def best_places(standings: Sequence[Standing], p: float) -> list[int]:
    """The places of the best members, a share ``p`` of all, but at least two."""
    return ranked(standings)[: max(LEAST_BEST, math.floor(p * len(standings) + 0.5))]


def ranked(standings: Sequence[Standing]) -> list[int]:
    """The places of all members, the best one first; of equals the earlier one."""
    return sorted(range(len(standings)), key=lambda j: (standings[j], -j), reverse=True)
