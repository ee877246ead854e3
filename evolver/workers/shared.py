"""A pool in which several workers share the items of one candidate. One worker would give the same result."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from evolver.evaluation.scores.course import Evaluation
from evolver.pool import Pool
from evolver.records import Candidate, ItemAnswer, Result

Key = tuple[str, int, str]


@dataclass
class _Shared:
    """A candidate whose pieces are evaluated by several workers.

    Attributes:
        course: the course of its evaluation.
        blocks: the blocks that the course has not reached yet.
        items: the scores of the items that the course has reached.
        come: the results of the pieces that have arrived, by their first item.
        waiting: how many pieces are still being evaluated.
        answered: whether the candidate's result has been given already.
        failed: the result of a piece that has failed. It is given only when all pieces have come, as the candidate may
            then be tried again.
    """

    course: Evaluation
    blocks: list[tuple[int, int]]
    items: list[ItemAnswer]
    come: dict[int, Result] = field(default_factory=dict)
    waiting: int = 0
    answered: bool = False
    failed: Result | None = None


class SharedPool:
    """A pool that divides a candidate's blocks of items among several workers and joins their answers.

    The joined answers are examined block by block in the order of the items, as one worker would do it. A candidate
    that one worker would have stopped is stopped at the same block, and what was scored after it is thrown away. A
    candidate whose gradient is asked for is not divided: it has few items, and its tasks are told apart.

    Args:
        pool: the workers.
        parts: how many workers share a candidate; their pieces have equal sizes, give or take one block.
        course: makes the course of a candidate's evaluation.
    """

    def __init__(self, pool: Pool, parts: int, course: Callable[[Candidate], Evaluation]) -> None:
        self._pool, self._parts, self._course = pool, parts, course
        self._shared: dict[Key, _Shared] = {}

    def free(self) -> int:
        room = -(-self._pool.free() // self._parts)
        # Pieces of candidates that have their results already may hold all workers; nothing would come of waiting.
        idle = not any(not shared.answered for shared in self._shared.values())
        return max(int(idle and bool(self._shared)), room)

    def submit(self, candidate: Candidate) -> None:
        course = self._course(candidate)
        blocks = course.blocks()
        pieces = [(part[0][0], part[-1][1]) for part in _evenly(blocks, self._parts)]
        if len(pieces) < 2 or candidate.question.loss is not None:
            self._pool.submit(candidate)
            return
        shared = _Shared(course, blocks, list(candidate.question.known), waiting=len(pieces))
        self._shared[_key(candidate)] = shared
        for piece in pieces:
            self._pool.submit(candidate.asking(piece=piece, known=(), rival=()))

    def wait(self) -> list[Result]:
        landed: list[Result] = []
        while not landed:
            for result in self._pool.wait():
                landed += self._land(result)
        return landed

    def close(self) -> None:
        self._pool.close()

    def _land(self, result: Result) -> Iterator[Result]:
        key = (result.stage, result.number, result.recipe_id)
        shared = self._shared.get(key)
        if shared is None:
            yield result
            return
        shared.waiting -= 1
        if not shared.waiting:
            del self._shared[key]
        if shared.answered:
            return
        if result.status == "failed":
            shared.failed = result
        if shared.failed is not None:
            if not shared.waiting:
                yield shared.failed
            return
        shared.come[result.given] = result
        if self._go_over(shared):
            shared.answered = True
            yield self._join(shared)

    def _go_over(self, shared: _Shared) -> bool:
        """Examine the blocks that have arrived without a gap; whether the evaluation has ended with them."""
        while shared.blocks:
            start, stop = shared.blocks[0]
            piece = next((r for first, r in shared.come.items() if first <= start < first + len(r.items)), None)
            if piece is None:
                return False
            shared.items += piece.items[start - piece.given : stop - piece.given]
            shared.blocks.pop(0)
            if shared.course.ended(shared.items):
                return True
        return True

    def _join(self, shared: _Shared) -> Result:
        pieces = [shared.come[first] for first in sorted(shared.come)]
        said = tuple(text for piece in pieces for text in piece.said)
        probabilities = tuple(x for piece in pieces for x in piece.probabilities)
        seconds, counts = ({k: math.fsum(p[k] for p in ps) for k in ps[0]} for ps in _columns(pieces))
        worker = "+".join(p.worker for p in pieces)
        result = shared.course.result(shared.items, seconds, counts, worker)
        violations = pieces[0].violations if result.complete else {}
        return replace(result, said=said, probabilities=probabilities, violations=violations)


def _columns(pieces: Sequence[Result]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    return [dict(p.seconds) for p in pieces], [dict(p.counts) for p in pieces]


def _evenly(blocks: Sequence[tuple[int, int]], parts: int) -> list[Sequence[tuple[int, int]]]:
    """The blocks in consecutive groups. Where they cannot be of equal size, the first ones have one block more."""
    size, rest = divmod(len(blocks), parts)
    ends = [0]
    for part in range(min(parts, len(blocks))):
        ends.append(ends[-1] + size + (part < rest))
    return [blocks[a:b] for a, b in itertools.pairwise(ends)]


def _key(candidate: Candidate) -> Key:
    return candidate.stage, candidate.number, candidate.recipe.id
