"""A pool over another one that tries a candidate again after a failure that is not its own."""

from __future__ import annotations

from dataclasses import dataclass

from evolver.errors import BadInput
from evolver.pool import Pool
from evolver.records import Candidate, Result

# How many candidates may fail one after the other for a reason that is not their own, before the run stops.
IN_A_ROW = 3


@dataclass
class _Flight:
    """A candidate in the pool, and how often it was tried before."""

    candidate: Candidate
    tried: int = 0


class RetryingPool:
    """Hands candidates to a pool, and those that a missing file or server has failed once more, before anybody is told.

    Such a failure hits the next candidates, too, until somebody mends its cause. So the pool stops the run after some
    of them in a row, rather than spend the budget on failures.

    Args:
        pool: evaluates the candidates.
        retries: how often a candidate is tried again.
    """

    def __init__(self, pool: Pool, retries: int) -> None:
        self._pool, self._retries = pool, retries
        self._flights: dict[tuple[str, int, str], _Flight] = {}
        self._in_a_row = 0
        self._stop: BadInput | None = None

    def free(self) -> int:
        return self._pool.free()

    def submit(self, candidate: Candidate) -> None:
        self._flights[candidate.stage, candidate.number, candidate.recipe.id] = _Flight(candidate)
        self._pool.submit(candidate)

    def wait(self) -> list[Result]:
        """See ``Pool``.

        Raises BadInput where candidates fail one after the other for a reason that is not their own. Results that
        landed together with the last failure are returned first, so that they are kept.
        """
        while True:
            if self._stop is not None:
                raise self._stop
            landed = [result for result in self._pool.wait() if not self._holds_back(result)]
            if landed:
                return landed

    def close(self) -> None:
        self._pool.close()

    def _holds_back(self, result: Result) -> bool:
        """Whether the search is not told of a result, because its candidate is not to blame and is tried again."""
        key = result.stage, result.number, result.recipe_id
        flight = self._flights.pop(key)
        if not result.transient:
            self._in_a_row = 0
            return False
        if flight.tried < self._retries:
            self._flights[key] = _Flight(flight.candidate, flight.tried + 1)
            self._pool.submit(flight.candidate)
            return True
        self._in_a_row += 1
        if self._in_a_row >= IN_A_ROW:
            self._stop = BadInput(
                f"the last {IN_A_ROW} candidates failed for a reason that is not theirs ({result.reason.rstrip('.')}). "
                "All scores are kept: remove the cause, and call the same command again with --retry-failed."
            )
        return self._stop is not None  # a failure that stops the run is not told: the next call tries it again
