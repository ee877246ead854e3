"""The course of one evaluation: which blocks of items are scored, when it may stop early, and what the result is.

A worker consults it after each block. Where several workers share a candidate, the driver consults it about the answers
that they send.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from evolver.evaluation.scores.racing import Race
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Candidate, ItemAnswer, Result
from evolver.records.order import reordered, restored


def blocks(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Divide the items from ``start`` to ``stop - 1`` into blocks of ``size`` items; the last one may be smaller.

    A block is a pair: its first item, and the one after its last item.
    """
    return [(first, min(stop, first + size)) for first in range(start, stop, size)]


class Evaluation:
    """The course of a candidate's evaluation.

    Args:
        candidate: says what is asked: a bar to exceed, a rival to race against, or a limit of items.
        scale: how items make up the score.
        block: how many items are scored at a time.
        alpha: error rate of races; None: no races.

    Attributes:
        raced: whether a race has stopped the evaluation.
    """

    def __init__(self, candidate: Candidate, scale: Scale, block: int, alpha: float | None) -> None:
        self.candidate, self._block = candidate, block
        self._scale = scale.reordered(candidate.question.order)
        rival = reordered(candidate.question.rival, candidate.question.order)
        self._race = Race(self._scale, cast(Sequence[float], rival), alpha) if alpha and rival else None
        self.raced = False

    def blocks(self) -> list[tuple[int, int]]:
        """The blocks that may have to be scored, each as its first item and the one after its last item."""
        asked, count, size = self.candidate.question, len(self._scale.tasks), self._block
        stop = count if asked.limit is None else min(count, -(-asked.limit // size) * size)
        return blocks(len(asked.known), stop, size)

    def ended(self, items: Sequence[ItemAnswer]) -> bool:
        """Whether the evaluation may stop here.

        That is so if the score can no longer exceed the candidate's bar, or if a race has decided against the
        candidate.

        Args:
            items: the answers to the first items in the order that is asked for, up to the end of a block.
        """
        bar = self.candidate.question.bar
        if bar is not None and self._scale.bound(items) <= bar:
            return True
        if self._race is not None and len(items) < len(self._scale.tasks):
            self.raced = self._race.look(cast(Sequence[float], items)) == "not better"
        return self.raced

    def result(
        self, items: Sequence[ItemAnswer], seconds: Mapping[str, float], counts: Mapping[str, float], worker: str
    ) -> Result:  # fmt: skip
        """The result of the candidate.

        Args:
            items: the answers to the first items.
            seconds: seconds by stage of the work.
            counts: see ``Scored``.
            worker: name of the worker.
        """
        candidate, bar = self.candidate, self.candidate.question.bar
        complete = len(items) == len(self._scale.tasks)
        score = self._scale.score(items) if complete else None
        bound = score if complete else self._scale.bound(items)
        order = candidate.question.order
        if self.raced and bar is not None and bound is not None:
            bound = min(bound, bar)  # what the race says, which is wrong at most at the run's error rate
        return Result(
            candidate.number, candidate.recipe.id, "ok", score, bound, complete,
            restored(items, order) if complete else tuple(items),
            self._scale.of_tasks(items), seconds, counts, worker=worker, stage=candidate.stage,
            raced=self.raced, given=len(candidate.question.known), order=order,
        )  # fmt: skip
