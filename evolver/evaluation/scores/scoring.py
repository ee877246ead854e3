"""Computes the score from the answers to all items, and an upper bound of it from the answers to some.

Sums of judged items are rounded correctly (``math.fsum``), so that no step below decreases when an item's score
increases. The bound of a partial evaluation is therefore never below the score of the full one, and an evaluation that
stops because of the bound leads to the same decision as one that scores all items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from evolver.evaluation.scores.metrics import Metric, Numbers
from evolver.records import ItemAnswer
from evolver.records.order import OWN, reordered


@dataclass(frozen=True)
class Scale:
    """Says how items make up the score: Σ weight · metric of the task's items, divided by Σ weight.

    Args:
        tasks: the task of every item, in the run's order.
        weights: the weight of every task.
        metrics: the metric of every task.
        right: the right answer to every item; empty where no task's metric needs them.
        clusters: the number of the source document of every item, from 0; empty where every item has one of its own.
    """

    tasks: tuple[str, ...]
    weights: Mapping[str, float]
    metrics: Mapping[str, Metric]
    right: tuple[float, ...] = ()
    clusters: tuple[int, ...] = ()

    @cached_property
    def places(self) -> dict[str, list[int]]:
        """The indices of the items of every task."""
        found: dict[str, list[int]] = {}
        for place, task in enumerate(self.tasks):
            found.setdefault(task, []).append(place)
        return dict(sorted(found.items()))

    @cached_property
    def item_shares(self) -> Numbers:
        """The amount that each item adds to the score if its answer is 1, where all are judged one by one, (N)."""
        found = np.empty(len(self.tasks))
        for task, places in self.places.items():
            found[places] = self.task_share(task) / len(places)
        return found

    def task_share(self, task: str) -> float:
        """The share of a task's metric in the score."""
        return self.weights[task] / math.fsum(self.weights.values())

    @property
    def unjudged(self) -> list[str]:
        """The tasks whose items are not judged one by one with values from 0 to 1."""
        return [task for task, metric in self.metrics.items() if not metric.judged or metric.best != 1.0]

    @property
    def shares(self) -> bool:
        """Whether the metric of every task may be shown as a percentage."""
        return all(m.share for m in self.metrics.values())

    def form(self) -> dict[str, Any]:
        """The scale as a JSON object."""
        metrics = {task: metric.form() for task, metric in self.metrics.items()}
        return {
            "tasks": self.tasks, "weights": dict(self.weights), "metrics": metrics, "right": self.right,
            "clusters": self.clusters,
        }  # fmt: skip

    @staticmethod
    def from_form(form: Mapping[str, Any]) -> Scale:
        """The inverse of ``form``."""
        metrics = {task: Metric.from_form(metric) for task, metric in form["metrics"].items()}
        clusters = tuple(form.get("clusters", ()))  # runs of earlier versions do not have them
        return Scale(tuple(form["tasks"]), form["weights"], metrics, tuple(form["right"]), clusters)

    def joined(self, other: Scale) -> Scale:
        """The scale of these items and then those of another scale of the same tasks; weights and metrics are ours."""
        return Scale((*self.tasks, *other.tasks), self.weights, self.metrics, (*self.right, *other.right))

    def reordered(self, order: str) -> Scale:
        """The same scale for answers in the order of this name (see ``evolver.records.order``)."""
        if order == OWN:
            return self
        right, clusters = reordered(self.right, order), reordered(self.clusters, order)
        return replace(self, tasks=reordered(self.tasks, order), right=right, clusters=clusters)

    def of(self, shares: Mapping[str, float]) -> tuple[Scale, list[int]]:
        """The scale of some tasks alone, with these weights, and the places of their items in this scale."""
        kept = [place for place, task in enumerate(self.tasks) if task in shares]
        metrics = {task: self.metrics[task] for task in shares}
        right = tuple(self.right[k] for k in kept) if self.right else ()
        clusters = tuple(self.clusters[k] for k in kept) if self.clusters else ()
        return Scale(tuple(self.tasks[k] for k in kept), dict(shares), metrics, right, clusters), kept

    def alone(self, task: str) -> Scale:
        """The scale of one task's items, of which each counts as a document of its own."""
        places = self.places[task]
        right = tuple(self.right[p] for p in places) if self.right else ()
        return Scale((task,) * len(places), {task: 1.0}, {task: self.metrics[task]}, right)

    def of_tasks(self, items: Sequence[ItemAnswer]) -> dict[str, float]:
        """The metric of every task over the items scored so far. Tasks without a scored item are left out."""
        scored = {task: [p for p in places if p < len(items)] for task, places in self.places.items()}
        return {task: self._metric(task, items, places) for task, places in scored.items() if places}

    def score(self, items: Sequence[ItemAnswer]) -> float:
        """The score of the answers to all items.

        Raises ValueError where answers are missing.
        """
        if len(items) != len(self.tasks):
            raise ValueError(f"{len(items)} of {len(self.tasks)} items")
        return self._weighted(self.of_tasks(items))

    def bound(self, items: Sequence[ItemAnswer]) -> float:
        """The highest score that is still possible after the answers to the first items.

        It is infinite where a task has unscored items and a metric without a known highest value.
        """
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
        if metric.counts:
            return float(metric.of(np.asarray(answers)[:, 1:].sum(0)[None], np.zeros(1))[0])
        right = [self.right[p] for p in places]
        return float(metric.of(np.asarray([answers]), np.asarray([right]))[0])

    def _weighted(self, of_tasks: Mapping[str, float]) -> float:
        return math.fsum(self.weights[t] * v for t, v in of_tasks.items()) / math.fsum(self.weights.values())
