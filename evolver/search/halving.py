"""Successive halving around another search: it scores many candidates on a few items and only the best of them on more.

Papers: Jamieson & Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization"; a batch of
candidates is a bracket of Hyperband (Li et al. 2018, JMLR 18). The first rung scores the first ``first`` items of the
items in their order, each further rung ``eta`` times as many, and the last one all items. No item of a candidate is
scored twice. The order is the run's own, or a new one for each batch (``evaluation.subset``). A new one keeps the
estimates of a batch free of what the search has learnt from the first items of earlier batches.

The inner search (``search.of``) is told the result of each candidate once, when its batch has passed all rungs. The
result holds the score if all items of the candidate were scored, else an estimate of it. So the inner search learns
from every candidate, while the items are spent on candidates that may be the best. One batch follows the other; within
a rung, all candidates can be scored at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from evolver.config.reading import check_section
from evolver.config.section import Section
from evolver.errors import BadInput, nearest
from evolver.records import Candidate, Result
from evolver.records.order import OWN, reordered
from evolver.search.base import SEARCHES, Estimator, Search, Setup, algorithm, inside
from evolver.search.ending import Reason, how_ended


class HalvingSettings(Section):
    """Settings of successive halving."""

    algorithm: Literal["halving"] = Field(description="name of this search")
    of: dict[str, Any] = Field(
        description="the inner search, which proposes the candidates: its algorithm and settings, such as "
        "{algorithm: tpe}"
    )
    first: int = Field(
        30, ge=1, le=10**9, description="items of the first rung, rounded up to a multiple of evaluation.block_items"
    )
    eta: int = Field(
        3,
        ge=2,
        le=100_000,
        description="the best 1/eta of a rung's candidates go on to the next rung, with eta times as many items",
    )
    batch: int = Field(
        9,
        ge=2,
        le=100_000,
        description="candidates that are compared with one another; evolver and cmaes propose at most a generation at "
        "a time",
    )
    estimate: Literal["mean", "difference", "p-irt", "gp-irt", "mp-irt"] = Field(
        "mean",
        description="how the score of all items is estimated from the first of them. mean: their mean. difference: "
        "without bias, from the answers of other models to all items, corrected by the first answers. p-irt, gp-irt: "
        "item-response estimates from the same answers, which have a bias. mp-irt: p-irt with a merge's ability "
        "predicted from those of the experts",
    )


@algorithm("halving", HalvingSettings, inside="of", partial=True)
class Halving:
    """Successive halving (Jamieson & Talwalkar 2016; Li et al. 2018) of the candidates of another search.

    Unlike the other searches it proposes nothing itself: it decides how many items each candidate is scored on. It
    assumes that a candidate's rank on the first items tells its rank on all items.
    """

    def __init__(self, setup: Setup, settings: HalvingSettings) -> None:
        self.settings = settings
        self.estimator: Estimator = setup.estimator
        self.limits = rungs(settings.first, settings.eta, setup.estimator)
        self.estimator.check(settings.estimate, "search.estimate")
        self.inner = _inner(setup, settings)
        self._seed = setup.seed
        self._rotates = setup.rotates(settings.estimate)
        self._bracket: Bracket | None = None
        self._begun = 0

    @property
    def total(self) -> int | None:
        """Always None: the number depends on how many candidates fail and on the batches of the inner search."""
        return None

    @property
    def done(self) -> bool:
        return self._bracket is None and self.inner.done

    @property
    def ended(self) -> Reason | None:
        """What ended the inner search; None while it goes on."""
        if not self.done:
            return None
        return how_ended(self.inner)

    def ask(self, n: int) -> list[Candidate]:
        self._bracket = self._bracket or self._begin()
        bracket = self._bracket
        return [self._entry(bracket, place) for place in bracket.take(n)] if bracket else []

    def tell(self, result: Result) -> None:
        if self._bracket is None:
            raise ValueError(
                f"the result of candidate {result.number} has arrived, but the search does not wait for a result"
            )
        self._bracket.tell(result.number % self.settings.batch, result)
        if self._bracket.done:
            self._end(self._bracket)

    def _begin(self) -> Bracket | None:
        candidates = self.inner.ask(self.settings.batch)
        self._begun += bool(candidates)
        order = f"{self._seed}:batch:{self._begun}" if self._rotates else OWN
        return Bracket(candidates, self.limits, self.settings.eta, self._worth, order) if candidates else None

    def _end(self, bracket: Bracket) -> None:
        """Tell the inner search the results of a whole batch. Their estimates use only results from before the
        batch.
        """
        for place, candidate in enumerate(bracket.candidates):
            self.inner.tell(self._told(candidate, bracket.results[place], bracket.costs[place]))
        for result in bracket.results.values():
            self.estimator.learn(result)
        self._bracket = None

    def _entry(self, bracket: Bracket, place: int) -> Candidate:
        """A candidate on a rung. Its number follows from batch, rung and place, so a larger budget changes no
        number.
        """
        candidate = bracket.candidates[place]
        number = ((self._begun - 1) * len(self.limits) + bracket.rung) * self.settings.batch + place
        # A recipe with a complete result, such as a baseline, is asked for without a limit: it costs nothing and may
        # win.
        known = self.estimator.known(candidate.recipe.id)
        limit = None if known else self.limits[bracket.rung]
        return replace(candidate, number=number).asking(limit=limit, order=bracket.order)

    def _told(self, candidate: Candidate, last: Result, cost: int) -> Result:
        """What the inner search is told of a candidate: its score and the metrics of the tasks, or estimates of them,
        and the items scored on all rungs.
        """
        found = self.estimator.known(candidate.recipe.id) or last
        if found.status == "ok" and not found.complete:
            tasks = self.estimator.estimate_tasks(self.settings.estimate, found.items, found.order)
            found = replace(found, score=self._worth(found), tasks=tasks)
        return replace(found, number=candidate.number, reused=False, given=len(found.items) - cost)

    def _worth(self, result: Result) -> float:
        return self.estimator.estimate(self.settings.estimate, result.items, result.order)


class Bracket:
    """A batch of candidates on its way up the rungs.

    Args:
        candidates: candidates of the inner search; their places in this list identify them.
        limits: the number of items that each rung scores; None means all.
        eta: the best 1/eta of a rung's candidates go on.
        worth: estimates the score of all items from a result that holds the first of them.
        order: the name of the order in which the items are scored.

    Attributes:
        results: for each place, the result of the last rung that it was on.
        costs: for each place, the number of items that were scored on all rungs.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        limits: Sequence[int | None],
        eta: int,
        worth: Callable[[Result], float],
        order: str = OWN,
    ) -> None:
        self.candidates, self.limits, self.eta, self.worth, self.order = candidates, limits, eta, worth, order
        self.results: dict[int, Result] = {}
        self.costs = [0] * len(candidates)
        self._waiting: list[int] = []
        self._flying = 0
        self._enter(0, range(len(candidates)))

    @property
    def done(self) -> bool:
        """Whether no result is outstanding and no candidate is left to be scored."""
        return not self._waiting and not self._flying

    def take(self, n: int) -> list[int]:
        """Take at most n places of the present rung, to be scored now."""
        out, self._waiting = self._waiting[:n], self._waiting[n:]
        self._flying += len(out)
        return out

    def tell(self, place: int, result: Result) -> None:
        """Take in a result. After the last result of a rung, its best candidates enter the next rung."""
        self._flying -= 1
        self.costs[place] += result.cost
        self.results[place] = asked_part(result, self.limits[self.rung], self.order)
        if self.done:
            self._halve()

    def _enter(self, rung: int, alive: Sequence[int]) -> None:
        # A single candidate has no other to be compared with, so all its items are scored at once.
        self.rung = rung if len(alive) > 1 else len(self.limits) - 1
        self._alive, self._waiting = alive, list(alive)

    def _halve(self) -> None:
        """Send the best candidates to the next rung."""
        fine = [p for p in self._alive if self.results[p].status == "ok"]
        if not fine or self.rung == len(self.limits) - 1:
            return
        ranked = sorted(fine, key=lambda p: (-self.worth(self.results[p]), p))
        self._enter(self.rung + 1, sorted(ranked[: max(1, len(self._alive) // self.eta)]))


def rungs(first: int, eta: int, estimator: Estimator) -> tuple[int | None, ...]:
    """The number of items that each rung scores: ``first``, ``eta`` times as many, and so on; None (all) for the last.

    Raises BadInput if the first rung would already score all items.
    """
    block, count = estimator.block, estimator.items
    size, limits = -(-first // block) * block, list[int | None]()
    while size < count:
        limits.append(size)
        size *= eta
    if not limits:
        raise BadInput(
            f"search.first: {first} items, rounded up to blocks of {block} (evaluation.block_items), are all of the "
            f"{count} dev items; write a smaller first or block_items, or use more dev items."
        )
    return (*limits, None)


def asked_part(result: Result, limit: int | None, order: str) -> Result:
    """The part of a result that a candidate with this limit was asked for. The ledger may hold more items, from an
    earlier call with another budget; where it holds all, they are in the run's own order.
    """
    if limit is None or result.status == "failed":
        return result
    items = reordered(result.items, order) if result.complete else result.items
    return replace(result, items=items[:limit], score=None, complete=False, order=order)


def _inner(setup: Setup, settings: HalvingSettings) -> Search:
    """Build the inner search. It proposes in batches, without early stopping, as every rung is scored to its end."""
    name = settings.of.get("algorithm")
    known = [n for n, found in SEARCHES.items() if not found.partial]
    if name not in known:
        raise BadInput(f"search.of.algorithm: {name!r} cannot be the inner search of halving; {nearest(name, known)}")
    found = SEARCHES[name]
    typed = check_section(found.settings, settings.of, "search.of")
    with inside("search.of"):
        inner = replace(setup, early_stopping=False, racing=False, together=settings.batch, arrival=False)
        return found.build(inner, typed)
