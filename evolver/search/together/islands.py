"""Islands: searches side by side that send each other their best models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from evolver.config.section import Section
from evolver.records import Candidate, Result
from evolver.search.base import Receives, Setup, algorithm
from evolver.search.together.turns import Arm, Turns


class IslandsSettings(Section):
    """Settings of islands."""

    algorithm: Literal["islands"] = Field(description="name of this search")
    islands: dict[str, dict[str, Any]] = Field(
        description="the searches, by names of your own: algorithm and settings of each"
    )
    turn: int = Field(
        4, ge=1, le=10_000, description="number of candidates that an island proposes in one turn, at most"
    )
    every: int = Field(
        2,
        ge=1,
        le=1_000_000,
        description="number of turns after which each island sends its best model to the next one",
    )


@algorithm("islands", IslandsSettings, incumbent=True)
class Archipelago(Turns):
    """The island model of evolutionary computation (Whitley, Rana and Heckendorn 1999) over different searches.

    All islands have every turn. After every ``every`` turns, each island sends its best model to the next one in the
    order in which they are listed, the last one to the first. What an island does with it is its own matter: a
    population takes it in if it is better than the worst member, and ``tpe`` learns from it where its space holds it.

    Unlike ``portfolio``, all islands get the same number of turns, and good models travel. It assumes that what is good
    for one search is a good start for another, which holds where they search similar models.
    """

    all_play = True

    def __init__(self, setup: Setup, settings: IslandsSettings) -> None:
        self.settings = settings
        self._over = 0
        self._best: dict[str, tuple[Candidate, Result]] = {}  # what each island has found, by its name
        super().__init__(setup, settings.islands, "search.islands", settings.turn)

    def following(self) -> Sequence[Arm]:
        return self.arms

    def learnt(self, arm: Arm, candidate: Candidate, result: Result) -> None:
        best = self._best.get(arm.name)
        if result.complete and (best is None or result.standing > best[1].standing):
            self._best[arm.name] = candidate, result

    def turn_over(self) -> None:
        self._over += 1
        if self._over % self.settings.every == 0:
            sent = [self._best.get(arm.name) for arm in self.arms]
            for best, receiver in zip([sent[-1], *sent[:-1]], self.arms, strict=True):
                if best is not None and isinstance(receiver.search, Receives) and not receiver.search.done:
                    receiver.search.receive(*best)
