"""Running ahead: guesses the candidates that a search will ask for next, so that idle workers can score them already.

A search that waits for each result before it proposes the next candidate keeps only one worker busy. Most of its
candidates are rejected, so its next proposals can be guessed: they are what it would propose if all pending candidates
were rejected. If a guess is right, the result is already there when the search asks for the candidate. If it is wrong,
the result is not used. The search sees the same results in both cases, so its decisions do not change.
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
    """A search whose next candidates can be guessed, which needs a copy of the search that can be told made-up
    results.
    """

    @property
    def done(self) -> bool: ...

    def ask(self, n: int) -> list[Candidate]: ...
    def tell(self, result: Result) -> None: ...

    def twin(self) -> Self:
        """A copy in the same state. Telling results to the copy does not change the original."""
        ...

    def pending(self) -> list[Candidate]:
        """The candidates that were asked for and whose results were not told yet, in order."""
        ...

    def assume(self, candidate: Candidate) -> Result | None:
        """The most likely result of a pending candidate; None if it cannot be guessed."""
        ...


class RunsAhead(Ordered):
    """An ``Ordered`` search that can be copied by copying its lists and mappings.

    A subclass may replace the members of its lists and mappings but must not change the members themselves, because the
    copy shares them. Searches whose state is in an object of another library, such as an Optuna study, cannot be copied
    like this.
    """

    def twin(self) -> Self:
        """A copy in the same state. Telling results to the copy does not change this search.

        The lists and mappings are copied; their members are shared.
        """
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list | dict):
                setattr(twin, name, value.copy())
        return twin

    def pending(self) -> list[Candidate]:
        """The candidates that were asked for and whose results were not told yet, in order.

        Only for ``order: exact``, in which results are learnt in the order of their candidates.
        """
        return [c for c in self._asked[self._learnt :] if c.number not in self._told]

    def assume(self, candidate: Candidate) -> Result | None:
        """The most likely result of a pending candidate; None if it cannot be guessed."""
        raise NotImplementedError  # every search defines it


def ahead(search: Guessable, known: Known) -> Iterator[Candidate]:
    """Yield the next candidates of a search, as far as they can be guessed. The search itself is not changed.

    Args:
        known: returns the result of a candidate that was guessed and scored before, or None.
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
