"""Running ahead: what a search would ask for next if everything that is pending were rejected, as most of it is.

A search that proposes one candidate on the result of the one before keeps one worker busy. Its next candidates can be
guessed and scored all the same: where the guess was right, the result is there when the search asks; where it was
wrong, the work is thrown away. What the search sees is the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, Self

from evolver.records import Candidate, Result

Known = Callable[[Candidate], Result | None]


class Guessable(Protocol):
    """A search whose next candidates can be guessed."""

    @property
    def done(self) -> bool: ...

    def ask(self, n: int) -> list[Candidate]: ...
    def tell(self, result: Result) -> None: ...

    def twin(self) -> Self:
        """A copy in the same state; what is told to it leaves the original as it is."""
        ...

    def pending(self) -> list[Candidate]:
        """What was asked for and not told, in order."""
        ...

    def assume(self, candidate: Candidate) -> Result | None:
        """What a pending candidate will most likely come to; None where there is no telling."""
        ...


def ahead(search: Guessable, known: Known) -> Iterator[Candidate]:
    """The next candidates of a search, as far as they can be guessed. The search stays as it is.

    Args:
        known: the result of a candidate that was guessed and scored before, or None.
    """
    twin = search.twin()
    while not twin.done:
        for candidate in twin.pending():
            result = known(candidate) or twin.assume(candidate)
            if result is None:
                return
            twin.tell(result)
        asked = twin.ask(1)
        if not asked:
            return
        yield from asked
