"""M2N2: an archive of models that compete for the items, in which models with different strengths attract each other.

The archive begins with the experts. A child is made of two of its models by a spherical interpolation with a random
ratio before a random point of the flattened parameters, and with 1 minus the ratio after it. The child joins the
archive, and where that has more than ``archive`` models then, the one with the lowest fitness leaves it.

The fitness counts an item less, the better the whole archive is on it: f(i) = Σ_j s(i, j) / z(j)^alpha with s(i, j)
model i's score on item j and z(j) = Σ_k s(k, j). An item that few models solve is worth much to those that do, so
models with rare strengths stay. Every item has the same capacity, 1, as in the authors' code.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evolver.config.section import Section
from evolver.errors import BadInput
from evolver.records import Candidate, Result, own_score
from evolver.records.recipe import Recipe
from evolver.search.base import Ordered, Setup, algorithm

# What each model of an archive is worth on each item: (models, items).
ItemWorth = NDArray[np.float64]


class M2N2Settings(Section):
    """Settings of M2N2. The defaults are those of the authors' merges of language models."""

    algorithm: Literal["m2n2"] = Field(description="name of this search")
    archive: int = Field(15, ge=2, le=10_000, description="number of models in the archive")
    alpha: float = Field(
        1.0,
        ge=0,
        le=10,
        description="how much the models compete for items; 0: not at all, so the fitness is the sum of the items",
    )
    attraction: bool = Field(
        True,
        description="whether the second parent is drawn by what it is better at than the first; false: like the first",
    )
    split: bool = Field(
        True, description="whether the ratio changes at a random point of the parameters; false: one ratio for all"
    )
    warmup: int = Field(
        0, ge=0, le=1_000_000, description="number of first children whose parents are experts drawn with equal chances"
    )
    in_flight: int = Field(1, ge=1, le=100_000, description="number of candidates in evaluation at the same time")


@algorithm("m2n2", M2N2Settings)
class M2N2(Ordered):
    """Model Merging of Natural Niches (Abrantes et al. 2025, GECCO, arXiv 2508.16204).

    Unlike ``evolver``, which compares models by their scores, it looks at single items, and a child is made of two
    models with different strengths. It assumes that items have scores from 0 to 1 and that each part of the parameters
    can come from a point on the arc between the parents. The angle of the arc is each tensor's own, as in slerp, where
    the authors' code has one angle for all parameters. There is no mutation, as in the authors' merges of language
    models. All items of every candidate are scored. A model that breaks a constraint leaves the archive before those
    that do not.

    Raises BadInput for tasks without scores of single items, and inside of halving.
    """

    def __init__(self, setup: Setup, settings: M2N2Settings) -> None:
        _check(setup)
        super().__init__(setup)
        self.settings, self.first = settings, len(setup.experts)
        self.models: list[Recipe] = []
        self.scores: list[NDArray[np.float64]] = []
        self.violations: list[float] = []

    def inform(self, pairs: Sequence[tuple[Candidate, Result]]) -> None:
        """See ``Informed``: the models of an earlier search compete for the places of the archive, too."""
        for candidate, result in pairs:
            self.learn(candidate, result)

    def waits_for(self, k: int) -> int:
        if k < self.first + self.settings.warmup:
            return 0
        return max(self.first, k - self.settings.in_flight + 1)

    def propose(self, k: int) -> Candidate:
        if k < self.first:
            return Candidate(k, self.setup.experts[k], "m2n2/initial")
        draw = random.Random(f"{self.setup.seed}:m2n2:{k}")
        first, second = self._parents(k, draw)
        ratio = draw.random()
        point = draw.random() if self.settings.split else 1.0
        child = self.setup.maker.crossover(first, second, ratio, point)
        return Candidate(k, child, "m2n2", (first.id, second.id))

    def learn(self, candidate: Candidate, result: Result) -> None:
        if not result.complete or result.score is None or candidate.recipe in self.models:
            return
        self.models.append(candidate.recipe)
        self.scores.append(np.asarray([own_score(answer) for answer in result.items]))
        self.violations.append(result.violation)
        if len(self.models) > self.settings.archive:
            fitness = worth(np.stack(self.scores), self.settings.alpha).sum(1)
            worst = min(range(len(fitness)), key=lambda i: (-self.violations[i], fitness[i]))
            for kept in (self.models, self.scores, self.violations):
                del kept[worst]

    def _parents(self, k: int, draw: random.Random) -> list[Recipe]:
        if k < self.first + self.settings.warmup or len(self.models) < 2:
            return draw.sample(list[Recipe](self.setup.experts), 2)
        found = worth(np.stack(self.scores), self.settings.alpha)
        one = _drawn(found.sum(1), draw)
        appeal = attraction(found, one) if self.settings.attraction else found.sum(1)
        appeal[one] = 0.0
        return [self.models[one], self.models[_drawn(appeal, draw, besides=one)]]


def worth(scores: NDArray[np.float64], alpha: float) -> ItemWorth:
    """s(i, j) / z(j)^alpha with z(j) = Σ_i s(i, j); an item that no model has anything of is worth nothing to all.

    Args:
        scores: s, of every model on every item, (models, items), at least 0.
    """
    total = scores.sum(0)
    found: ItemWorth = scores / np.where(total > 0, total, 1.0) ** alpha
    return found


def attraction(found: ItemWorth, one: int) -> NDArray[np.float64]:
    """How much model ``one`` is attracted by each model: the sum of what that has more of, over the items, (models)."""
    more: NDArray[np.float64] = np.maximum(found - found[one], 0.0).sum(1)
    return more


def _drawn(chances: NDArray[np.float64], draw: random.Random, besides: int | None = None) -> int:
    """A place, drawn with these chances; where all are 0, with equal ones, but never ``besides``."""
    places = [place for place in range(len(chances)) if place != besides]
    given = [float(chances[place]) for place in places]
    return draw.choices(places, given if sum(given) > 0 else None)[0]


def _check(setup: Setup) -> None:
    if setup.together > 1:
        raise BadInput(
            "search.algorithm: m2n2 compares models on every single item, and inside halving most candidates are "
            "scored on a part of the items only; run m2n2 by itself, or choose another inner search."
        )
    if setup.estimator is not None and (task := setup.estimator.unjudged) is not None:
        raise BadInput(
            f"search.algorithm: m2n2 needs items with scores of their own from 0 to 1, and {task} has none; choose "
            "another search, or another metric for this task."
        )
