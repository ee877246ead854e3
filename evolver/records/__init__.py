"""The records that are stored and sent between processes: candidates and results.

This package is on the ground floor and knows no tensors, searches or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from evolver.records.loss import UnlabelledLoss
from evolver.records.order import OWN, item_order
from evolver.records.recipe import Recipe

Stage = Literal["baseline", "search", "select", "report"]
Split = Literal["dev", "select", "report"]
STAGES: tuple[Stage, ...] = ("baseline", "search", "select", "report")
SPLITS: tuple[Split, ...] = ("dev", "select", "report")
# What a model answered to an item, as a number. For a metric that is computed from counts over all items, such as BLEU,
# it is a tuple: the item's own score, which people read, and after it the item's counts.
ItemAnswer = float | tuple[float, ...]
# How a result compares with others; see ``Result.standing``.
Standing = tuple[float, float]
UNKNOWN: Standing = (-math.inf, -math.inf)


def split_of(stage: Stage) -> Split:
    """The items that candidates of a stage are scored on: those of its name, or dev items."""
    return stage if stage == "select" or stage == "report" else "dev"


def own_score(answer: ItemAnswer) -> float:
    """An item's answer as one number."""
    return answer[0] if isinstance(answer, tuple) else answer


def as_answers(values: Iterable[Any]) -> tuple[Any, ...]:
    """Answers that were lists in a file or in a message, as tuples again."""
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


@dataclass(frozen=True)
class Knob:
    """One dimension of a search space: a number between ``low`` and ``high``, on a log scale where ``log`` is set."""

    name: str
    low: float
    high: float
    log: bool = False

    def at(self, share: float) -> float:
        """The number that lies this share of the way from ``low`` (0) to ``high`` (1)."""
        if self.log:
            found = self.low * math.pow(self.high / self.low, share)
        else:
            found = self.low + share * (self.high - self.low)
        return min(max(found, self.low), self.high)


@dataclass(frozen=True)
class Choice:
    """One dimension of a search space: one of several values without an order."""

    name: str
    options: tuple[bool | str, ...]


@dataclass(frozen=True)
class Question:
    """What is to be found out of a candidate's score; by default, its score on all items.

    Attributes:
        bar: the score that it has to exceed; the evaluation may stop as soon as it no longer can. None: no bar.
        limit: the number of items to score; None: all.
        rival: the item scores of the model whose score is the bar, for a race against it.
        known: scores of the first items that are known already; only the items after them are scored.
        piece: score only the items from the first number to before the second.
        order: the name of the order in which its items are scored (see ``evolver.records.order``). The known items and
            the piece are in this order, the rival's in the run's own.
        words: whether the result is to hold the answers in words, for a search that compares what models say. Items
            whose scores are known are then scored again.
        loss: what the result is to hold the gradient of, for a search that descends; ``limit`` says on how many items.
            None: no gradient is asked for.
    """

    bar: float | None = None
    limit: int | None = None
    rival: tuple[ItemAnswer, ...] = ()
    known: tuple[ItemAnswer, ...] = ()
    piece: tuple[int, int] | None = None
    order: str = OWN
    words: bool = False
    loss: UnlabelledLoss | None = None


@dataclass(frozen=True)
class Candidate:
    """A recipe that was proposed for evaluation, and what is asked about it.

    Attributes:
        number: the number of the proposal within its stage, from 0.
        recipe: the model.
        proposer: what proposed it, such as the name of the search.
        parents: ids of the recipes that it was made from.
        question: what is asked about its score.
        stage: baseline, search, select or report.
        label: name of a baseline or finalist.
    """

    number: int
    recipe: Recipe
    proposer: str
    parents: tuple[str, ...] = ()
    question: Question = Question()
    stage: Stage = "search"
    label: str = ""

    @property
    def split(self) -> Split:
        """The items that it is scored on."""
        return split_of(self.stage)

    def asking(self, **changes: Any) -> Candidate:
        """The same candidate with these attributes of its question changed."""
        return replace(self, question=replace(self.question, **changes))


@dataclass(frozen=True)
class Result:
    """The result of a candidate's evaluation. Higher scores are better.

    Attributes:
        number, recipe_id, stage: say which candidate it belongs to.
        status: ok or failed.
        score: the score of all items; None where the evaluation failed or stopped early.
        bound: the highest score that was still possible when the evaluation ended.
        complete: whether all items were scored.
        items: the answers to the first items in the order of the name ``order``; if complete, in the run's own order.
        tasks: the metric of each task over these items.
        seconds: the time of each step of the work.
        counts: tokens, and numbers of truncated and invalid answers, of the items that were scored for this result.
        reason: why the evaluation failed.
        worker: name of the worker.
        reused: whether the result was copied from an earlier candidate with the same recipe, at no cost.
        raced: whether a race stopped the evaluation: the score is not above the bar, at the run's error rate.
        transient: whether the failure is not the candidate's own, so that another try may succeed.
        given: the number of first items that were known before.
        rank: the number of results of the same stage that the ledger held before this one.
        order: the name of the order in which the items were scored.
        said: the answers to the new items in words, shortened, if they are report items or the candidate asks for
            them, each an empty text where the kind of evaluation has no words; otherwise empty.
        probabilities: how probable the model finds the right answer to each new item, NaN where that is not known, in
            the order in which they were scored; empty where it is known of none.
        violations: by how much it breaks each of the run's constraints, by the number of the constraint; what is not
            above 0 is kept. What was not found out, because the evaluation stopped before its end, is left out.
        loss: the loss on the items, if its gradient was asked for. Such a result has no score, whatever its items.
        gradient: its derivatives by the coefficients of the recipe's merge, one for each expert, rule by rule.
    """

    number: int
    recipe_id: str
    status: Literal["ok", "failed"]
    score: float | None = None
    bound: float | None = None
    complete: bool = False
    items: tuple[ItemAnswer, ...] = ()
    tasks: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    worker: str = ""
    reused: bool = False
    raced: bool = False
    transient: bool = False
    given: int = 0
    said: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    violations: Mapping[str, float] = field(default_factory=dict)
    loss: float | None = None
    gradient: tuple[float, ...] = ()
    stage: Stage = "search"
    order: str = OWN
    rank: int | None = field(default=None, compare=False)

    @staticmethod
    def failed(candidate: Candidate, reason: str, **more: Any) -> Result:
        """A failed result with its reason; ``more`` sets further attributes."""
        return Result(candidate.number, candidate.recipe.id, "failed", reason=reason, stage=candidate.stage, **more)

    @property
    def cost(self) -> int:
        """The number of items that were scored for this result."""
        return 0 if self.reused else len(self.items) - self.given

    def probability_of(self, count: int) -> dict[int, float]:
        """The probabilities by the places of their items, of which the split has ``count``, in the run's own order."""
        places = item_order(self.order, count)[self.given :] if self.probabilities else ()
        return dict(zip(places, self.probabilities, strict=False))

    def answers(self, candidate: Candidate) -> bool:
        """Whether this result is enough for a candidate with the same recipe, so that nothing has to be scored.

        It is if it failed by its own fault or is complete, if its bound is not above the candidate's bar, or if it has
        as many items as the candidate asks for; and if it has the words or the gradient that the candidate asks for.
        """
        asked = candidate.question
        if self.status == "failed":
            return not self.transient
        if (asked.words and not self.said) or (asked.loss is not None and not self.gradient):
            return False
        if self.complete:
            return True
        if asked.bar is not None and self.bound is not None and self.bound <= asked.bar:
            return True
        return asked.limit is not None and len(self.items) >= asked.limit and self.order == asked.order

    @property
    def violation(self) -> float:
        """By how much it breaks the run's constraints together; 0.0 if it keeps all of them."""
        return math.fsum(v for v in self.violations.values() if v > 0)

    @property
    def feasible(self) -> bool:
        """Whether it breaks none of the run's constraints, as far as that is known."""
        return self.violation == 0

    @property
    def standing(self) -> Standing:
        """What results are compared by (Deb 2000): the greater, the better.

        A result that keeps the constraints is better than one that does not; of two that do, the one with the higher
        score; of two that do not, the one that breaks them less. What has no score of all items comes last.
        """
        if self.score is None:
            return UNKNOWN
        return (0.0, self.score) if self.feasible else (-self.violation, 0.0)

    def objectives(self, tasks: Sequence[str]) -> tuple[float, ...] | None:
        """What a search of several objectives is told: the scores of these tasks; None where one is missing."""
        if self.score is None or not all(task in self.tasks for task in tasks):
            return None
        return tuple(self.tasks[task] for task in tasks)
