"""Estimates of the score of all items from the first of them, as the searches see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from evolver.errors import BadInput
from evolver.evaluation.scores.irt import EstimateKind, ItemModel, fit_items
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Result

# An item model is fitted by iteration; what lies beyond these digits may differ from processor to processor.
DIGITS = 6


class Estimates:
    """What was answered to all dev items so far, and what it says of models that answered a part of them.

    Args:
        scale: how the dev items make up the score.
        block: items are scored so many at a time.
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
        """Raises BadInput where the tasks allow no estimates of this kind, naming ``key``."""
        task = first_unjudged(self.scale)
        if kind != "mean" and task is not None:
            raise BadInput(
                f"{key}: {kind} needs items that are judged one by one, from 0 to 1, not those of {task}; write mean."
            )

    def learn(self, result: Result) -> None:
        """Take in what a model answered to all items; other results teach nothing."""
        if result.complete and result.recipe_id not in self._complete:
            self._complete[result.recipe_id] = result
            self._model = None

    def known(self, recipe_id: str) -> Result | None:
        """What was learnt of a recipe."""
        return self._complete.get(recipe_id)

    def estimate(self, kind: str, items: Sequence[float]) -> float:
        """The score of all items, estimated from the answers to the first of them.

        ``mean`` is the score over these items and the tasks that they are of; it also stands in for the other kinds
        where no model is known that answered all items. See ``evaluation.irt`` for ``p-irt`` and ``gp-irt``.
        """
        if kind == "mean" or not self._complete:
            return self._mean(items)
        if self._model is None:
            # In an order of their own, so that the order in which results came cannot show in a sum.
            self._model = fit_items([self._complete[i].items for i in sorted(self._complete)], self.items)
        return round(self._model.estimate(items, self.scale, cast(EstimateKind, kind)), DIGITS)

    def _mean(self, items: Sequence[float]) -> float:
        found = self.scale.of_tasks(items)
        total = math.fsum(self.scale.weights[task] for task in found)
        return math.fsum(self.scale.weights[task] * value for task, value in found.items()) / total


def first_unjudged(scale: Scale) -> str | None:
    """A task whose items are not judged one by one, from 0 to 1; None where all are."""
    return next((t for t, m in scale.metrics.items() if not m.judged or m.best != 1.0), None)
