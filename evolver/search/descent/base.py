"""The common part of searches that descend: steps whose results are gradients, and then the model that was learnt.

A step is a candidate: the merge with the coefficients so far, whose result holds the gradient of a loss on some dev
items. The search takes the gradient and moves the coefficients, so it needs no tensors, and everything that it has
learnt stands in the ledger: what was stopped goes on by replay, with the same coefficients to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from evolver.config import Budget
from evolver.config.section import Section
from evolver.errors import BadInput
from evolver.records import Candidate, Result
from evolver.records.loss import UnlabelledLoss
from evolver.records.recipe import Merge, Place, Rule
from evolver.search.base import Ordered, Setup
from evolver.search.descent.places import layer_places, tensor_places

# Coefficients have so many digits after the point in a recipe.
COEFFICIENT_DIGITS = 9


class DescentSettings(Section):
    """Settings of every search that descends."""

    per: Literal["layer", "tensor", "model"] = Field(
        "layer",
        description="what has coefficients of its own, one for each expert: every layer, and all tensors outside of "
        "the layers together (layer), every tensor (tensor), or the model as a whole (model)",
    )
    items: int = Field(64, ge=1, le=10**9, description="dev items of a step. Their labels are not looked at")
    redraw: bool = Field(True, description="whether every step has other items, drawn from all dev items")


class Descent(Ordered):
    """A search of so many steps, and then one candidate with the coefficients that were learnt, scored on all items.

    A subclass says how coefficients begin (``start``), how a gradient moves them (``move``), and which loss it is of.
    The step that fails, as where an output is not finite, moves nothing.

    Args:
        name: of the search.
        steps: as the settings give them. Fewer are taken where the budget leaves room for fewer.
        loss: what is made small.
        places: those that have coefficients of their own.
        learnt: the numbers of the places whose coefficients are learnt; the others keep those of the beginning. None:
            all of them.

    Raises BadInput for a budget that ends by patience, as steps have no scores.
    """

    def __init__(
        self, setup: Setup, settings: DescentSettings, name: str, steps: int, loss: UnlabelledLoss,
        places: Sequence[Place], learnt: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.items, self.redraw, self.loss = name, settings.items, settings.redraw, loss
        self.wanted, self.steps = steps, min(steps, _room(setup.budget))
        super().__init__(setup, limit=self.steps + 1)
        self.experts = len(setup.experts)
        self.lay_out(places, range(len(places)) if learnt is None else learnt)
        self.numbers: list[float] = self.start()

    def lay_out(self, places: Sequence[Place], learnt: Sequence[int]) -> None:
        """Learn the coefficients of these places from now on, see above."""
        self.places = tuple(places)
        # The places in the list of numbers that are learnt.
        self.learnt = [place * self.experts + expert for place in learnt for expert in range(self.experts)]

    def start(self) -> list[float]:
        """The coefficients of the first step."""
        raise NotImplementedError  # every search defines it

    def move(self, step: int, gradient: Sequence[float]) -> None:
        """Move ``numbers`` by the gradient of step number ``step``, from 0."""
        raise NotImplementedError  # every search defines it

    def loss_of(self, step: int) -> UnlabelledLoss:
        """The loss whose gradient a step asks for: always the same one, if nothing else is said."""
        return self.loss

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences on a budget that ends before the steps, or before the choice."""
        out = []
        most, needed = self.setup.budget.items, self.wanted * self.items
        if self.steps < self.wanted or (most is not None and most <= needed):
            out.append(
                f"search.steps: the budget leaves no room for all {self.wanted} steps and the model that was learnt, "
                f"so fewer steps are taken; all of them take {self.wanted + 1} candidates and more than {needed} items"
            )
        if self.setup.budget.minutes is not None:
            out.append(
                "budget.minutes: if the time is up before the last step, no model is scored; the same command with "
                "more minutes goes on from there"
            )
        return tuple(out)

    def waits_for(self, k: int) -> int:
        return k

    def propose(self, k: int) -> Candidate:
        parents = tuple(expert.id for expert in self.setup.experts)
        most = self.setup.budget.items
        if k == self.steps or (most is not None and self._progress.items + self.items >= most):
            self.steps, self.limit = k, k + 1
            return Candidate(k, self.recipe(None), self.name, parents)
        order = f"{self.setup.seed}:{self.name}" + (f":{k}" if self.redraw else "")
        limit = min(self.items, self.setup.estimator.items)
        return Candidate(k, self.recipe(k), f"{self.name}/step", parents).asking(
            limit=limit, order=order, loss=self.loss_of(k)
        )

    def learn(self, candidate: Candidate, result: Result) -> None:
        if candidate.number < self.steps and len(result.gradient) == len(self.places) * self.experts:
            self.move(candidate.number, result.gradient)

    def recipe(self, step: int | None) -> Merge:
        """The merge with the numbers so far: as step number ``step`` has it, or None: as the model that was learnt."""
        rules, found = [], self.coefficients(step)
        for number, place in enumerate(self.places):
            own = found[number * self.experts : (number + 1) * self.experts]
            values = {"weight": tuple(round(c, COEFFICIENT_DIGITS) for c in own), "lambda": 1.0, "normalize": False}
            rules.append(Rule.of(values, place))
        return Merge("task_arithmetic", self.setup.experts, self.setup.base, tuple(rules))

    def coefficients(self, step: int | None) -> list[float]:
        """The coefficients that the numbers stand for in a step, place by place, one for each expert: the numbers
        themselves, if nothing else is said. None: in the model that was learnt.
        """
        return self.numbers


def chosen_places(setup: Setup, per: Literal["layer", "tensor", "model"]) -> tuple[Place, ...]:
    """The places of the coefficients, as the settings say."""
    if per == "tensor":
        return tuple(found.place for found in tensor_places(setup.maker.shapes))
    return layer_places(setup.maker.depth(anew=False) if per == "layer" else 0)


def _room(budget: Budget) -> int:
    """How many steps fit into a budget of candidates, so that the model that was learnt can still be scored after them.

    Raises BadInput for patience.
    """
    if budget.patience is not None:
        raise BadInput(
            "budget.patience: the steps of this search have no scores, so none of them is an improvement; leave "
            "patience out, and limit search.steps."
        )
    return 10**12 if budget.candidates is None else budget.candidates - 1
