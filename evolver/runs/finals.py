"""The finals of a run: who came to them by the dev items, and who leads on select items that no search saw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from evolver.config import Config
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Candidate, Result, Split, Stage
from evolver.records.recipe import Recipe

Rated = tuple[Candidate, Result]
TUNED = "task_arithmetic@"


@dataclass(frozen=True)
class Contender:
    """A model in the finals.

    Attributes:
        label: its name among the baselines, or ``candidate`` and its number.
        candidate: the proposal that it was.
        dev: its result on the dev items.
        select: its result on the select items; None without such items, and before they are scored.
    """

    label: str
    candidate: Candidate
    dev: Result
    select: Result | None = None

    @property
    def recipe(self) -> Recipe:
        return self.candidate.recipe


@dataclass(frozen=True)
class Finals:
    """Everybody in the finals of a run.

    Args:
        searched: the best candidates of the search on the dev items, best first.
        experts: the experts.
        plain: the merges without a search: the simple average, and task arithmetic as tuned on the dev items.
        scales: how items make up scores.
        alone: whether the search's candidates are ranked by the select items alone, and not together with the dev
            items.
    """

    searched: tuple[Contender, ...]
    experts: tuple[Contender, ...]
    plain: tuple[Contender, ...]
    scales: Mapping[Split, Scale]
    alone: bool = False

    @property
    def everybody(self) -> tuple[Contender, ...]:
        return (*self.experts, *self.plain, *self.searched)

    @property
    def held(self) -> bool:
        """Whether all of them are scored on the select items, if there are such items."""
        return "select" not in self.scales or all(c.select is not None for c in self.everybody)

    @property
    def ranked(self) -> tuple[Contender, ...]:
        """The search's candidates, best first; of equals, the one with the higher dev score comes first."""
        return tuple(sorted(self.searched, key=self.key, reverse=True))

    @property
    def winner(self) -> Contender:
        """The first of the search's candidates."""
        return self.ranked[0]

    @property
    def best_expert(self) -> Contender:
        """The expert that a user who has not seen the report items would take: the best on dev and select items.

        Chosen on the report items, the highest of several noisy scores would be too high, and every difference to it
        too small.
        """
        return max(self.experts, key=self.key)

    @property
    def best_plain(self) -> Contender:
        """The best merge without a search, on dev and select items."""
        return max(self.plain, key=self.key)

    @property
    def recommended(self) -> Contender:
        """The winner of the search, unless the best plain merge has a higher score on the select items.

        On the dev items the two cannot be compared: the winner's score there is the highest of a whole search.
        """
        ours, theirs = (_score(c.select) for c in (self.winner, self.best_plain))
        return self.best_plain if theirs > ours else self.winner

    def score(self, contender: Contender, on: str) -> float | None:
        """A score on ``dev``, on ``select``, or on ``both`` together; None where it is not known."""
        if on == "dev" or (on == "both" and "select" not in self.scales):
            return contender.dev.score
        select = contender.select
        if select is None or select.score is None or on == "select":
            return None if select is None else select.score
        if contender.dev.score is None:
            return None
        return self._joined.score((*contender.dev.items, *select.items))

    @property
    def _joined(self) -> Scale:
        return self.scales["dev"].joined(self.scales["select"])

    def key(self, contender: Contender) -> tuple[float, float]:
        """What contenders are ranked by: the higher, the better."""
        on = "select" if self.alone and contender.select is not None else "both"
        score = self.score(contender, on)
        return -math.inf if score is None else score, _score(contender.dev)


def finals(stages: Mapping[Stage, Sequence[Rated]], config: Config, scales: Mapping[Split, Scale]) -> Finals | None:
    """The finals of a run with these results; None before a candidate of the search has a score of all dev items, or
    before every baseline has a result.
    """
    select = {r.recipe_id: r for _, r in stages["select"]} if "select" in scales else {}
    known = {c.label: (c, r) for c, r in stages["baseline"]}
    first = leaders(stages["search"], config.finalists.count)
    wanted = [*config.experts, "average", *(f"{TUNED}{mass:g}" for mass in config.baselines.masses)]
    if not first or any(label not in known for label in wanted):
        return None

    def contender(label: str, pair: Rated) -> Contender:
        return Contender(label, *pair, select.get(pair[0].recipe.id))

    tuned = max((label for label in wanted if label.startswith(TUNED)), key=lambda label: _score(known[label][1]))
    return Finals(
        tuple(contender(f"candidate {c.number}", (c, r)) for c, r in first),
        tuple(contender(label, known[label]) for label in config.experts),
        tuple(contender(label, known[label]) for label in ("average", tuned)),
        scales,
        # Scores of models as they are and as they are after a quantisation make no sum.
        config.finalists.rank == "select" or config.evaluation.rounding("dev") != config.evaluation.rounding("select"),
    )


def leaders(searched: Iterable[Rated], count: int) -> list[Rated]:
    """The candidates with the highest scores of all dev items, best first, the earliest of equals; each model once.

    Candidates that were asked for a part of the items only, or were stopped early, do not count.
    """
    whole = [(c, r) for c, r in searched if c.question.limit is None and r.complete and r.score is not None]
    whole.sort(key=lambda pair: (-_score(pair[1]), pair[0].number))
    first: dict[str, Rated] = {}
    for candidate, result in whole:
        if len(first) < count:
            first.setdefault(candidate.recipe.id, (candidate, result))
    return list(first.values())


def _score(result: Result | None) -> float:
    return -math.inf if result is None or result.score is None else result.score
