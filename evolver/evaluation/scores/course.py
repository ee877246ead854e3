"""The course of one evaluation: which blocks of items are scored, when its question is answered, what it comes to.

One worker follows it from block to block. Where several share a candidate, the driver follows it over what they bring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evolver.evaluation.scores.racing import Race
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Candidate, Result


def blocks(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """First item and the one after the last, of every block from one place to before another."""
    return [(first, min(stop, first + size)) for first in range(start, stop, size)]


class Evaluation:
    """The course of a candidate's evaluation.

    Args:
        scale: how items make up the score.
        block: items are scored so many at a time.
        alpha: error rate of races, or None for none.
    """

    def __init__(self, candidate: Candidate, scale: Scale, block: int, alpha: float | None) -> None:
        self.candidate, self._scale, self._block = candidate, scale, block
        self._race = Race(scale, candidate.rival, alpha) if alpha and candidate.rival else None
        self.raced = False

    def blocks(self) -> list[tuple[int, int]]:
        """First item and the one after the last, of every block that may have to be scored."""
        count, limit, size = len(self._scale.tasks), self.candidate.limit, self._block
        stop = count if limit is None else min(count, -(-limit // size) * size)
        return blocks(len(self.candidate.known), stop, size)

    def ended(self, items: Sequence[float]) -> bool:
        """Whether the first items, up to the end of a block, answer the question."""
        bar = self.candidate.bar
        if bar is not None and self._scale.bound(items) <= bar:
            return True
        if self._race is not None and len(items) < len(self._scale.tasks):
            self.raced = self._race.look(items) == "not better"
        return self.raced

    def result(
        self, items: Sequence[float], seconds: Mapping[str, float], counts: Mapping[str, float], worker: str
    ) -> Result:  # fmt: skip
        """What the candidate scored on its first items."""
        candidate, bar = self.candidate, self.candidate.bar
        complete = len(items) == len(self._scale.tasks)
        score = self._scale.score(items) if complete else None
        bound = score if complete else self._scale.bound(items)
        if self.raced and bar is not None and bound is not None:
            bound = min(bound, bar)  # at the run's error rate, not for certain
        return Result(
            candidate.number, candidate.recipe.id, "ok", score, bound, complete, tuple(items),
            self._scale.of_tasks(items), seconds, counts, worker=worker, stage=candidate.stage,
            raced=self.raced, given=len(candidate.known),
        )  # fmt: skip
