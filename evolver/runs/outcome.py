"""The outcome of a run: who came to the finals, what they scored, and what the search did on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evolver.config import Config
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Candidate, Result, Split
from evolver.records.recipe import Recipe
from evolver.runs.about import About
from evolver.runs.finals import Contender, Finals
from evolver.runs.origin import Origin, Use


@dataclass(frozen=True)
class Finalist:
    """A model that was scored on the report set: its results on the dev items, on the select items if it was scored on
    them, and on the report items.
    """

    label: str
    recipe: Recipe
    dev: Result
    report: Result
    select: Result | None = None


@dataclass(frozen=True)
class Outcome:
    """All that a report says of a run. The winner of the search is the last of the finalists.

    ``wasted`` are results of candidates that were scored ahead on guesses that proved wrong. ``lost`` are results that
    the search did not ask for again after an earlier failure was tried again. ``front`` are the models on the front of
    a run with several objectives, among them the winner, if it is on it. ``uses`` are the runs of its family that were
    scored on its report items, in their order; ``origin`` is the run that it goes on from.
    """

    about: About
    finalists: tuple[Finalist, ...]
    finals: Finals
    searched: tuple[tuple[Candidate, Result], ...]
    wasted: tuple[Result, ...] = ()
    lost: tuple[Result, ...] = ()
    front: tuple[Finalist, ...] = ()
    uses: tuple[Use, ...] = ()
    origin: Origin | None = None

    @property
    def config(self) -> Config:
        return self.about.config

    @property
    def use(self) -> int:
        """Whether the run was the first one to use its report items (1), the second (2), and so on."""
        owners = [use.owner for use in self.uses]
        return 1 + owners.index(str(self.about.owner)) if self.about.owner in owners else 1

    @property
    def scales(self) -> Mapping[Split, Scale]:
        return self.about.scales

    @property
    def winning(self) -> Candidate:
        """The candidate of the search that the winner is."""
        return self.finals.winner.candidate

    @property
    def winner(self) -> Finalist:
        return self.finalists[-1]

    @property
    def recommended(self) -> Finalist:
        """The model that ``best/`` holds: the winner, or a plain merge that leads it on the select items."""
        return self._of(self.finals.recommended)

    @property
    def best_expert(self) -> Finalist:
        """See ``Finals``. An expert that could not be scored on the report items is named only if there is no other."""
        return self._of(self._reported(self.finals.experts, self.finals.best_expert))

    @property
    def best_plain(self) -> Finalist:
        """The merge without a search (simple average, tuned task arithmetic) that leads; likewise."""
        return self._of(self._reported(self.finals.plain, self.finals.best_plain))

    def _of(self, contender: Contender) -> Finalist:
        found = {f.label: f for f in self.finalists}
        return found.get(contender.label, self.winner)

    def _reported(self, contenders: tuple[Contender, ...], first: Contender) -> Contender:
        scored = [c for c in contenders if self._of(c).report.score is not None]
        return first if first in scored or not scored else max(scored, key=self.finals.key)
