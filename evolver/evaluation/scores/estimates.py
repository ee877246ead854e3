"""Estimates the score of all dev items, and the metric of each task, from the answers to the first items, for searches
that score only a part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import cast

import numpy as np

from evolver.errors import BadInput
from evolver.evaluation.scores.difference import Predictor, estimate_at, predictor_of
from evolver.evaluation.scores.irt import EstimateKind, ItemModel, fit_items
from evolver.evaluation.scores.scoring import Scale
from evolver.records import ItemAnswer, Result
from evolver.records.order import OWN, item_order

# An item model is fitted iteratively, so later digits of an estimate may differ between processors. They are cut off.
DIGITS = 6


class Estimates:
    """Estimates, based on the models that have answered all dev items so far.

    Args:
        scale: how the dev items make up the score.
        block: how many items are scored at a time.

    Attributes:
        experts: the recipe ids of the experts, from whose abilities ``mp-irt`` predicts that of a merge.
    """

    def __init__(self, scale: Scale, block: int) -> None:
        self.scale, self.block = scale, block
        self.experts: tuple[str, ...] = ()
        self._complete: dict[str, Result] = {}

    @property
    def items(self) -> int:
        """The number of dev items."""
        return len(self.scale.tasks)

    def check(self, kind: str, key: str) -> None:
        """Check that the tasks allow estimates of this kind.

        Raises BadInput, naming ``key``, where they do not.
        """
        task = self.unjudged
        if kind != "mean" and task is not None:
            raise BadInput(
                f"{key}: {kind} needs items with scores of their own from 0 to 1, and {task} has none; write mean."
            )

    @property
    def unjudged(self) -> str | None:
        """A task whose items have no scores of their own from 0 to 1; None where those of all tasks have."""
        return first_unjudged(self.scale)

    def learn(self, result: Result) -> None:
        """Add a model that has answered all items. Other results are ignored."""
        if result.complete and result.recipe_id not in self._complete:
            self._complete[result.recipe_id] = result
            for fitted in ("_known", "_item_model", "_predictor", "_abilities", "_task_models"):
                self.__dict__.pop(fitted, None)

    def known(self, recipe_id: str) -> Result | None:
        """The complete result of a recipe, if ``learn`` was given one; else None."""
        return self._complete.get(recipe_id)

    def estimate(self, kind: str, items: Sequence[ItemAnswer], order: str = OWN) -> float:
        """Estimate the score of all items from the answers to the first ones in an order.

        Args:
            kind: ``mean`` is the score over the items that were answered, and over their tasks only. For ``difference``
                see ``evolver.evaluation.scores.difference``, and for ``p-irt``, ``gp-irt`` and ``mp-irt``
                ``evolver.evaluation.scores.irt``; as long as no model has answered all items, they give the mean, and
                as long as no expert has, ``mp-irt`` is ``p-irt``.
            items: the answers to the first items.
            order: the name of the order.
        """
        if self._plain(kind):
            return self._weighted(self.scale.reordered(order).of_tasks(items))
        answers = cast(Sequence[float], items)
        if kind == "difference":
            return round(self._weighted(self._difference(answers, order)), DIGITS)
        model = self._item_model.reordered(item_order(order, self.items))
        abilities = self._abilities
        found = model.estimate(answers, self.scale.reordered(order), _wanted(kind, abilities), abilities)
        return round(found, DIGITS)

    def estimate_tasks(self, kind: str, items: Sequence[ItemAnswer], order: str = OWN) -> dict[str, float]:
        """Estimate the metric of each task over all of its items from the answers to the first items in an order.

        That each objective of a search is an estimate is from MERGE³ (Mencattini et al. 2025). ``estimate`` is the
        weighted mean of these, up to rounding, with the kinds ``mean`` and ``difference``. With item-response estimates
        it is not: the score rests on one ability, which the answers to all items show, and each task on an ability of
        its own, which those to its items show. One ability for all tasks would say that who is good at one task is good
        at all, and so a search by several objectives would see one objective.

        With the kind ``mean``, and as long as no model has answered all items, tasks without an answered item are left
        out, as the mean says nothing of them. All other kinds predict such tasks: ``difference`` as the average of the
        models that have answered all items where nothing better is known, the others as for a model of average ability.

        Args:
            kind, items, order: as of ``estimate``.
        """
        if self._plain(kind):
            return self.scale.reordered(order).of_tasks(items)
        answers = cast(Sequence[float], items)
        if kind == "difference":
            found = self._difference(answers, order)
        else:
            found = {task: self._of_task(task, kind, answers, order) for task in self.scale.places}
        return {task: round(value, DIGITS) for task, value in found.items()}

    def _plain(self, kind: str) -> bool:
        """Whether the estimate is the mean of the answers."""
        return kind == "mean" or not self._complete

    def _weighted(self, tasks: Mapping[str, float]) -> float:
        """The score that the metrics of tasks make up; of the tasks that are there only."""
        total = math.fsum(self.scale.weights[task] for task in tasks)
        return math.fsum(self.scale.weights[task] * value for task, value in tasks.items()) / total

    def _difference(self, answers: Sequence[float], order: str) -> dict[str, float]:
        places = np.asarray(item_order(order, self.items)[: len(answers)])
        given = np.asarray([answers], dtype=np.float64)
        found = estimate_at(self._predictor, self.scale.item_shares, places, given)
        return dict(zip(self.scale.places, found.tasks[0].tolist(), strict=True))

    def _of_task(self, task: str, kind: str, answers: Sequence[float], order: str) -> float:
        """The item-response estimate of one task from the answers to its own items among these."""
        number = {place: k for k, place in enumerate(self.scale.places[task])}
        places = item_order(order, self.items)
        met = [answer for place, answer in zip(places, answers, strict=False) if place in number]
        model, abilities = self._task_models[task]
        model = model.reordered([number[place] for place in places if place in number])
        return model.estimate(met, self.scale.alone(task), _wanted(kind, abilities), abilities)

    @cached_property
    def _known(self) -> list[Sequence[float]]:
        """The answers of the models that have answered all items.

        Sorted by id, as the order in which results arrived would otherwise change the rounding of sums.
        """
        return [cast(Sequence[float], self._complete[i].items) for i in sorted(self._complete)]

    @cached_property
    def _item_model(self) -> ItemModel:
        return fit_items(self._known, self.items)

    @cached_property
    def _abilities(self) -> list[float]:
        """Those of the experts that have answered all items."""
        return [self._item_model.ability(answers) for answers in self._of_experts]

    @cached_property
    def _task_models(self) -> dict[str, tuple[ItemModel, list[float]]]:
        """A model of the items of each task alone, and the abilities of the experts at it."""
        found = {}
        for task, places in self.scale.places.items():
            model = fit_items([[row[p] for p in places] for row in self._known], len(places))
            found[task] = model, [model.ability([row[p] for p in places]) for row in self._of_experts]
        return found

    @property
    def _of_experts(self) -> list[Sequence[float]]:
        """The answers of the experts that have answered all items."""
        return [cast(Sequence[float], self._complete[i].items) for i in self.experts if i in self._complete]

    @cached_property
    def _predictor(self) -> Predictor:
        return predictor_of(self.scale, np.asarray(self._known, dtype=np.float64))


def first_unjudged(scale: Scale) -> str | None:
    """The first task whose items are not judged one by one with values from 0 to 1; None if there is none."""
    return next(iter(scale.unjudged), None)


def _wanted(kind: str, abilities: Sequence[float]) -> EstimateKind:
    """The kind of an item-response estimate: without abilities of experts, ``mp-irt`` is ``p-irt``."""
    return cast(EstimateKind, "p-irt" if kind == "mp-irt" and not abilities else kind)
