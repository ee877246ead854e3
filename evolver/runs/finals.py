"""The finals of a run: who came to them by the dev items, and who leads on select items that no search saw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from evolver.config import Config
from evolver.errors import BadInput
from evolver.evaluation.scores.feasibility import guards
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Candidate, ItemAnswer, Result, Split, Stage
from evolver.records.leaders import Rated, leaders
from evolver.records.objective import Objective, values_of
from evolver.records.recipe import Recipe
from evolver.search.front import front, spread_front

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
        objectives: those of the run; none where it has the score alone.
        apart: whether answers to dev items mean something else than those to select items (``evaluation.fitness``, or
            another quantisation), so that the select items alone can say who leads, if there are some.
    """

    searched: tuple[Contender, ...]
    experts: tuple[Contender, ...]
    plain: tuple[Contender, ...]
    scales: Mapping[Split, Scale]
    alone: bool = False
    objectives: tuple[Objective, ...] = ()
    apart: bool = False

    @property
    def everybody(self) -> tuple[Contender, ...]:
        return (*self.experts, *self.plain, *self.searched)

    @property
    def held(self) -> bool:
        """Whether all of them are scored on the select items, if there are such items."""
        return "select" not in self.scales or all(c.select is not None for c in self.everybody)

    @cached_property
    def ranked(self) -> tuple[Contender, ...]:
        """The search's candidates, best first; of equals, the one with the higher dev score comes first.

        If none keeps the constraints, those that break them less come first.
        """
        return tuple(sorted(self.searched, key=self.standing, reverse=True))

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
        """The best merge without a search, on dev and select items; one that breaks a constraint only if all do."""
        return max(self.plain, key=self.standing)

    @property
    def recommended(self) -> Contender:
        """The winner of the search, unless the best plain merge has a higher score on the select items, or breaks
        the run's constraints less.

        On the dev items the two cannot be compared: the winner's score there is the highest of a whole search.
        """
        ours, theirs = ((-c.dev.violation, _score(c.select)) for c in (self.winner, self.best_plain))
        return self.best_plain if theirs > ours else self.winner

    @property
    def front(self) -> tuple[Contender, ...]:
        """The search's candidates that no other one beats in all objectives, on dev and select items together; the best
        in the first objective comes first. None where the run has the score alone.
        """
        known = [(c, values) for c in self.searched if (values := self.values(c)) is not None]
        on = front([values for _, values in known]) if self.objectives else ()
        return tuple(c for c, _ in sorted((known[place] for place in on), key=lambda pair: pair[1], reverse=True))

    def values(self, contender: Contender) -> tuple[float, ...] | None:
        """The value of every objective on dev and select items together; None where a result is missing."""
        items = self._answers(contender)
        return None if items is None else values_of(self.objectives, self._joined.of_tasks(items))

    def score(self, contender: Contender, on: str) -> float | None:
        """A score on ``dev``, on ``select``, or on ``both`` together; None where it is not known."""
        if on == "dev" or (on == "both" and "select" not in self.scales):
            return contender.dev.score
        if on == "select":
            return None if contender.select is None else contender.select.score
        items = self._answers(contender)
        return None if items is None else self._joined.score(items)

    def _answers(self, contender: Contender) -> tuple[ItemAnswer, ...] | None:
        """The answers to the dev items and, if there are some, to the select items; None where a score is missing."""
        results = [contender.dev, contender.select][self._parts]
        known = [result.items for result in results if result is not None and result.score is not None]
        return tuple(itertools.chain(*known)) if len(known) == len(results) else None

    @cached_property
    def _joined(self) -> Scale:
        """How these answers make up a score."""
        first, *more = [self.scales[split] for split in ("dev", "select") if split in self.scales][self._parts]
        return first.joined(more[0]) if more else first

    @property
    def _parts(self) -> slice:
        """Which of the dev and the select items count together."""
        if "select" not in self.scales:
            return slice(1)
        return slice(1, 2) if self.apart else slice(2)

    def key(self, contender: Contender) -> tuple[float, float]:
        """What contenders are ranked by: the higher, the better."""
        on = "select" if self.alone and contender.select is not None else "both"
        score = self.score(contender, on)
        return -math.inf if score is None else score, _score(contender.dev)

    def standing(self, contender: Contender) -> tuple[float, float, float]:
        """The same among models that may break the run's constraints: who breaks them less comes first."""
        return -contender.dev.violation, *self.key(contender)


def finals(
    stages: Mapping[Stage, Sequence[Rated]], config: Config, scales: Mapping[Split, Scale],
    objectives: tuple[Objective, ...] = (),
) -> Finals | None:  # fmt: skip
    """The finals of a run with these results; None before a candidate of the search has a score of all dev items, or
    before every baseline has a result.
    """
    select = {r.recipe_id: r for _, r in stages["select"]} if "select" in scales else {}
    judge = judge_of(stages["baseline"], config, scales)
    known = {c.label: (c, judge(r)) for c, r in stages["baseline"]}
    first = leaders(stages["search"], config.finalists.count)
    if objectives:
        first += [pair for pair in on_front(stages["search"], objectives, config.finalists.front) if pair not in first]
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
        config.finalists.rank == "select",
        objectives,
        # Scores of models as they are and as they are after a quantisation make no sum.
        config.evaluation.fitness != "score"
        or config.evaluation.rounding("dev") != config.evaluation.rounding("select"),
    )


def judge_of(
    baselines: Iterable[Rated], config: Config, scales: Mapping[Split, Scale]
) -> Callable[[Result], Result]:  # fmt: skip
    """What adds to a result on the dev items by how much it breaks the run's constraints."""
    results = {c.label: r for c, r in baselines}
    try:
        return guards(config.constraints, scales["dev"], results, list(config.experts), config.seed).judged
    except BadInput:  # a model that they compare with has no score, so the run cannot have gone on
        return lambda result: result


def on_front(searched: Iterable[Rated], objectives: Sequence[Objective], count: int) -> list[Rated]:
    """The candidates that no other one beats in all objectives on the dev items, each model once; if there are more
    than ``count``, those that add most to the hypervolume. They are in the order of their numbers.
    """
    found = sorted(leaders(searched), key=lambda pair: pair[0].number)
    known = [(pair, values) for pair in found if (values := values_of(objectives, pair[1].tasks)) is not None]
    return [known[place][0] for place in spread_front([values for _, values in known], count)]


def _score(result: Result | None) -> float:
    return -math.inf if result is None or result.score is None else result.score
