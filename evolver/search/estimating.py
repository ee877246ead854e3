"""Any search on a part of the dev items: candidates are told apart by estimates of their scores of all items.

``evaluation.estimate`` says how many items a candidate is scored on, and how the score of all is estimated from these:
as their mean, or without bias by the difference estimator (Särndal et al. 1992; see
``evolver.evaluation.scores.difference``), which knows the baselines' answers to all items. The metric of each task is
estimated in the same way, so that a search by several objectives goes by estimates, too, as MERGE³ does (Mencattini et
al. 2025). When the search has ended, its best candidates by these estimates, and with several objectives those on the
front, are scored on the rest, so that those who come to the finals have whole scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from evolver.config.evaluation import EstimateSettings
from evolver.errors import BadInput
from evolver.records import Candidate, Result
from evolver.records.objective import values_of
from evolver.records.order import OWN
from evolver.search.base import Estimator, Ordered, Search, Setup
from evolver.search.continued import Informed
from evolver.search.ending import Reason, how_ended
from evolver.search.front import spread_front
from evolver.search.halving import asked_part


class Estimating:
    """A search whose candidates are scored on the first items of an order only, and at its end the best of them on all.

    The number of an inner candidate k is 2k here, and 2k + 1 where it is scored on all items, so a larger budget
    changes no number.

    Args:
        inner: proposes the candidates; it is told estimates.
        setup: what ``inner`` was built from.
        settings: how many items, and which estimate.
        count: the number of candidates with the best estimates that are scored on all items.
        front: with several objectives, the number of candidates that are scored on all items as well because their
            estimates are on the front; of a larger front, those that add most to its hypervolume.

    Raises BadInput where all items would be scored anyhow, and for tasks that allow no estimate of this kind.
    """

    def __init__(self, inner: Search, setup: Setup, settings: EstimateSettings, count: int, front: int = 0) -> None:
        self.inner, self.settings, self.count = inner, settings, count
        self.objectives, self.front = setup.objectives, front if setup.objectives else 0
        self.estimator: Estimator = setup.estimator
        self.estimator.check(settings.kind, "evaluation.estimate.kind")
        block = self.estimator.block
        self.limit = -(-settings.items // block) * block
        if self.limit >= self.estimator.items:
            raise BadInput(
                f"evaluation.estimate.items: {settings.items} items, rounded up to blocks of {block} "
                f"(evaluation.block_items), are all of the {self.estimator.items} dev items; write fewer, or leave "
                "estimate out."
            )
        self._seed = setup.seed
        self._rotates = setup.rotates(settings.kind)
        self._asked: dict[int, Candidate] = {}
        self._told: dict[int, Result] = {}
        self._best: list[Candidate] | None = None
        self._whole = 0

    @property
    def total(self) -> int | None:
        """At most so many: a model is scored in full once, and those on the front may be the best ones, too."""
        return None if self.inner.total is None else self.inner.total + min(self.count + self.front, self.inner.total)

    @property
    def done(self) -> bool:
        return self._best == [] and not self._whole

    @property
    def ended(self) -> Reason | None:
        """What ended the inner search; None while it goes on."""
        if not self.done:
            return None
        return how_ended(self.inner)

    def inform(self, pairs: Sequence[tuple[Candidate, Result]]) -> None:
        """See ``Informed``."""
        if isinstance(self.inner, Informed):
            self.inner.inform(pairs)

    def ask(self, n: int) -> list[Candidate]:
        if self._best is None:
            asked = [self._part(candidate) for candidate in self.inner.ask(n)]
            self._asked.update({candidate.number: candidate for candidate in asked})
            if not self.inner.done:
                return asked
            self._best = self._leading()
        found, self._best = self._best[:n], self._best[n:]
        self._whole += len(found)
        return found

    def tell(self, result: Result) -> None:
        if result.number % 2:
            self._whole -= 1
            return
        asked = self._asked[result.number].question
        told = asked_part(result, asked.limit, asked.order)
        if told.status == "ok" and not told.complete:
            asked_for = (self.settings.kind, told.items, told.order)
            score, tasks = self.estimator.estimate(*asked_for), self.estimator.estimate_tasks(*asked_for)
            told = replace(told, score=score, tasks=tasks)
        self._told[result.number] = told
        self.inner.tell(replace(told, number=result.number // 2))
        if self.inner.done and self._best is None:
            self._best = self._leading()

    def _part(self, candidate: Candidate) -> Candidate:
        """A candidate on the first items. A model with a complete result, such as a baseline, costs nothing."""
        known = self.estimator.known(candidate.recipe.id)
        order = self._order(candidate.number) if self._rotates else OWN
        limit = None if known else self.limit
        return replace(candidate, number=2 * candidate.number).asking(limit=limit, order=order, bar=None, rival=())

    def _order(self, k: int) -> str:
        """The order of the items: one for all candidates that are proposed on the same results, a generation."""
        generation = self.inner.waits_for(k) if isinstance(self.inner, Ordered) else k
        return f"{self._seed}:estimate:{generation}"

    def _leading(self) -> list[Candidate]:
        """The candidates with the best estimates and those on the front, each model once, which are now asked for on
        all items.
        """
        ranked = sorted(self._told, key=lambda number: (*(-part for part in self._told[number].standing), number))
        first: dict[str, int] = {}
        for number in ranked:
            if self._told[number].score is not None:
                first.setdefault(self._asked[number].recipe.id, number)
        part = [number for number in first.values() if not self._told[number].complete]
        best = part[: self.count]
        best += [n for n in self._on_front(sorted(first.values())) if n in part[self.count :]]
        return [replace(self._asked[number], number=number + 1).asking(limit=None) for number in best]

    def _on_front(self, numbers: Sequence[int]) -> list[int]:
        """Those of the candidates that no other one beats in all objectives, as far as their estimates say."""
        if not self.front:
            return []
        known = [(n, v) for n in numbers if (v := values_of(self.objectives, self._told[n].tasks)) is not None]
        return [known[place][0] for place in spread_front([values for _, values in known], self.front)]
