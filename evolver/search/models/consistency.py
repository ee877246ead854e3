"""AdaMMS: a line search that reads no label. It chooses the model that answers most like its neighbours on the line.

The models are (1 - α)·target + α·source with α = 0, ``step``, 2·``step``, …. Each of them answers the same few items.
The inconsistency of a model is the number of items on which its answer, in small letters, differs from the answer of a
neighbour α ± step, counted for both neighbours. Of the models with two neighbours, the one with the smallest
inconsistency is then scored on all dev items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from evolver.config.section import Section
from evolver.errors import BadInput, nearest
from evolver.records import Candidate, Result
from evolver.records.recipe import Expert, Merge, Rule
from evolver.search.base import Ordered, Setup, algorithm


class ConsistencySettings(Section):
    """Settings of AdaMMS. The defaults are the paper's."""

    algorithm: Literal["consistency"] = Field(description="name of this search")
    target: str | None = Field(None, description="expert at α = 0; default: the first one")
    source: str | None = Field(None, description="expert that is added to it; default: the second one")
    step: float = Field(0.1, gt=0, le=0.5, description="distance of two neighbours on the line")
    most: float = Field(0.6, gt=0, le=1, description="largest α that may be chosen; its neighbour beyond answers, too")
    items: int = Field(
        100,
        ge=1,
        le=10**9,
        description="dev items that every model answers, rounded up to a multiple of evaluation.block_items. Their "
        "labels are not looked at",
    )


@algorithm("consistency", ConsistencySettings, partial=True)
class Consistency(Ordered):
    """A line between two experts, searched without labels (AdaMMS, Du et al. 2025, CVPR, arXiv 2503.23733).

    Unlike all other searches it does not look at scores, but at which answers change from one model to the next. It
    assumes that the answers change least where the merge is best. It draws nothing at random and ends with one model,
    which is scored on all dev items, so that the run can report it. Where a kind of evaluation puts no answers into
    words, such as a function of your own, the numbers that it gives are compared. A candidate that failed agrees with
    nobody. Constraints are judged on all dev items, so they cannot move the choice: the run judges the one model that
    was chosen, and says so if it breaks one. It cannot stand inside of another search, which would need scores.

    Raises BadInput for models that are no experts, and where more than two experts are given and none is named.
    """

    def __init__(self, setup: Setup, settings: ConsistencySettings) -> None:
        self.pair = _pair(setup.experts, settings)
        steps = math.floor(settings.most / settings.step + 1e-9)
        self.shares = tuple(round(settings.step * k, 9) for k in range(steps + 2))
        super().__init__(setup, limit=len(self.shares) + 1)
        block = setup.estimator.block
        limit = -(-settings.items // block) * block
        self.items = limit if limit < setup.estimator.items else None
        self.answers: list[tuple[object, ...]] = [()] * len(self.shares)

    @property
    def remarks(self) -> tuple[str, ...]:
        """A sentence on a budget that ends before the choice."""
        most, wanted = self.setup.budget.candidates, len(self.shares) + 1
        if most is None or most >= wanted:
            return ()
        said = (
            f"search: {wanted} candidates are needed, of which the last one is the choice, and the budget ends after "
            f"{most}; raise budget.candidates to {wanted}, or write a larger search.step"
        )
        return (said,)

    def waits_for(self, k: int) -> int:
        return 0 if k < len(self.shares) else len(self.shares)

    def propose(self, k: int) -> Candidate:
        parents = tuple(expert.id for expert in self.pair)
        if k < len(self.shares):
            found = Candidate(k, self._at(self.shares[k]), "consistency/line", parents)
            return found.asking(limit=self.items, words=True)
        return Candidate(k, self._at(self.shares[self.chosen]), "consistency", parents)

    def learn(self, candidate: Candidate, result: Result) -> None:
        if candidate.number < len(self.shares):
            words = any(result.said) and len(result.said) == len(result.items)
            self.answers[candidate.number] = tuple(map(_plain, result.said)) if words else result.items

    @property
    def chosen(self) -> int:
        """The place of the most consistent model; of equals the one nearest to the target."""
        within = range(1, len(self.shares) - 1)
        return min(within, key=lambda k: sum(differing(self.answers[k], self.answers[j]) for j in (k - 1, k + 1)))

    def _at(self, share: float) -> Merge | Expert:
        if share in (0.0, 1.0):
            return self.pair[int(share)]
        values = {"weight": (round(1.0 - share, 9), share), "normalize": False}
        return Merge("linear", self.pair, self.setup.base, (Rule.of(values),))


def differing(one: Sequence[object], other: Sequence[object]) -> float:
    """On how many items two models differ; infinitely many where one of them has not answered all of them."""
    if not one or len(one) != len(other):
        return math.inf
    return float(sum(a != b for a, b in zip(one, other, strict=True)))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _pair(experts: Sequence[Expert], settings: ConsistencySettings) -> tuple[Expert, Expert]:
    names = {expert.name: expert for expert in experts}
    for key in ("target", "source"):
        if (name := getattr(settings, key)) is not None and name not in names:
            raise BadInput(f"search.{key}: there is no expert {name!r}; {nearest(name, names)}")
    if len(experts) > 2 and None in (settings.target, settings.source):
        raise BadInput(
            f"search.target: a line has two ends, and there are {len(experts)} experts; name two of them as target and "
            "source."
        )
    pair = (names.get(settings.target or "", experts[0]), names.get(settings.source or "", experts[1]))
    if pair[0] == pair[1]:
        raise BadInput(f"search.source: {pair[1].name} is the target, too; name another expert.")
    return pair
