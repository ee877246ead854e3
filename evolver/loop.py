"""The loop: ask, look up, submit, collect, record, tell. Everything that a run does passes through here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from evolver.ledger import Ledger
from evolver.pool import Flights, Pool
from evolver.records import Candidate, Result
from evolver.search.base import Search

Watch = Callable[[Candidate, Result], None]
Guesses = Callable[[Callable[[Candidate], Result | None]], Iterator[Candidate]]


def evolve(search: Search, pool: Pool, ledger: Ledger, watch: Watch, guesses: Guesses | None = None) -> None:
    """Run a search to its end. A result is on disk before the search hears of it.

    What the ledger holds is answered from it, so that a run which was killed goes on where it stopped. A recipe that
    was scored before, or is being scored, is not scored again; one of which a part is known is scored from there on.
    Where workers are idle, they score what the search is guessed to ask for next: ``guesses`` gets the results of
    earlier guesses and says it. A guess changes when a result is there, never the result.
    """
    flights = Flights(pool)
    followers: dict[str, list[Candidate]] = {}

    def settle(candidate: Candidate, result: Result) -> None:
        result = ledger.write_result(candidate, result)
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
                raise RuntimeError("the search waits for results although none is outstanding")
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
