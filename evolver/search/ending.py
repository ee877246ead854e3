"""When a search ends: what of its budget is spent, which part of the budget was spent first, and its time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

from evolver.config import Budget
from evolver.records import Candidate, Result

# A key of the section ``budget``, or ``search`` where a search came to an end of its own, such as its last generation.
Reason = Literal["candidates", "items", "minutes", "patience", "target", "search"]


@runtime_checkable
class Ending(Protocol):
    """A search that says why it has ended."""

    @property
    def ended(self) -> Reason | None:
        """What ended it; None while it goes on."""
        ...


def how_ended(search: object) -> Reason | None:
    """What ended a search that is done."""
    return search.ended if isinstance(search, Ending) else "search"


@dataclass(frozen=True)
class Progress:
    """What the results that a search has learnt so far mean for its budget.

    It depends on these results and their order only, so it is the same with any number of workers.

    Attributes:
        items: how many items were scored for them.
        best: the highest score of all items that may be accepted.
        idle: how many results came after the last improvement. Failed and stopped candidates count, too.
        reached: the part of the budget that was spent first; None: none is spent.
    """

    items: int = 0
    best: float = -math.inf
    idle: int = 0
    reached: Reason | None = None

    def after(self, result: Result, budget: Budget) -> Progress:
        """The progress with one more result. The score of a candidate that breaks a constraint does not count."""
        score = result.score if result.complete and result.feasible else None
        improved = score is not None and score > self.best
        found = replace(
            self, items=self.items + result.cost, idle=0 if improved else self.idle + 1,
            best=score if score is not None and improved else self.best,
        )  # fmt: skip
        return found if self.reached else replace(found, reached=found._spent(budget))

    def meets(self, budget: Budget) -> bool:
        """Whether the best score has come up to the target, if there is one."""
        return budget.target is not None and self.best >= budget.target

    def _spent(self, budget: Budget) -> Reason | None:
        if self.meets(budget):
            return "target"
        if budget.patience is not None and self.idle >= budget.patience:
            return "patience"
        return "items" if budget.items is not None and self.items >= budget.items else None


class Asking(Protocol):
    """What is used of a search here."""

    def ask(self, n: int) -> list[Candidate]: ...
    def tell(self, result: Result) -> None: ...
    @property
    def done(self) -> bool: ...
    @property
    def total(self) -> int | None: ...


class Timed:
    """A search that asks for nothing new once its time is up. Candidates that are in evaluation then are finished.

    Args:
        search: the search. The numbers of its candidates rise.
        up: whether the time is up.
        recorded: the numbers of the candidates that the run has results of. They are asked for even if the time is up,
            so that a run that was stopped after its time was up learns the same results again.

    Attributes:
        over: whether it asks for nothing any more.
    """

    def __init__(self, search: Asking, up: Callable[[], bool], recorded: Iterable[int]) -> None:
        self.search, self.over = search, False
        self._up, self._last = up, max(recorded, default=-1)
        self._newest, self._waiting = -1, 0

    @property
    def total(self) -> int | None:
        return self.search.total

    @property
    def done(self) -> bool:
        return self.search.done or (self.over and not self._waiting)

    @property
    def ended(self) -> Reason | None:
        """What ended the search; None while it goes on."""
        if self.search.done:
            return how_ended(self.search)
        return "minutes" if self.done else None

    def ask(self, n: int) -> list[Candidate]:
        up, known = self._up(), self._newest < self._last
        self.over = self.over or (up and not known)
        asked = [] if self.over else self.search.ask(1 if up else n)
        self.over = self.over or (up and not asked and not self._waiting)
        self._newest = max([self._newest, *(candidate.number for candidate in asked)])
        self._waiting += len(asked)
        return asked

    def tell(self, result: Result) -> None:
        self._waiting -= 1
        self.search.tell(result)
