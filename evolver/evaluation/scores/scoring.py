"""From the answers of items to one number, and what that number could still become.

Sums of judged items are correctly rounded (``math.fsum``), so every step below is monotone in every item: the bound of
a partial evaluation is never below the score that the full one would give, and stopping by it decides exactly as
scoring all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from evolver.evaluation.scores.metrics import Metric


@dataclass(frozen=True)
class Scale:
    """How items make up the score: Σ weight · metric of the task's items, divided by Σ weight.

    Args:
        tasks: the task of every item, in the run's order.
        weights: weight of every task.
        metrics: metric of every task.
        right: the right answer of every item; empty where all tasks are judged item by item.
    """

    tasks: tuple[str, ...]
    weights: Mapping[str, float]
    metrics: Mapping[str, Metric]
    right: tuple[float, ...] = ()

    @cached_property
    def places(self) -> dict[str, list[int]]:
        """Where the items of every task stand."""
        found: dict[str, list[int]] = {}
        for place, task in enumerate(self.tasks):
            found.setdefault(task, []).append(place)
        return dict(sorted(found.items()))

    @property
    def shares(self) -> bool:
        """Whether every task's metric reads well as a percentage."""
        return all(m.share for m in self.metrics.values())

    def form(self) -> dict[str, Any]:
        """As JSON has it."""
        metrics = {task: metric.form() for task, metric in self.metrics.items()}
        return {"tasks": self.tasks, "weights": dict(self.weights), "metrics": metrics, "right": self.right}

    @staticmethod
    def from_form(form: Mapping[str, Any]) -> Scale:
        """The inverse of ``form``."""
        metrics = {task: Metric.from_form(metric) for task, metric in form["metrics"].items()}
        return Scale(tuple(form["tasks"]), form["weights"], metrics, tuple(form["right"]))

    def of_tasks(self, items: Sequence[float]) -> dict[str, float]:
        """The metric of every task over the scored items; tasks without any are left out."""
        scored = {task: [p for p in places if p < len(items)] for task, places in self.places.items()}
        return {task: self._metric(task, items, places) for task, places in scored.items() if places}

    def score(self, items: Sequence[float]) -> float:
        """The score of all items.

        Raises ValueError where items are missing.
        """
        if len(items) != len(self.tasks):
            raise ValueError(f"{len(items)} of {len(self.tasks)} items")
        return self._weighted(self.of_tasks(items))

    def bound(self, items: Sequence[float]) -> float:
        """The score if every task came out as well as it still can."""
        best = {}
        for task, places in self.places.items():
            metric, left = self.metrics[task], [p for p in places if p >= len(items)]
            if left and metric.best is None:
                return math.inf
            if left and not metric.judged:
                best[task] = metric.best or 0.0
            else:
                whole = {p: items[p] if p < len(items) else metric.best for p in places}
                best[task] = self._metric(task, whole, places)
        return self._weighted(best)

    def _metric(self, task: str, items: Any, places: Sequence[int]) -> float:
        metric, answers = self.metrics[task], [items[p] for p in places]
        if metric.judged:
            return math.fsum(answers) / len(answers)
        right = [self.right[p] for p in places]
        return float(metric.of(np.asarray([answers]), np.asarray([right]))[0])

    def _weighted(self, of_tasks: Mapping[str, float]) -> float:
        return math.fsum(self.weights[t] * v for t, v in of_tasks.items()) / math.fsum(self.weights.values())
