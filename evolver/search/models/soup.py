"""Greedy soup: averages experts, from the best one on, as long as the average gets better.

The experts are scored first. Then each of them, in the order of their dev scores, is put into the soup on trial, and it
stays if the average of all that is in the soup has a higher dev score than before. In a second round and later ones,
experts that are in the soup already can come in once more, so that they count double.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evolver.config.section import Section
from evolver.records import UNKNOWN, Candidate, ItemAnswer, Result, Standing
from evolver.search.ahead import RunsAhead
from evolver.search.base import Setup, algorithm
from evolver.search.challenge import challenge, rejected


class SoupSettings(Section):
    """Settings of the greedy soup."""

    algorithm: Literal["soup"] = Field(description="name of this search")
    rounds: int = Field(
        1,
        ge=1,
        le=10_000,
        description="how often the experts are tried one after the other; 1 is the paper's soup, and from the second "
        "round on an expert can come in again",
    )


@algorithm("soup", SoupSettings, incumbent=True)
class Soup(RunsAhead):
    """The greedy soup (Wortsman et al. 2022, arXiv 2203.05482, recipe 1; more rounds: Caruana et al. 2004).

    Unlike the coefficient searches it has no weights to tune: an expert is in the average or not. It draws nothing at
    random, so the seed changes nothing, and it ends by itself. It assumes that experts which help one by one help
    together. Where experts have equal scores, the one that comes first in the configuration is tried first, and an
    average with the same score as before is refused.
    """

    def __init__(self, setup: Setup, settings: SoupSettings) -> None:
        self.size = len(setup.experts)
        super().__init__(setup, limit=self.size * (1 + settings.rounds) - 1)
        self.merge = setup.maker.merger({"method": "simple"})
        self.standings: list[Standing] = [UNKNOWN] * self.size
        self.answers: list[tuple[ItemAnswer, ...]] = [()] * self.size
        # How often each expert is in the soup, and the soup's own standing and answers.
        self.counts: tuple[int, ...] = (0,) * self.size
        self.standing, self.items = UNKNOWN, self.answers[0]
        self._trials: dict[int, tuple[int, ...]] = {}

    def waits_for(self, k: int) -> int:
        if k < self.size:
            return 0
        # Candidates of a batch are tried on the same soup.
        return max(self.size, k - (k - self.size) % self.setup.together)

    def propose(self, k: int) -> Candidate:
        if k < self.size:
            return Candidate(k, self.setup.experts[k], "soup/initial")
        ranked = sorted(range(self.size), key=lambda i: self.standings[i], reverse=True)  # a stable sort
        if not any(self.counts):
            self.counts = tuple(int(i == ranked[0]) for i in range(self.size))
            self.standing, self.items = self.standings[ranked[0]], self.answers[ranked[0]]
        added = ranked[(k - self.size + 1) % self.size]
        trial = tuple(count + (i == added) for i, count in enumerate(self.counts))
        self._trials[k] = trial
        members = [e for e, count in zip(self.setup.experts, trial, strict=True) for _ in range(count)]
        asked = challenge(self.setup, k, self.standing, self.items)
        parents = tuple(e.id for e, count in zip(self.setup.experts, trial, strict=True) if count)
        return Candidate(k, self.merge(members), "soup", parents, asked)

    def learn(self, candidate: Candidate, result: Result) -> None:
        k = candidate.number
        if k < self.size:
            self.standings[k], self.answers[k] = result.standing, result.items
            return
        trial = self._trials.pop(k)
        if result.standing > self.standing:
            self.counts, self.standing, self.items = trial, result.standing, result.items

    def assume(self, candidate: Candidate) -> Result | None:
        return None if candidate.number < self.size else rejected(candidate)
