"""What searches of several searches share: their arms take turns, and all results of a turn are learnt before the next.

A turn's candidates do not depend on one another's results, so they can be scored at the same time. Which arms have the
next turn is decided by results that are learnt in the order of the candidates, so neither timing nor the number of
workers has an influence.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evolver.config.reading import check_section
from evolver.errors import BadInput, nearest
from evolver.records import Candidate, Result
from evolver.search.base import SEARCHES, Ordered, Search, Setup, inside
from evolver.search.together.alike import alike

# How many candidates in a row an arm may propose that are nearly models with results, before one of them is let pass.
MOST_ALIKE = 20


@dataclass(frozen=True)
class Arm:
    """One of the searches.

    Attributes:
        name: its name in the configuration.
        search: the search itself, which numbers its candidates from 0.
    """

    name: str
    search: Search


class Turns(Ordered):
    """A search made of other searches, its arms.

    A subclass says in ``following`` in which order arms have the next turn, and learns in ``learnt`` what a result
    means.

    Attributes:
        all_play: whether all arms have every turn; else, only the first one that has something to propose.

    Args:
        sections: the settings of each arm, by its name.
        key: the key of the configuration that holds them, for messages.
        size: the number of candidates that an arm may propose in one turn, at most.

    Raises BadInput for an unknown search, for settings that it does not take, and for an arm that cannot share a
    budget.
    """

    all_play = False

    def __init__(self, setup: Setup, sections: Mapping[str, Mapping[str, Any]], key: str, size: int) -> None:
        super().__init__(setup)
        if len(sections) < 2:
            raise BadInput(f"{key}: {len(sections)} search is given; name at least two.")
        self.size = size
        self.arms = [Arm(n, _search(setup, n, section, f"{key}.{n}", size)) for n, section in sections.items()]
        # of each candidate of this turn, the arms that wait for its result, with what they call it
        self._whose: dict[int, list[tuple[Arm, Candidate]]] = {}
        self._turn: list[Candidate] = []
        self._keys: list[str] = []  # of the candidates of this turn, as ``alike`` gives them
        self._begin = self._end = 0
        self._begins: list[int] = []  # of each turn, the number of its first candidate
        self._known: dict[str, Result] = {}
        self._next_turn()

    def following(self) -> Sequence[Arm]:
        """All arms in the order of the next turn, those with nothing left to propose among them."""
        raise NotImplementedError  # every subclass defines it

    def learnt(self, arm: Arm, candidate: Candidate, result: Result) -> None:
        """Take in the result of an arm's candidate, of which the arm was told already."""

    def turn_over(self) -> None:
        """Called when all results of a turn are learnt."""

    def waits_for(self, k: int) -> int:
        return self._begins[bisect_right(self._begins, k) - 1] if k < self._end else self._end

    def propose(self, k: int) -> Candidate:
        return self._turn[k - self._begin]

    def learn(self, candidate: Candidate, result: Result) -> None:
        key = self._keys[candidate.number - self._begin]
        if result.complete or key not in self._known:
            self._known[key] = result
        (arm, first), *others = self._whose.pop(candidate.number)
        arm.search.tell(replace(result, number=first.number, rank=None))
        self.learnt(arm, candidate, result)
        for other, own in others:
            other.search.tell(_told(result, own))
        if not self._whose:
            self.turn_over()
            self._next_turn()

    def _next_turn(self) -> None:
        """Ask the arms whose turn it is; where none has a candidate, the search ends."""
        self._begin, self._turn, self._keys = self._end, [], []
        self._begins.append(self._begin)
        for arm in self.following():
            if not arm.search.done and (self.all_play or not self._turn):
                self._take(arm)
        self._end = self._begin + len(self._turn)
        if not self._turn:
            self.limit = self._end

    def _take(self, arm: Arm) -> None:
        """Take an arm's next candidates. What is nearly a model that has a result is answered by this result, and what
        is nearly a model of this turn will be.
        """
        passed = taken = 0
        while taken < self.size and (found := arm.search.ask(1)):
            own, key = found[0], alike(found[0].recipe)
            if passed < MOST_ALIKE and self._refused(arm, own, key):
                passed += 1
                continue
            number = self._begin + len(self._turn)
            self._whose[number] = [(arm, own)]
            self._turn.append(replace(own, number=number, proposer=f"{arm.name}: {own.proposer}"))
            self._keys.append(key)
            taken += 1

    def _refused(self, arm: Arm, own: Candidate, key: str) -> bool:
        """Whether a candidate need not be scored, as a model that is nearly the same has a result, or will have one."""
        known = self._known.get(key)
        if known is not None and known.answers(own):
            arm.search.tell(_told(known, own))
            return True
        for other, its_key in zip(self._turn, self._keys, strict=True):
            if other.question == own.question and its_key == key:
                self._whose[other.number].append((arm, own))
                return True
        return False


def _told(result: Result, own: Candidate) -> Result:
    """What is told of a candidate that is nearly the model of a result."""
    return replace(result, number=own.number, recipe_id=own.recipe.id, reused=True, rank=None)


def _search(setup: Setup, name: str, section: Mapping[str, Any], key: str, size: int) -> Search:
    """An arm's search. Its draws are its own; the budget is that of all arms together.

    A search that can propose ``size`` candidates on the same results does so.
    """
    algorithm = section.get("algorithm") if isinstance(section, Mapping) else None
    single = [n for n, found in SEARCHES.items() if not found.partial and n not in ("portfolio", "islands")]
    if algorithm not in single:
        raise BadInput(
            f"{key}.algorithm: {algorithm!r} cannot be one of several searches; {nearest(algorithm, single)}"
        )
    found = SEARCHES[algorithm]
    typed = check_section(found.settings, section, key)
    budget = setup.budget.model_copy(update={"items": None, "patience": None, "target": None, "minutes": None})
    seed = random.Random(f"{setup.seed}:{name}").getrandbits(32)
    together = size if getattr(typed, "mode", "generational") == "generational" else 1
    with inside(key):
        return found.build(replace(setup, budget=budget, seed=seed, together=together, arrival=False), typed)
