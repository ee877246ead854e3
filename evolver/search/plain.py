"""Fixed lists of candidates: the baselines before a search, and the finalists on the report set after it."""

from __future__ import annotations

from collections.abc import Sequence

from evolver.records import Candidate, Recipe, Result, Stage


class Listed:
    """A search that proposes a given list of labelled recipes, all at once, and learns nothing."""

    def __init__(self, recipes: Sequence[tuple[str, Recipe]], stage: Stage) -> None:
        self._candidates = [
            Candidate(k, recipe, proposer=stage, stage=stage, label=label) for k, (label, recipe) in enumerate(recipes)
        ]
        self._asked = 0
        self.results: dict[str, Result] = {}

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
        self.results[self._candidates[result.number].label] = result
