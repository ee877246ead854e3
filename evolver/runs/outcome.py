"""The outcome of a run: who came to the finals, what they scored, and what the search did on the way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from evolver.config import Config
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Candidate, Result, Split
from evolver.records.recipe import Recipe
from evolver.runs.about import About


@dataclass(frozen=True)
class Finalist:
    """A model that was scored on the report set: its dev result and its report result."""

    label: str
    recipe: Recipe
    dev: Result
    report: Result


@dataclass(frozen=True)
class Outcome:
    """All that a report says of a run. The winner is the last of the finalists.

    ``wasted`` are results of candidates that were scored ahead on guesses that proved wrong. ``lost`` are results that
    the search did not ask for again after an earlier failure was tried again.
    """

    about: About
    finalists: tuple[Finalist, ...]
    winning: Candidate
    searched: tuple[tuple[Candidate, Result], ...]
    wasted: tuple[Result, ...] = ()
    lost: tuple[Result, ...] = ()

    @property
    def config(self) -> Config:
        return self.about.config

    @property
    def scales(self) -> Mapping[Split, Scale]:
        return self.about.scales

    @property
    def winner(self) -> Finalist:
        return self.finalists[-1]

    @property
    def best_dev(self) -> Result:
        return self.winner.dev

    @property
    def best_expert(self) -> Finalist:
        """The expert with the highest dev score: the one that a user who has not seen the report items would take.

        Chosen on the report items, the highest of several noisy scores would be too high, and every difference to it
        too small.
        """
        return _highest(f for f in self.finalists if f.label in self.config.experts)

    @property
    def best_plain(self) -> Finalist:
        """The merge without a search (simple average, tuned task arithmetic) with the highest dev score."""
        return _highest(f for f in self.finalists[:-1] if f.label != "base" and f.label not in self.config.experts)


def _highest(finalists: Iterable[Finalist]) -> Finalist:
    """The highest dev score; a model that could not be scored on the report set only if there is no other."""
    return max(finalists, key=lambda f: (f.report.score is not None, -math.inf if f.dev.score is None else f.dev.score))
