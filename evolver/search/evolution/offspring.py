"""The strategies of mutation, and the child of a member of a population."""

from __future__ import annotations

import random

from evolver.records.recipe import Cross, Recipe
from evolver.search.evolution.settings import EvolverSettings

PARTNERS = {"evolver": 1, "rand/1": 3, "best/1": 3, "current-to-best/1": 3, "rand/2": 5}
LED_BY_BEST = ("best/1", "current-to-best/1")


def offspring(
    population: list[Recipe], i: int, leader: int | None, settings: EvolverSettings, draw: random.Random
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
    return Cross(population[i], partners, settings.strategy, settings.F, settings.Cr, draw.getrandbits(32))
