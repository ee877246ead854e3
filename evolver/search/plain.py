"""A search that proposes a fixed list: the baselines before the real search, and the finalists after it."""

from __future__ import annotations

from collections.abc import Sequence

from evolver.records import Candidate, Result, Split, Stage, split_of
from evolver.records.recipe import Recipe


class Listed:
    """Proposes a given list of recipes, all at once, and learns nothing from the results.

    Args:
        recipes: a label and a recipe for each candidate.
        stage: the stage that the candidates belong to.
        numbers: the numbers of the candidates; default: 0, 1, ….

    Attributes:
        stage: the stage that the candidates belong to.
        results: the results told so far, by label.
    """

    def __init__(
        self, recipes: Sequence[tuple[str, Recipe]], stage: Stage, numbers: Sequence[int] | None = None
    ) -> None:
        self._candidates = [
            Candidate(k, recipe, proposer=stage, stage=stage, label=label)
            for k, (label, recipe) in zip(numbers or range(len(recipes)), recipes, strict=True)
        ]
        self.stage: Stage = stage
        self._labels = {c.number: c.label for c in self._candidates}
        self._asked = 0
        self.results: dict[str, Result] = {}

    @property
    def split(self) -> Split:
        """The items that the candidates are scored on."""
        return split_of(self.stage)

    @property
    def total(self) -> int:
        return len(self._candidates)

    @property
    def done(self) -> bool:
        return len(self.results) == len(self._candidates)

    def ask(self, n: int) -> list[Candidate]:
        out = self._candidates[self._asked : self._asked + n]
        self._asked += len(out)
        return out

    def tell(self, result: Result) -> None:
        self.results[self._labels[result.number]] = result
