"""The interface of a pool of workers, and the bookkeeping of the candidates that a pool is evaluating."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

from evolver.records import Candidate, Result


class Pool(Protocol):
    """Evaluates candidates."""

    def free(self) -> int:
        """The number of candidates that can be submitted now."""
        ...

    def submit(self, candidate: Candidate) -> None:
        """Start the evaluation of a candidate."""
        ...

    def wait(self) -> list[Result]:
        """Wait for at least one result of the submitted candidates, in any order. A failure is a result, too."""
        ...

    def close(self) -> None:
        """End the workers. A closed pool is not used again."""
        ...


class Flights:
    """The candidates that are being evaluated. It takes care that no recipe is in the pool twice at the same time.

    Attributes:
        asked: candidates that the search has asked for, by recipe id.
        guessed: candidates that the search will probably ask for later, by recipe id.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.asked: dict[str, Candidate] = {}
        self.guessed: dict[str, Candidate] = {}
        self._queue: deque[Candidate] = deque()  # asked for, but wrong guesses still occupy the pool

    @property
    def room(self) -> int:
        """The number of further candidates that the search may be asked for.

        Guesses do not count as occupied places: the next candidates may be among them, or wait until they are done.
        """
        return max(0, self._free() + len(self.guessed))

    def holds(self, candidate: Candidate) -> bool:
        """Whether its recipe is being evaluated for another candidate."""
        recipe = candidate.recipe.id
        return recipe in self.asked or self.guessed.get(recipe, candidate) != candidate

    def send(self, candidate: Candidate) -> None:
        """Have a candidate evaluated, unless it is being evaluated as a guess already."""
        self.asked[candidate.recipe.id] = candidate
        if self.guessed.pop(candidate.recipe.id, None) is None:
            self._queue.append(candidate)
            self._fill()

    def guess(self, candidate: Candidate) -> bool:
        """Have a candidate evaluated that the search has not asked for yet; False if no worker is free for it."""
        if self._free() <= 0:
            return False
        if candidate.recipe.id not in self.asked | self.guessed:
            self.guessed[candidate.recipe.id] = candidate
            self._pool.submit(candidate)
        return True

    def land(self) -> Iterator[tuple[Candidate, Result, bool]]:
        """Wait for results, and yield each with its candidate and whether the candidate was only a guess."""
        self._fill()
        for result in self._pool.wait():
            for flights in (self.asked, self.guessed):
                candidate = flights.get(result.recipe_id)
                # Results of candidates that an earlier search left in the pool are dropped.
                if candidate is not None and (candidate.stage, candidate.number) == (result.stage, result.number):
                    yield flights.pop(result.recipe_id), result, flights is self.guessed
                    break

    def _free(self) -> int:
        return self._pool.free() - len(self._queue)

    def _fill(self) -> None:
        while self._queue and self._pool.free() > 0:
            self._pool.submit(self._queue.popleft())
