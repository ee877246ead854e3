"""Successive halving around another search: many candidates on a few items, the best of them on more.

After Jamieson & Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization"; a batch is a
bracket of Hyperband (Li et al. 2018, JMLR 18). The rungs are nested first parts of the run's item order: ``first``
items, ``eta`` times as many, and so on, at last all. No item of a candidate is scored twice.

A candidate of the search inside is told once, when its batch is through: with its score if all of its items are known,
with an estimate of it otherwise. So the search inside learns from every candidate, and all that comes to know its true
score is what may be the best. Batches follow one another; within a rung, all candidates can be scored at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from evolver.config import Section, check_section
from evolver.errors import BadInput, nearest
from evolver.records import Candidate, Result
from evolver.search.base import SEARCHES, Estimator, Search, Setup, algorithm


class HalvingSettings(Section):
    """Settings of successive halving."""

    algorithm: Literal["halving"]
    of: dict[str, Any] = Field(description="the search inside: its algorithm and settings, as {algorithm: tpe}")
    first: int = Field(30, ge=1, description="items of the first rung, up to the next evaluation.block_items")
    eta: int = Field(3, ge=2, description="1/eta of a rung's candidates go on, to eta times as many items")
    batch: int = Field(
        9, ge=2, description="candidates that are compared with one another; evolver, cmaes: a generation at most"
    )
    estimate: Literal["mean", "p-irt", "gp-irt"] = Field(
        "mean",
        description="score of all items from the first of them: their mean, or item-response estimates that use what "
        "other models answered to all items",
    )


@algorithm("halving", HalvingSettings)
class Halving:
    """Successive halving (Jamieson & Talwalkar 2016; Li et al. 2018) of the candidates of another search."""

    def __init__(self, setup: Setup, settings: HalvingSettings) -> None:
        self.settings = settings
        self.estimator: Estimator = setup.estimator
        self.limits = rungs(settings.first, settings.eta, setup.estimator)
        self.estimator.check(settings.estimate, "search.estimate")
        self.inner = _inner(setup, settings)
        self._bracket: Bracket | None = None
        self._begun = 0

    @property
    def total(self) -> int | None:
        """Unknown: how many go on depends on how many fail, and on the sizes of the batches inside."""
        return None

    @property
    def done(self) -> bool:
        return self._bracket is None and self.inner.done

    def ask(self, n: int) -> list[Candidate]:
        self._bracket = self._bracket or self._begin()
        bracket = self._bracket
        return [self._entry(bracket, place) for place in bracket.take(n)] if bracket else []

    def tell(self, result: Result) -> None:
        if self._bracket is None:
            raise ValueError(f"candidate {result.number} is told, and none is outstanding")
        self._bracket.tell(result.number % self.settings.batch, result)
        if self._bracket.done:
            self._end(self._bracket)

    def _begin(self) -> Bracket | None:
        candidates = self.inner.ask(self.settings.batch)
        self._begun += bool(candidates)
        return Bracket(candidates, self.limits, self.settings.eta, self._worth) if candidates else None

    def _end(self, bracket: Bracket) -> None:
        """Tell the search inside about a whole batch. Every estimate of it rests on what was known before it."""
        for place, candidate in enumerate(bracket.candidates):
            self.inner.tell(self._told(candidate, bracket.results[place], bracket.costs[place]))
        for result in bracket.results.values():
            self.estimator.learn(result)
        self._bracket = None

    def _entry(self, bracket: Bracket, place: int) -> Candidate:
        """A candidate on a rung. Its number says batch, rung and place, so that a raised budget changes none."""
        candidate = bracket.candidates[place]
        number = ((self._begun - 1) * len(self.limits) + bracket.rung) * self.settings.batch + place
        known = self.estimator.known(candidate.recipe.id)  # as of a baseline: it costs nothing and may win the run
        return replace(candidate, number=number, limit=None if known else self.limits[bracket.rung])

    def _told(self, candidate: Candidate, last: Result, cost: int) -> Result:
        """The result of a candidate of the search inside: its score or an estimate, and what all rungs have cost."""
        found = self.estimator.known(candidate.recipe.id) or last
        estimated = found.status == "ok" and not found.complete
        score = self._worth(found.items) if estimated else found.score
        return replace(found, number=candidate.number, score=score, reused=False, given=len(found.items) - cost)

    def _worth(self, items: Sequence[float]) -> float:
        return self.estimator.estimate(self.settings.estimate, items)


class Bracket:
    """Candidates that were proposed together, on their way up the rungs.

    Args:
        candidates: of the search inside; each is known by its place among them.
        limits: how many items each rung scores; None: all.
        eta: 1/eta of a rung's candidates go on.
        worth: estimates the score of all items from the first of them.

    Attributes:
        results: of every place, the result of the last rung that it was on.
        costs: items that were scored for every place, over all rungs.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        limits: Sequence[int | None],
        eta: int,
        worth: Callable[[Sequence[float]], float],
    ) -> None:
        self.candidates, self.limits, self.eta, self.worth = candidates, limits, eta, worth
        self.results: dict[int, Result] = {}
        self.costs = [0] * len(candidates)
        self._waiting: list[int] = []
        self._flying = 0
        self._enter(0, range(len(candidates)))

    @property
    def done(self) -> bool:
        """Nothing is outstanding, and nothing is left to be asked for."""
        return not self._waiting and not self._flying

    def take(self, n: int) -> list[int]:
        """At most n places of the present rung that are to be scored now."""
        out, self._waiting = self._waiting[:n], self._waiting[n:]
        self._flying += len(out)
        return out

    def tell(self, place: int, result: Result) -> None:
        """Take in a result; after a rung's last one, the best of it are on the next rung."""
        self._flying -= 1
        self.costs[place] += result.cost
        self.results[place] = _part(result, self.limits[self.rung])
        if self.done:
            self._halve()

    def _enter(self, rung: int, alive: Sequence[int]) -> None:
        # One that is alone has nobody to be compared with: all its items at once.
        self.rung = rung if len(alive) > 1 else len(self.limits) - 1
        self._alive, self._waiting = alive, list(alive)

    def _halve(self) -> None:
        """Send the best on."""
        fine = [p for p in self._alive if self.results[p].status == "ok"]
        if not fine or self.rung == len(self.limits) - 1:
            return
        ranked = sorted(fine, key=lambda p: (-self.worth(self.results[p].items), p))
        self._enter(self.rung + 1, sorted(ranked[: max(1, len(self._alive) // self.eta)]))


def rungs(first: int, eta: int, estimator: Estimator) -> tuple[int | None, ...]:
    """How many items every rung scores: ``first``, ``eta`` times as many, …; the last one all of them, as None.

    Raises BadInput where the first rung would be the last.
    """
    block, count = estimator.block, estimator.items
    size, limits = -(-first // block) * block, list[int | None]()
    while size < count:
        limits.append(size)
        size *= eta
    if not limits:
        raise BadInput(
            f"search.first: {first} items, in blocks of {block} (evaluation.block_items), are no part of {count} dev "
            "items; make either smaller."
        )
    return (*limits, None)


def _part(result: Result, limit: int | None) -> Result:
    """What a rung is to know of a result: more may be known from an earlier call of the run, of another budget."""
    if limit is None or result.status == "failed":
        return result
    return replace(result, items=result.items[:limit], score=None, complete=False)


def _inner(setup: Setup, settings: HalvingSettings) -> Search:
    """The search inside. It proposes in batches and stops nothing early, as every rung is to be scored."""
    name = settings.of.get("algorithm")
    known = [n for n in SEARCHES if n != settings.algorithm]
    if name not in known:
        raise BadInput(f"search.of.algorithm: {name!r} is no search that can be halved; {nearest(str(name), known)}")
    found = SEARCHES[name]
    typed = check_section(found.settings, settings.of, "search.of")
    try:
        inside = replace(setup, early_stopping=False, racing=False, together=settings.batch, arrival=False)
        return found.build(inside, typed)
    except BadInput as error:  # which speaks of settings as if they stood outside
        raise BadInput(str(error).replace("search.", "search.of.", 1)) from error
