"""A search that goes on from the results of an earlier one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self, runtime_checkable

from evolver.records import Candidate, Result
from evolver.search.ahead import Guessable
from evolver.search.base import Search
from evolver.search.ending import Reason, how_ended


@runtime_checkable
class Informed(Protocol):
    """A search that can learn from results of candidates that it has not proposed."""

    def inform(self, pairs: Sequence[tuple[Candidate, Result]]) -> None:
        """Take in candidates and results of an earlier search, before the first candidate is asked for."""
        ...


@dataclass(frozen=True)
class Sequel:
    """Candidates that depend on the results of those listed before them.

    Attributes:
        count: their number, which is known beforehand.
        candidates: makes them, given the first of their numbers and all listed candidates with their results.
    """

    count: int
    candidates: Callable[[int, Sequence[tuple[Candidate, Result]]], Sequence[Candidate]]


NO_SEQUEL = Sequel(0, lambda first, pairs: ())


class ContinuedSearch:
    """Proposes the candidates of an earlier search again, which the ledger answers, and then those of a new search.

    The candidates of the new search are numbered after the listed ones and their sequel. If the new search is
    ``Informed``, it is told all their results before it is asked for its first candidate.

    Args:
        listed: the candidates of the earlier search, in the order of their numbers.
        inner: the new search; None: the listed candidates are all.
        sequel: candidates that follow when the listed ones have results.

    Attributes:
        first: the number of the new search's first candidate.
    """

    def __init__(self, listed: Sequence[Candidate], inner: Search | None, sequel: Sequel = NO_SEQUEL) -> None:
        self._listed, self._inner, self._sequel = tuple(listed), inner, sequel
        self._next = 1 + max((c.number for c in listed), default=-1)
        self.first = self._next + sequel.count
        self._asked = 0
        self._told: dict[int, Result] = {}
        self._informed = False

    @property
    def inner(self) -> Search | None:
        """The new search."""
        return self._inner

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should read of the new search before the run."""
        return tuple(getattr(self._inner, "remarks", ()))

    @property
    def total(self) -> int | None:
        more = 0 if self._inner is None else self._inner.total
        return None if more is None else len(self._listed) + self._sequel.count + more

    @property
    def done(self) -> bool:
        told = len(self._told) == len(self._listed) + self._sequel.count
        return told and (self._inner is None or self._inner.done)

    @property
    def ended(self) -> Reason | None:
        """What ended it; None while it goes on."""
        if not self.done:
            return None
        if self._inner is None:
            return "candidates"
        return how_ended(self._inner)

    def ask(self, n: int) -> list[Candidate]:
        if self._sequel.count and len(self._told) == len(self._listed):
            self._listed += tuple(self._sequel.candidates(self._next, self._pairs()))
            self._sequel = NO_SEQUEL
        if self._asked < len(self._listed):
            out = list(self._listed[self._asked : self._asked + n])
            self._asked += len(out)
            return out
        if self._inner is None or self._sequel.count or len(self._told) < len(self._listed):
            return []
        self._inform()
        return [self._outer(candidate) for candidate in self._inner.ask(n)]

    def tell(self, result: Result) -> None:
        if result.number < self.first:
            self._told[result.number] = result
        elif self._inner is not None:
            rank = None if result.rank is None else result.rank - len(self._listed)
            self._inner.tell(replace(result, number=result.number - self.first, rank=rank))

    def _inform(self) -> None:
        if isinstance(self._inner, Informed) and not self._informed:
            self._inner.inform(self._pairs())
        self._informed = True

    def _pairs(self) -> list[tuple[Candidate, Result]]:
        return [(c, self._told[c.number]) for c in self._listed]

    def _outer(self, candidate: Candidate) -> Candidate:
        return replace(candidate, number=candidate.number + self.first)


class ContinuedAhead(ContinuedSearch):
    """The same with a new search whose next candidates can be guessed."""

    _inner: Guessable  # type: ignore[assignment]  # a search, too

    def twin(self) -> Self:
        """A copy in the same state. Telling results to the copy does not change this search."""
        twin = copy.copy(self)
        twin._told, twin._inner = dict(self._told), self._inner.twin()
        return twin

    def pending(self) -> list[Candidate]:
        """The candidates that were asked for and whose results were not told yet, in order."""
        listed = [c for c in self._listed[: self._asked] if c.number not in self._told]
        return listed + [self._outer(candidate) for candidate in self._inner.pending()]

    def assume(self, candidate: Candidate) -> Result | None:
        """The most likely result of a pending candidate; None if it cannot be guessed."""
        if candidate.number < self.first:
            return None
        own = self._inner.assume(replace(candidate, number=candidate.number - self.first))
        return None if own is None else replace(own, number=own.number + self.first)


def continued(listed: Sequence[Candidate], inner: Search | None, sequel: Sequel = NO_SEQUEL) -> ContinuedSearch:
    """The search that begins with the candidates of an earlier one."""
    kind = ContinuedAhead if isinstance(inner, Guessable) else ContinuedSearch
    return kind(listed, inner, sequel)
