"""What a pool is working on: candidates that were asked for, and guesses of those that will be."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

from evolver.records import Candidate, Result


class Pool(Protocol):
    """Where candidates are evaluated."""

    def free(self) -> int:
        """How many more candidates can be taken at once."""
        ...

    def submit(self, candidate: Candidate) -> None: ...

    def wait(self) -> list[Result]:
        """At least one result of what was submitted, in any order; failures are results too."""
        ...

    def close(self) -> None: ...


class Flights:
    """No recipe is in the pool twice at a time.

    Attributes:
        asked: candidates that were asked for, by recipe id.
        guessed: candidates that were only guessed, by recipe id.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.asked: dict[str, Candidate] = {}
        self.guessed: dict[str, Candidate] = {}
        self._queue: deque[Candidate] = deque()  # guesses that were wrong may leave no room

    @property
    def room(self) -> int:
        """How many more candidates may be asked for: a guess gives way to them, or is one of them."""
        return max(0, self._free() + len(self.guessed))

    def holds(self, candidate: Candidate) -> bool:
        """Whether its recipe is on its way to answer another question."""
        recipe = candidate.recipe.id
        return recipe in self.asked or self.guessed.get(recipe, candidate) != candidate

    def send(self, candidate: Candidate) -> None:
        """Have a candidate evaluated, if it is not under way as a guess already."""
        self.asked[candidate.recipe.id] = candidate
        if self.guessed.pop(candidate.recipe.id, None) is None:
            self._queue.append(candidate)
            self._fill()

    def guess(self, candidate: Candidate) -> bool:
        """Have a candidate evaluated that nobody has asked for yet; False where no worker is free for it."""
        if self._free() <= 0:
            return False
        if candidate.recipe.id not in self.asked | self.guessed:
            self.guessed[candidate.recipe.id] = candidate
            self._pool.submit(candidate)
        return True

    def land(self) -> Iterator[tuple[Candidate, Result, bool]]:
        """Wait for results: each with its candidate, and whether that was only guessed."""
        self._fill()
        for result in self._pool.wait():
            for flights in (self.asked, self.guessed):
                candidate = flights.get(result.recipe_id)
                # What an earlier search left in the pool is nobody's.
                if candidate is not None and (candidate.stage, candidate.number) == (result.stage, result.number):
                    yield flights.pop(result.recipe_id), result, flights is self.guessed
                    break

    def _free(self) -> int:
        return self._pool.free() - len(self._queue)

    def _fill(self) -> None:
        while self._queue and self._pool.free() > 0:
            self._pool.submit(self._queue.popleft())
