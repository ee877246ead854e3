"""The main loop of a search: ask for candidates, look up or evaluate them, record the results, and tell the search."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from evolver.ledger import Ledger
from evolver.pool import Flights, Pool
from evolver.records import Candidate, Result
from evolver.search.base import Search

Watch = Callable[[Candidate, Result], None]
Judging = Callable[[Result], Result]
Guesses = Callable[[Callable[[Candidate], Result | None]], Iterator[Candidate]]


def evolve(
    search: Search, pool: Pool, ledger: Ledger, watch: Watch, guesses: Guesses | None = None,
    judge: Judging = lambda result: result,
) -> None:  # fmt: skip
    """Run a search to its end.

    Each result is written to disk before the search is told of it. Results that the ledger holds are taken from there,
    so a run that was killed continues where it stopped. A recipe that was scored before, or is being scored, is not
    scored again; if a part of its items is known, only the rest is scored.

    Args:
        search: proposes candidates and learns from results.
        pool: evaluates candidates.
        ledger: holds all results on disk.
        watch: called with every candidate and its result, after the search was told.
        guesses: yields candidates that the search will probably ask for next, which idle workers then score. It is
            called with a function that looks up the results of earlier guesses. A guess can make a result available
            earlier but cannot change it. None: nothing is scored ahead.
        judge: adds to a new result, before it is written, what follows from it and from other models.
    """
    flights = Flights(pool)
    followers: dict[str, list[Candidate]] = {}

    def settle(candidate: Candidate, result: Result) -> None:
        result = ledger.write_result(candidate, judge(result))
        search.tell(result)
        watch(candidate, result)

    def dispatch(candidate: Candidate) -> None:
        if answer := ledger.answer(candidate):
            settle(candidate, answer)
        elif flights.holds(candidate := ledger.with_known_items(candidate)):
            followers.setdefault(candidate.recipe.id, []).append(candidate)
        else:
            ledger.write_asked(candidate)
            flights.send(candidate)

    def run_ahead(guesses: Guesses) -> None:
        for candidate in guesses(ledger.answer):
            if ledger.answer(candidate) is None and not flights.guess(ledger.with_known_items(candidate)):
                break

    while not search.done:
        asked = search.ask(flights.room)
        for candidate in asked:
            dispatch(candidate)
        if not (flights.asked or followers):
            if not asked and not search.done:
                raise RuntimeError("the search waits for a result, but no candidate is being evaluated")
            continue
        if guesses:
            run_ahead(guesses)
        for candidate, result, guessed in flights.land():
            if guessed:
                ledger.write_guess(candidate, result)
            else:
                settle(candidate, result)
            for follower in followers.pop(result.recipe_id, []):
                dispatch(follower)
