"""From per-item scores to one number, and what that number could still become.

Sums are correctly rounded (``math.fsum``), so every step below is monotone in every item: the bound of a partial
evaluation is never below the score that the full one would give, and stopping by it decides exactly as scoring all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """How items make up the score: Σ weight · mean of the task's items, divided by Σ weight.

    Args:
        tasks: the task of every item, in the run's order.
        weights: weight of every task.
        best: the highest score that an item can get, or None where nobody can say.
    """

    tasks: tuple[str, ...]
    weights: Mapping[str, float]
    best: float | None

    def means(self, items: Sequence[float]) -> dict[str, float]:
        """Mean of every task over the scored items; tasks without any are left out."""
        grouped: dict[str, list[float]] = {}
        for task, value in zip(self.tasks, items, strict=False):
            grouped.setdefault(task, []).append(value)
        return {task: math.fsum(values) / len(values) for task, values in sorted(grouped.items())}

    def score(self, items: Sequence[float]) -> float:
        """The score of all items.

        Raises ValueError where items are missing.
        """
        if len(items) != len(self.tasks):
            raise ValueError(f"{len(items)} of {len(self.tasks)} items")
        means = self.means(items)
        return math.fsum(self.weights[t] * m for t, m in means.items()) / math.fsum(self.weights.values())

    def bound(self, items: Sequence[float]) -> float:
        """The score if all items that are not scored yet were as good as an item can be."""
        if self.best is None:
            return math.inf
        return self.score([*items, *[self.best] * (len(self.tasks) - len(items))])
