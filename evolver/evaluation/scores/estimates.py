"""Estimates the score of all dev items from the answers to the first ones, for searches that score only a part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from evolver.errors import BadInput
from evolver.evaluation.scores.irt import EstimateKind, ItemModel, fit_items
from evolver.evaluation.scores.scoring import Scale
from evolver.records import ItemAnswer, Result

# An item model is fitted iteratively, so later digits of an estimate may differ between processors. They are cut off.
DIGITS = 6


class Estimates:
    """Estimates, based on the models that have answered all dev items so far.

    Args:
        scale: how the dev items make up the score.
        block: how many items are scored at a time.
    """

    def __init__(self, scale: Scale, block: int) -> None:
        self.scale, self.block = scale, block
        self._complete: dict[str, Result] = {}
        self._model: ItemModel | None = None

    @property
    def items(self) -> int:
        """The number of dev items."""
        return len(self.scale.tasks)

    def check(self, kind: str, key: str) -> None:
        """Check that the tasks allow estimates of this kind.

        Raises BadInput, naming ``key``, where they do not.
        """
        task = first_unjudged(self.scale)
        if kind != "mean" and task is not None:
            raise BadInput(
                f"{key}: {kind} needs items with scores of their own from 0 to 1, and {task} has none; write mean."
            )

    def learn(self, result: Result) -> None:
        """Add a model that has answered all items. Other results are ignored."""
        if result.complete and result.recipe_id not in self._complete:
            self._complete[result.recipe_id] = result
            self._model = None

    def known(self, recipe_id: str) -> Result | None:
        """The complete result of a recipe, if ``learn`` was given one; else None."""
        return self._complete.get(recipe_id)

    def estimate(self, kind: str, items: Sequence[ItemAnswer]) -> float:
        """Estimate the score of all items from the answers to the first ones.

        Args:
            kind: ``mean`` is the score over the items that were answered, and over their tasks only. For ``p-irt`` and
                ``gp-irt`` see ``evolver.evaluation.scores.irt``; as long as no model has answered all items, they give
                the mean.
            items: the answers to the first items.
        """
        if kind == "mean" or not self._complete:
            return self._mean(items)
        if self._model is None:
            # Sorted by id, as the order in which results arrived would otherwise change the rounding of sums.
            self._model = fit_items(
                [cast(Sequence[float], self._complete[i].items) for i in sorted(self._complete)], self.items
            )
        return round(self._model.estimate(cast(Sequence[float], items), self.scale, cast(EstimateKind, kind)), DIGITS)

    def _mean(self, items: Sequence[ItemAnswer]) -> float:
        found = self.scale.of_tasks(items)
        total = math.fsum(self.scale.weights[task] for task in found)
        return math.fsum(self.scale.weights[task] * value for task, value in found.items()) / total


def first_unjudged(scale: Scale) -> str | None:
    """The first task whose items are not judged one by one with values from 0 to 1; None if there is none."""
    return next((t for t, m in scale.metrics.items() if not m.judged or m.best != 1.0), None)
