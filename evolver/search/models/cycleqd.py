"""CycleQD: an archive for each task, which keeps the best model of every level of the other tasks' scores.

In the archive of a task, the score of this task is the quality of a model. The scores of the other tasks, each cut into
``bins``, are its cell (MAP-Elites). Of the models of a cell the archive keeps the one with the highest quality. The
archives of the tasks bring forth children in turn, and each child is offered to all archives.

The archives are mappings from cells to models here. The library pyribs has such archives, too, but it compares models
by one number, where a model that breaks a constraint has to lose against any other, and it takes 210 MB of compilers
and 1.5 seconds of every start of the program.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from evolver.config.section import Section
from evolver.errors import BadInput
from evolver.records import Candidate, Result, Standing
from evolver.records.objective import Objective, values_of
from evolver.search.base import Ordered, Setup, algorithm
from evolver.search.models.mixtures import MixturePoint, combined, mixture_of, one_hot

NicheCell = tuple[int, ...]
# Ends of the range in which elites are weighed against each other, by each of their values.
LEAST_WEIGHT, MOST_WEIGHT = 0.5, 1.3


class CycleQDSettings(Section):
    """Settings of CycleQD. The defaults are those of the paper where it has the setting."""

    algorithm: Literal["cycleqd"] = Field(description="name of this search")
    bins: int = Field(15, ge=1, le=10_000, description="number of levels of each other task's score in an archive")
    spread: float = Field(
        0.01, ge=0, le=1, description="standard deviation of the two parents' weights around equal weights of 1"
    )
    mutation: float = Field(
        0.1, ge=0, le=10, description="the largest share of a random expert's task vector that is added to a child"
    )
    in_flight: int = Field(1, ge=1, le=100_000, description="number of candidates in evaluation at the same time")


@dataclass(frozen=True)
class Elite:
    """The best model of a cell.

    Attributes:
        standing: what it is compared by in its archive.
        values: of all objectives.
        number: its candidate's.
    """

    standing: Standing
    values: tuple[float, ...]
    number: int
    place: MixturePoint


@algorithm("cycleqd", CycleQDSettings)
class CycleQD(Ordered):
    """Quality diversity with one archive for each task (Kuroki et al. 2025, CycleQD, ICLR, arXiv 2410.14735).

    A child of a and b is (w_a·a + w_b·b) / (w_a + w_b) with weights drawn around 1. Then a random share of a random
    expert's task vector is added. The paper draws a share of its own for each singular component of the task vector;
    here all components have the same one, so a child is a mixture of the experts and no matrix is decomposed. Unlike
    ``nsga2`` it keeps models that are best only among those with similar scores of the other tasks. It assumes that
    there is a specialist for each task, and that the sum of task vectors is better than their average: in the hull of
    the experts, where it hardly looks around, random mixtures are no worse. With ``objectives``, these stand in the
    place of the tasks.

    Raises BadInput for one task alone.
    """

    def __init__(self, setup: Setup, settings: CycleQDSettings) -> None:
        if len(setup.objectives or setup.tasks) < 2:
            raise BadInput(
                "search.algorithm: cycleqd needs at least two tasks, one for the quality and others to sort models by; "
                "choose ga or m2n2."
            )
        super().__init__(setup)
        self.settings, self.first = settings, len(setup.experts)
        self.objectives = setup.objectives or tuple(Objective(task, {task: 1.0}) for task in setup.tasks)
        self.found: list[Elite] = []  # the first models, until the levels are known
        self.levels: tuple[tuple[float, float], ...] = ()
        self.archives: list[dict[NicheCell, Elite]] = [{} for _ in self.objectives]
        self._pending: dict[int, MixturePoint] = {}

    def waits_for(self, k: int) -> int:
        if k < self.first:
            return 0
        pace = max(self.settings.in_flight, self.setup.together)
        return max(self.first, k - pace + 1)

    def propose(self, k: int) -> Candidate:
        experts, initial = self.setup.experts, k < self.first
        draw = random.Random(f"{self.setup.seed}:cycleqd:{k}")
        place = one_hot(k, self.first) if initial else self._child((k - self.first) % len(self.objectives), draw)
        self._pending[k] = place
        used = tuple(e.id for e, c in zip(experts, place, strict=True) if c)
        recipe = mixture_of(experts, self.setup.base, place)
        return Candidate(k, recipe, "cycleqd/initial" if initial else "cycleqd", used)

    def learn(self, candidate: Candidate, result: Result) -> None:
        place = self._pending.pop(candidate.number)
        values = None if result.score is None else values_of(self.objectives, result.tasks)
        if values is None:
            return
        elite = Elite(result.standing, values, candidate.number, place)
        if not self.levels:
            self.found.append(elite)
            return
        self._offer(elite)

    def _child(self, task: int, draw: random.Random) -> MixturePoint:
        self._open()
        count = len(self.setup.experts)
        elites = [*self.archives[task].values()] or [*map(self._unknown, range(count))]
        chances = appeal([elite.values for elite in elites])
        (one,) = draw.choices(elites, chances)
        others = [(e, c) for e, c in zip(elites, chances, strict=True) if e is not one] or [(one, 1.0)]
        (other,) = draw.choices([e for e, _ in others], [c for _, c in others])
        weights = [draw.gauss(1.0, self.settings.spread) for _ in range(2)]
        total = math.fsum(weights) or 1.0
        child = combined([one.place, other.place], [w / total for w in weights])
        added = draw.uniform(0, self.settings.mutation)
        return combined([child, one_hot(draw.randrange(count), count)], [1.0, added])

    def _unknown(self, place: int) -> Elite:
        """An expert of which nothing is known, where no model of an archive is."""
        count = len(self.setup.experts)
        return Elite((0.0, 0.0), (0.0,) * len(self.objectives), place, one_hot(place, count))

    def _open(self) -> None:
        """Set the range of the levels by the models that were found so far, and put these into the archives."""
        if self.found:
            self.levels = tuple(levels_of(values) for values in zip(*(e.values for e in self.found), strict=True))
            for elite in self.found:
                self._offer(elite)
            self.found = []

    def _offer(self, elite: Elite) -> None:
        """Offer a model to the archives of all tasks."""
        for task, archive in enumerate(self.archives):
            cell = cell_of(elite.values, task, self.levels, self.settings.bins)
            own = _in_archive(elite, task)
            if cell not in archive or own.standing > archive[cell].standing:
                archive[cell] = own


def _in_archive(elite: Elite, task: int) -> Elite:
    """The model as the archive of a task compares it: models that break no constraint by their quality."""
    violation, _ = elite.standing
    quality = elite.values[task] if violation == 0 else 0.0
    return Elite((violation, quality), elite.values, elite.number, elite.place)


def levels_of(values: Sequence[float]) -> tuple[float, float]:
    """Between which scores of a task the levels lie: the range of the first models, half as wide again at its top."""
    low, high = min(values), max(values)
    return low, high + 0.5 * (high - low)


def cell_of(values: Sequence[float], task: int, levels: Sequence[tuple[float, float]], bins: int) -> NicheCell:
    """The level of every task but ``task``. What lies outside the range of a task is in its first or last level."""
    return tuple(
        min(bins - 1, max(0, math.floor(bins * (value - low) / (high - low)))) if high > low else 0
        for k, (value, (low, high)) in enumerate(zip(values, levels, strict=True))
        if k != task
    )


def appeal(values: Sequence[Sequence[float]]) -> list[float]:
    """The weights by which elites are drawn: the product of all their values, each scaled to [0.5, 1.3].

    Args:
        values: of all objectives, of each elite.
    """
    columns = [_scaled(column) for column in zip(*values, strict=True)]
    return [math.prod(row) for row in zip(*columns, strict=True)]


def _scaled(column: Sequence[float]) -> list[float]:
    low, high = min(column), max(column)
    if high == low:
        return [1.0] * len(column)
    return [LEAST_WEIGHT + (MOST_WEIGHT - LEAST_WEIGHT) * (value - low) / (high - low) for value in column]
