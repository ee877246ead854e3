"""Running ahead: what a search would ask for next if everything that is pending were rejected, as most of it is.

A search that proposes one candidate on the result of the one before keeps one worker busy. Its next candidates can be
guessed and scored all the same: where the guess was right, the result is there when the search asks; where it was
wrong, the work is thrown away. What the search sees is the same either way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Protocol, Self, runtime_checkable

from evolver.records import Candidate, Result
from evolver.search.base import Ordered

Known = Callable[[Candidate], Result | None]


@runtime_checkable
class Guessable(Protocol):
    """A search whose next candidates can be guessed. Only searches that can be copied and left as they are have it."""

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


class RunsAhead(Ordered):
    """A search in order that can be guessed: its state is what its own lists and mappings hold, changed in none of
    their members. One that stands on somebody else's state, as on a study of Optuna's, cannot be copied so.
    """

    def twin(self) -> Self:
        """A copy in the same state; what is told to it leaves this one as it is.

        Lists and mappings are copied, what they hold is shared: an algorithm changes none of it in place.
        """
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list | dict):
                setattr(twin, name, value.copy())
        return twin

    def pending(self) -> list[Candidate]:
        """What was asked for and not told, in order; where results are learnt in the order of their candidates."""
        return [c for c in self._asked[self._learnt :] if c.number not in self._told]

    def assume(self, candidate: Candidate) -> Result | None:
        """What a pending candidate will most likely come to; None where there is no telling."""
        raise NotImplementedError  # every algorithm says its own


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
