"""SHADE: differential evolution that learns its scale and its crossover rate from what has succeeded.

Papers: Tanabe and Fukunaga, "Success-history based parameter adaptation for differential evolution", CEC 2013, and
"Improving the search performance of SHADE using linear population size reduction", CEC 2014 (L-SHADE). The strategy and
the archive are those of JADE (Zhang and Sanderson 2009).

A generation makes one child of every member from the same population, so as many workers as members are busy. The
scale F and the crossover rate Cr of a child are drawn around one of H remembered pairs. After the generation, the pairs
of the children that were better than their parents are averaged, weighted by how much better they were, and the average
takes the place of the oldest remembered pair.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from evolver.errors import BadInput
from evolver.records import UNKNOWN, Candidate, ItemAnswer, Result, Standing
from evolver.records.leaders import leaders
from evolver.records.recipe import Cross, Recipe
from evolver.search.ahead import RunsAhead
from evolver.search.base import Setup, algorithm
from evolver.search.challenge import challenge, rejected
from evolver.search.evolution.offspring import LED_BY_ONE_OF_THE_BEST, best_places, ranked
from evolver.search.evolution.population import first_population, led_by, size_of
from evolver.search.evolution.settings import BEST_SHARE, PopulationSettings

# A parent, one of the best, a random member, and a random or former one.
LEAST_MEMBERS = 4
# Of the normal and of the Cauchy distribution around a remembered number.
DRAW_WIDTH = 0.1
# No coordinate is forced into a child, so a rate near 0 would give the parent once more.
LOWEST_RATE, LOWEST_SCALE = 0.05, 0.01
DRAWN_DECIMALS = 6  # of F and Cr, so that tangents and logarithms of another processor give the same recipes


class SHADESettings(PopulationSettings):
    """Settings of SHADE. The defaults are those of L-SHADE, but for the reduction of the population."""

    algorithm: Literal["shade"] = Field(description="name of this search")
    memory: int = Field(
        6, ge=1, le=100_000, description="number of pairs of F and Cr that are remembered, H in the paper"
    )
    F: float = Field(0.5, gt=0, le=1, description="scale of the mutation that is remembered at the beginning")
    Cr: float = Field(0.5, gt=0, le=1, description="crossover rate that is remembered at the beginning")
    p: float = Field(
        BEST_SHARE, gt=0, le=1, description="share of the population, at least two, from which one of the best is drawn"
    )
    archive: float = Field(
        2.6, ge=0, le=1000, description="largest number of former members that are kept as partners, in populations"
    )
    reduce_to: int | None = Field(
        None,
        ge=LEAST_MEMBERS,
        le=100_000,
        description="number of members at the end, to which the population shrinks steadily, as in L-SHADE; default: "
        "it does not shrink",
    )


@dataclass(frozen=True)
class Success:
    """What made a child that was better than its parent, and by how much."""

    F: float
    Cr: float
    gain: float


@dataclass(frozen=True)
class SuccessHistory:
    """The remembered pairs of F and Cr, H of each, and which pair is overwritten next."""

    F: tuple[float, ...]
    Cr: tuple[float, ...]
    oldest: int = 0

    def drawn(self, draw: random.Random) -> tuple[float, float]:
        """F and Cr of a child, drawn around a pair r that is drawn first (2013, equations 4 and 5).

        Cr is normal around the remembered one and cut to [0, 1], F is Cauchy around it, drawn again while it is not
        positive, and cut to 1. Here, Cr is not below 0.05 and F not below 0.01.
        """
        r = draw.randrange(len(self.F))
        rate = min(max(draw.normalvariate(self.Cr[r], DRAW_WIDTH), LOWEST_RATE), 1.0)
        scale = 0.0
        while scale <= 0:
            scale = self.F[r] + DRAW_WIDTH * math.tan(math.pi * (draw.random() - 0.5))
        return round(min(max(scale, LOWEST_SCALE), 1.0), DRAWN_DECIMALS), round(rate, DRAWN_DECIMALS)

    def after(self, successes: Sequence[Success]) -> SuccessHistory:
        """The history after a generation; without a success, it stays as it is."""
        if not successes:
            return self
        gains = [s.gain for s in successes]
        k, at = self.oldest, self.oldest + 1
        scale, rate = lehmer_mean([s.F for s in successes], gains), lehmer_mean([s.Cr for s in successes], gains)
        return SuccessHistory((*self.F[:k], scale, *self.F[at:]), (*self.Cr[:k], rate, *self.Cr[at:]), at % len(self.F))


def lehmer_mean(numbers: Sequence[float], weights: Sequence[float]) -> float:
    """Σ w·s² / Σ w·s (2014, equations 7 to 9): of 0.5 and 1 with weights 1 and 1 it is 1.25 / 1.5 = 5/6."""
    squares = math.fsum(w * s * s for w, s in zip(weights, numbers, strict=True))
    return squares / math.fsum(w * s for w, s in zip(weights, numbers, strict=True))


def gain_of(child: Standing, parent: Standing) -> float:
    """By how much a child is better: its score less its parent's, or how much less it breaks the constraints.

    Infinite if the parent has no score.
    """
    return child[1] - parent[1] if child[0] == parent[0] else child[0] - parent[0]


@dataclass(frozen=True)
class Member:
    """A model of the population, and what its children are compared with."""

    recipe: Recipe
    standing: Standing = UNKNOWN
    items: tuple[ItemAnswer, ...] = ()


class SHADE(RunsAhead):
    """Success-history based adaptive differential evolution (Tanabe and Fukunaga 2013, 2014), on weights.

    A child is x + F·(p − x) + F·(r − a): p is one of the best members, r a random one, and a a random member or a
    former one that a child has replaced. Unlike ``evolver`` it leaves the experts' hull and sets F and Cr itself. It
    assumes that steps which helped earlier in the run help again, and needs several generations to learn them.
    """

    def __init__(self, setup: Setup, settings: SHADESettings, size: int) -> None:
        super().__init__(setup, limit=size * (1 + settings.generations))
        self.settings, self.first_size = settings, size
        self.members = [Member(recipe) for recipe in first_population(setup, size)]
        self.former: list[Recipe] = []
        self.history = SuccessHistory((settings.F,) * settings.memory, (settings.Cr,) * settings.memory)
        self._start = 0  # number of the generation's first candidate
        self._better: dict[int, tuple[Member, Success]] = {}  # by the parent's place

    def inform(self, pairs: Sequence[tuple[Candidate, Result]]) -> None:
        """See ``Informed``: the best models so far are the first population; it is filled up as usual."""
        population = led_by([c.recipe for c, _ in leaders(pairs)], [member.recipe for member in self.members])
        self.members = [Member(recipe) for recipe in population]

    def waits_for(self, k: int) -> int:
        end = self._start + len(self.members)
        return self._start if k < end else end

    def propose(self, k: int) -> Candidate:
        if k == self._start + len(self.members):
            self._next_generation(k)
        i = k - self._start
        if k < self.first_size:
            return Candidate(k, self.members[i].recipe, "shade/initial")
        parent = self.members[i]
        child = self._child(i, random.Random(f"{self.setup.seed}:shade:{k}"))
        asked = challenge(self.setup, k, parent.standing, parent.items)
        return Candidate(k, child, "shade", tuple(p.id for p in child.inputs), asked)

    def learn(self, candidate: Candidate, result: Result) -> None:
        i, recipe = candidate.number - self._start, candidate.recipe
        member = Member(recipe, result.standing, result.items)
        if candidate.number < self.first_size:
            self.members[i] = member
        elif member.standing > self.members[i].standing and isinstance(recipe, Cross):
            gain = gain_of(member.standing, self.members[i].standing)
            self._better[i] = member, Success(recipe.F, recipe.Cr, gain)

    def assume(self, candidate: Candidate) -> Result | None:
        return None if candidate.number < self.first_size else rejected(candidate)

    def _child(self, i: int, draw: random.Random) -> Cross:
        """current-to-pbest/1 with an archive (2013, equation 6): the partners may not be the parent, but the best."""
        scale, rate = self.history.drawn(draw)
        recipes = [member.recipe for member in self.members]
        best = draw.choice(best_places([m.standing for m in self.members], self.settings.p))
        one = draw.choice([j for j in range(len(recipes)) if j != i])
        other = draw.choice([r for j, r in enumerate((*recipes, *self.former)) if j not in (i, one)])
        partners = recipes[best], recipes[one], other
        seed = draw.getrandbits(32)
        return Cross(recipes[i], partners, LED_BY_ONE_OF_THE_BEST, scale, rate, seed, self.settings.mask)

    def _next_generation(self, start: int) -> None:
        """Children take their parents' places, their F and Cr are remembered, and the worst members may go."""
        draw = random.Random(f"{self.setup.seed}:shade:archive:{start}")
        better = sorted(self._better.items())
        self.former = [*self.former, *(self.members[i].recipe for i, _ in better)]
        self.members = [self._better[i][0] if i in self._better else m for i, m in enumerate(self.members)]
        # A parent without a score says nothing about the size of the step.
        self.history = self.history.after([s for _, (_, s) in better if math.isfinite(s.gain)])
        size = self._size(start)
        self.members = [self.members[i] for i in sorted(ranked([m.standing for m in self.members])[:size])]
        while len(self.former) > round(self.settings.archive * size):
            self.former.pop(draw.randrange(len(self.former)))
        self._start, self._better = start, {}

    def _size(self, evaluated: int) -> int:
        """The number of members after so many candidates (2014, equation 10); the first generation is not reduced."""
        least = self.settings.reduce_to
        if least is None or self.limit is None or evaluated == self.first_size:
            return len(self.members)
        return round(self.first_size + (least - self.first_size) * evaluated / self.limit)


@algorithm("shade", SHADESettings, incumbent=True)
def build_shade(setup: Setup, settings: SHADESettings) -> SHADE:
    """Evolves weights by differential evolution that adapts its own F and Cr (SHADE and L-SHADE, Tanabe and Fukunaga).

    Unlike ``evolver`` it learns the scale and the crossover rate from the children that were better than their parents,
    leads each child towards one of the best members, and uses former members as partners. It assumes that what helped
    earlier in the run helps again.

    Raises BadInput for a population that is too small, or that would have to grow.
    """
    given = settings.population or max(LEAST_MEMBERS, len(setup.experts))
    size = size_of(setup, given, LEAST_MEMBERS, "search.algorithm: shade")
    if settings.reduce_to is not None and settings.reduce_to > size:
        raise BadInput(
            f"search.reduce_to: {settings.reduce_to} is more than the {size} members of the population; write a number "
            f"from {LEAST_MEMBERS} to {size}, or a larger population."
        )
    return SHADE(setup, settings, size)
