"""The loop: ask, look up, submit, collect, record, tell. Everything that a run does passes through here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from evolver.ledger import Ledger
from evolver.records import Candidate, Result
from evolver.search.base import Search

Watch = Callable[[Candidate, Result], None]


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


def evolve(search: Search, pool: Pool, ledger: Ledger, watch: Watch) -> None:
    """Run a search to its end. A result is on disk before the search hears of it.

    What the ledger holds is answered from it, so that a run which was killed goes on where it stopped. A recipe that
    was scored before, or is being scored, is not scored again; one of which a part is known is scored from there on.
    """
    flying: dict[int, Candidate] = {}
    followers: dict[str, list[Candidate]] = {}

    def settle(candidate: Candidate, result: Result) -> None:
        search.tell(result)
        watch(candidate, result)

    def dispatch(candidate: Candidate) -> None:
        if recorded := ledger.recorded(candidate):
            settle(candidate, recorded)
        elif known := ledger.known(candidate):
            result = replace(known, number=candidate.number, stage=candidate.stage, reused=True)
            ledger.finished(candidate, result)
            settle(candidate, result)
        elif any(f.recipe.id == candidate.recipe.id for f in flying.values()):
            followers.setdefault(candidate.recipe.id, []).append(candidate)
        else:
            candidate = replace(candidate, known=ledger.items(candidate))
            ledger.asked(candidate)
            flying[candidate.number] = candidate
            pool.submit(candidate)

    while not search.done:
        asked = search.ask(max(0, pool.free()))
        for candidate in asked:
            dispatch(candidate)
        if not flying:
            if not asked and not search.done:
                raise RuntimeError("the search waits for results although none is outstanding")
            continue
        for result in pool.wait():
            candidate = flying.pop(result.number)
            ledger.finished(candidate, result)
            settle(candidate, result)
            for follower in followers.pop(result.recipe_id, []):
                dispatch(follower)
