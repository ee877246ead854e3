"""The stage of a run in which it searches: until the first limit of the budget is reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from evolver.config import Budget
from evolver.driver.prepare import Prepared
from evolver.ledger import Ledger
from evolver.loggers.terminal import Display
from evolver.loop import Judging, Watch, evolve
from evolver.pool import Pool
from evolver.records import Candidate, Result
from evolver.runs.clock import Clock
from evolver.runs.ended import write_ended
from evolver.search.ahead import Guessable, ahead
from evolver.search.ending import Timed
from evolver.storage import Storage


@dataclass(frozen=True)
class SearchStage:
    """What a search stage goes on with.

    Args:
        folder: of the run, where the time of the search and the reason for its end are kept.
        judge: adds to a result by how much the candidate breaks the run's constraints.
    """

    prepared: Prepared
    folder: Storage
    ledger: Ledger
    pool: Pool
    display: Display
    judge: Judging

    def search(self, watch: Watch, clock: Clock) -> None:
        """Search, or go on with it, until the first limit of the budget is reached."""
        budget = self.prepared.config.budget
        recorded = {result.number for result in self.ledger.results("search")}
        clock.begin()
        timed = Timed(self.prepared.search, lambda: _up(clock, budget), recorded)

        def watched(candidate: Candidate, result: Result) -> None:
            if result.number not in recorded:
                clock.tick()
            watch(candidate, result)

        evolve(timed, self.pool, self.ledger, watched, self._guesses(timed), self.judge)
        if {result.number for result in self.ledger.results("search")} != recorded:
            clock.write()
        if timed.ended is not None:
            self.display.say(f"the search has ended: {write_ended(self.folder, budget, timed.ended).why}")

    def _guesses(self, timed: Timed) -> Callable[[Callable[[Candidate], Result | None]], Iterator[Candidate]] | None:
        """What is scored ahead by workers that would be idle."""
        search, config = self.prepared.search, self.prepared.config
        if not (config.pool.ahead and config.order == "exact" and isinstance(search, Guessable)):
            return None
        return lambda known: iter(()) if timed.over else ahead(search, known)


def _up(clock: Clock, budget: Budget) -> bool:
    return budget.minutes is not None and clock.up(budget.minutes)
