"""The first population of a search: the experts, and models made of them where it is larger than their number."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from evolver.errors import BadInput
from evolver.records.recipe import Recipe
from evolver.search.base import Setup

# Share of each task vector that a merge keeps which fills up a population: from sparse to nearly all.
DENSITIES = (0.2, 0.9)
DECIMALS = 6  # of a drawn number, so that logarithms of another processor give the same recipes


def first_population(setup: Setup, size: int) -> list[Recipe]:
    """The experts, then their average, then by turns a merge of some experts and a mixture of all of them.

    - A merge is TIES (Yadav et al. 2023) of two to all experts, drawn at random, with a density drawn from 0.2 to 0.9.
    - A mixture is an average whose weights are drawn uniformly from all that sum to 1, a Dirichlet distribution with
      all parameters 1 (Devroye 1986, theorem V.2.2: exponential draws divided by their sum).

    The m-th model that is added depends on the seed and on m only, so a larger population begins with a smaller one.
    """
    added = _added(setup)
    return [*setup.experts, *(next(added) for _ in range(size - len(setup.experts)))]


def led_by(best: Sequence[Recipe], population: Sequence[Recipe]) -> list[Recipe]:
    """A population of the same size that begins with other models, the best first, and goes on as this one does."""
    return list({recipe.id: recipe for recipe in (*best, *population)}.values())[: len(population)]


def size_of(setup: Setup, given: int | None, needed: int, who: str) -> int:
    """The size of the population.

    Args:
        given: what the configuration says.
        needed: the smallest one that will do.
        who: the key and the value that need it.

    Raises BadInput for a population that the experts alone exceed, or that is too small.
    """
    experts = len(setup.experts)
    size = experts if given is None else given
    if size < experts:
        raise BadInput(
            f"search.population: {size} is less than the number of experts, {experts}, who are its first members; "
            f"write {experts} or more."
        )
    if size < needed:
        there = f"there are {experts} experts" if given is None else f"search.population is {given}"
        raise BadInput(
            f"{who} needs a population of {needed}, and {there}; write population: {needed} or more, which adds merges "
            "and mixtures of the experts, or give more experts."
        )
    return size


def _added(setup: Setup) -> Iterator[Recipe]:
    yield setup.maker.merger({"method": "simple"})(setup.experts)
    number = 0
    while True:
        draw = random.Random(f"{setup.seed}:population:{number}")
        yield _mixture(setup, draw) if number % 2 else _merge(setup, draw)
        number += 1


def _merge(setup: Setup, draw: random.Random) -> Recipe:
    chosen = sorted(draw.sample(range(len(setup.experts)), draw.randint(2, len(setup.experts))))
    settings = {"method": "ties", "density": round(draw.uniform(*DENSITIES), DECIMALS)}
    return setup.maker.merger(settings, len(chosen))([setup.experts[n] for n in chosen])


def _mixture(setup: Setup, draw: random.Random) -> Recipe:
    exponential = [-math.log(1.0 - draw.random()) for _ in setup.experts]
    weights = [round(e / math.fsum(exponential), DECIMALS) for e in exponential]
    return setup.maker.merger({"method": "linear", "weight": weights})(setup.experts)
