"""The protocol of a search, its laws, and the registry of algorithms.

Laws, which the tests hold every search to:
1. ``ask`` never blocks. It returns at most n candidates, and fewer (none, too) while it has to wait for results.
2. ``tell`` takes results one by one, in any order, failures included, and never changes what it is given.
3. The k-th candidate depends on the settings, the seed and the results of the candidates that it waits for, and on
   nothing else: not on timing, not on the number of workers. Replaying the results replays the search. Where results
   are learnt by arrival, it depends on the order of their ranks, too, which a replay repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from evolver.config import Budget, Section
from evolver.records import Candidate, Choice, Expert, Knob, Recipe, Result


class Search(Protocol):
    """Anything that proposes candidates."""

    def ask(self, n: int) -> list[Candidate]: ...
    def tell(self, result: Result) -> None: ...

    @property
    def done(self) -> bool:
        """No further candidate will come, whatever is told."""
        ...

    @property
    def total(self) -> int | None:
        """The number of candidates to come in all, where it is known."""
        ...


class Space(Protocol):
    """A search space of recipes, as the coefficient searches see it."""

    @property
    def knobs(self) -> tuple[Knob | Choice, ...]: ...
    def decode(self, values: Mapping[str, Any]) -> Recipe: ...
    def encode_equal(self, mass: float) -> dict[str, Any]: ...


class Maker(Protocol):
    """What the making half offers to algorithms, with bad settings refused as BadInput."""

    def space(self, method: str, groups: int, tune: Sequence[str] | None, settings: Mapping[str, Any]) -> Space: ...

    def merger(self, settings: Mapping[str, Any]) -> Callable[[Sequence[Recipe]], Recipe]: ...


class Estimator(Protocol):
    """What the evaluating half offers to algorithms that have a part of the items scored."""

    @property
    def items(self) -> int:
        """The number of dev items."""
        ...

    @property
    def block(self) -> int:
        """Items are scored so many at a time."""
        ...

    def check(self, kind: str, key: str) -> None:
        """Raises BadInput where the run's tasks allow no estimates of this kind, naming ``key``."""
        ...

    def learn(self, result: Result) -> None:
        """Take in what a model answered to all items; other results teach nothing."""
        ...

    def known(self, recipe_id: str) -> Result | None:
        """What was learnt of a recipe."""
        ...

    def estimate(self, kind: str, items: Sequence[float]) -> float:
        """The score of all items, estimated from the answers to the first of them.

        Depends on these and on the set of results that were learnt, not on their order.
        """
        ...


@dataclass(frozen=True)
class Setup:
    """What every algorithm is built from.

    ``racing`` asks for the items of the incumbent beside its score. ``together`` is above 1 where candidates are asked
    for in batches of so many, and all results of a batch are told before the next one is asked for. ``arrival`` has
    results learnt by their ranks instead of the numbers of their candidates. ``tasks`` names what a search of several
    objectives has them from.
    """

    experts: tuple[Expert, ...]
    base: Expert
    seed: int
    budget: Budget
    maker: Maker
    estimator: Estimator
    early_stopping: bool = True
    racing: bool = False
    together: int = 1
    arrival: bool = False
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Algorithm:
    """A registered search: its settings, how it is built from them, and whether candidates challenge an incumbent."""

    name: str
    settings: type[Section]
    build: Callable[[Setup, Any], Search]
    incumbent: bool = False


SEARCHES: dict[str, Algorithm] = {}
SettingsType = TypeVar("SettingsType", bound=Section)


def algorithm(name: str, settings: type[SettingsType], incumbent: bool = False) -> Callable[[Any], Any]:
    """Register a search under ``name``; it is built as ``search(setup, settings)``."""

    def register(build: Any) -> Any:
        SEARCHES[name] = Algorithm(name, settings, build, incumbent)
        return build

    return register


class Ordered:
    """A search whose candidates are a sequence: each is proposed after a fixed number of results, told in order.

    An algorithm writes three methods. ``waits_for(k)`` is how many results the k-th candidate is proposed on,
    ``propose(k)`` the candidate itself, ``learn(candidate, result)`` what a result teaches; results arrive there in
    the order of the candidates, or by their ranks, whatever the order in which they were told. So law 3 holds by
    construction.
    """

    def __init__(self, setup: Setup, limit: int | None = None) -> None:
        self.setup = setup
        self.limit = limit
        self._asked: list[Candidate] = []
        self._told: dict[int, Result] = {}
        self._learnt = 0
        self._items = 0

    def waits_for(self, k: int) -> int:
        """How many results, the first n of them, candidate ``k`` is proposed on; never less than for k-1."""
        raise NotImplementedError  # every algorithm says its own

    def propose(self, k: int) -> Candidate:
        """Candidate number ``k``."""
        raise NotImplementedError  # every algorithm says its own

    def learn(self, candidate: Candidate, result: Result) -> None:
        """Take in the next result."""
        raise NotImplementedError  # every algorithm says its own

    @property
    def total(self) -> int | None:
        limits = [n for n in (self.limit, self.setup.budget.candidates) if n is not None]
        return min(limits) if limits else None

    @property
    def done(self) -> bool:
        return self._spent() and self._learnt == len(self._asked)

    def ask(self, n: int) -> list[Candidate]:
        out: list[Candidate] = []
        while len(out) < n and not self._spent():
            k = len(self._asked)
            if not self._learn_up_to(self.waits_for(k)) or self._spent():
                break
            candidate = self.propose(k)
            self._asked.append(candidate)
            out.append(candidate)
        if self._spent():
            self._learn_up_to(len(self._asked))  # the budget may have ended on results that were told before
        return out

    def tell(self, result: Result) -> None:
        self._told[self._place(result)] = result
        if self._spent():
            self._learn_up_to(len(self._asked))  # nothing more will be asked: whatever comes may be learnt

    def _learn_up_to(self, count: int) -> bool:
        while self._learnt < count and self._learnt in self._told:
            result = self._told.pop(self._learnt)
            self._items += result.cost
            self.learn(self._asked[result.number], result)
            self._learnt += 1
        return self._learnt >= count

    def _place(self, result: Result) -> int:
        return result.number if result.rank is None or not self.setup.arrival else result.rank

    def _spent(self) -> bool:
        budget = self.setup.budget
        return (self.total is not None and len(self._asked) >= self.total) or (
            budget.items is not None and self._items >= budget.items
        )
