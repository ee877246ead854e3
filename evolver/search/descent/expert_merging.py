"""Expert Merging: coefficients with which the merged model does what each expert does on the expert's own task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

from pydantic import Field

from evolver.records import Candidate
from evolver.records.loss import UnlabelledLoss
from evolver.records.recipe import layer_of
from evolver.search.base import Setup, algorithm
from evolver.search.descent.adam import Adam
from evolver.search.descent.base import Descent, DescentSettings, chosen_places
from evolver.search.descent.places import owner_of, tensor_places

# A share that is a whole number may be off by so much.
SLACK = 1e-9


class ExpertMergingSettings(DescentSettings):
    """Settings of Expert Merging. The defaults are the paper's where it has the same setting."""

    algorithm: Literal["expert_merging"] = Field(description="name of this search")
    steps: int = Field(20, ge=1, le=10**6, description="steps of AdamW")
    items: int = Field(
        40, ge=1, le=10**9, description="dev items of a step, of all tasks together. Their labels are not looked at"
    )
    redraw: bool = Field(
        False,
        description="whether every step has other items, on which every expert then has to answer first",
    )
    lr: float = Field(0.5, gt=0, le=10, description="learning rate of AdamW, for the numbers a of coefficients σ(a)")
    decay: float = Field(1e-5, ge=0, le=1, description="weight decay of AdamW")
    initial: float = Field(0.1, gt=0, lt=1, description="coefficient of every expert before the first step")
    hidden: float = Field(1.0, ge=0, le=1e6, description="weight of the error of the layers' outputs; 0: no such error")
    temperature: float = Field(1.0, gt=0, le=100, description="temperature T of the predictions that are compared")
    anchor: float = Field(5.0, ge=0, le=1e6, description="weight γ of the mean distance of coefficients to ``initial``")
    chunks: float = Field(
        0.0,
        ge=0,
        le=100,
        description="Expert Merging++: after the steps, tensors are divided into so many parts in all, times their "
        "number, important ones into more of them, and as many steps follow. The paper has 0.9 to 1.2; 0: none",
    )
    power: float = Field(
        1.0, ge=0, le=10, description="with ``chunks``, power κ to which the importance of a tensor is raised"
    )
    outside: bool = Field(
        False,
        description="whether the coefficients of tensors outside of the layers (embeddings, head) are learnt, too; "
        "else they stay as they begin",
    )


@algorithm("expert_merging", ExpertMergingSettings, partial=True, losses=("distillation",))
class ExpertMerging(Descent):
    """Learnt coefficients by the experts' example (Expert Merging, ICLR 2026, arXiv 2509.25712, read in a summary [S]).

    On the items of its own task every expert shows what it does: the merged model comes near to its layers' outputs
    (mean squared error) and to its predictions (T²·KL). Coefficients are α = σ(a), and AdamW moves the a; γ·mean|α -
    α_initial| holds them back. Unlike ``adamerging`` it needs no classes, so that it can merge language models, and it
    cannot get sure of something that no expert says. It assumes that an expert is right on its own task. An expert that
    is named by no task is the example on all of them. The summary leaves out norms and biases; here they share the
    coefficient of their layer. Its gradient is of all items at once, while the paper adds up eight prompts a step.

    With ``chunks`` it is Expert Merging++: the importance of a tensor, I = Σ_k α_k·Σ|τ_k|, says into how many parts of
    its rows it is divided, m = ⌊B·I^κ/Σ I^κ⌋, with B = chunks times the number of tensors, and each part learns an α
    of its own. A tensor with m = 0 keeps what it has. The summary divides the flattened tensor, and does not say where
    the second half begins; here parts end with a row, and the second half goes on from what the first one has learnt.
    """

    def __init__(self, setup: Setup, settings: ExpertMergingSettings) -> None:
        self.initial, self.anchor = settings.initial, settings.anchor
        loss = UnlabelledLoss("distillation", settings.temperature, settings.hidden)
        places = chosen_places(setup, settings.per)
        learnt = [n for n, place in enumerate(places) if settings.outside or not place.outside]
        halves = 2 if settings.chunks else 1
        super().__init__(setup, settings, "expert_merging", settings.steps * halves, loss, places, learnt)
        self.settings = settings
        self.adam = Adam(len(self.learnt), settings.lr, settings.decay)

    def start(self) -> list[float]:
        return [math.log(self.initial / (1 - self.initial))] * (len(self.places) * self.experts)

    def coefficients(self, step: int | None = None) -> list[float]:
        return [1 / (1 + math.exp(-a)) for a in self.numbers]

    def propose(self, k: int) -> Candidate:
        if self.settings.chunks and k == self.settings.steps and k < self.steps:
            self._divide()
        return super().propose(k)

    def _divide(self) -> None:
        """Give parts of tensors coefficients of their own, which begin with those of the tensor."""
        shapes, before = self.setup.maker.shapes, self.numbers
        own = {name: owner_of(self.places, name) * self.experts for name in shapes}
        within = [name for name in shapes if self.settings.outside or layer_of(name) is not None]
        counts = dict.fromkeys(shapes, 0) | self._chunks(within, {n: self._importance(n, own[n]) for n in within})
        found = tensor_places(shapes, {name: max(1, count) for name, count in counts.items()})
        self.lay_out([f.place for f in found], [n for n, f in enumerate(found) if counts[f.name]])
        self.numbers = [before[own[f.name] + expert] for f in found for expert in range(self.experts)]
        self.adam = Adam(len(self.learnt), self.settings.lr, self.settings.decay)

    def _chunks(self, names: Sequence[str], importance: Mapping[str, float]) -> dict[str, int]:
        """The number m of every tensor. Where no expert changes anything, all tensors count as equally important."""
        most = max(importance.values(), default=0.0) or 1.0
        raised = {name: (importance[name] / most) ** self.settings.power for name in names}
        total = math.fsum(raised.values())
        budget = self.settings.chunks * len(names)
        return {name: int(budget * raised[name] / total + SLACK) if total else 1 for name in names}

    def _importance(self, name: str, first: int) -> float:
        """I of a tensor, whose numbers begin in this place."""
        own = self.coefficients()[first : first + self.experts]
        return math.fsum(c * size for c, size in zip(own, self.sizes[name], strict=True))

    @cached_property
    def sizes(self) -> Mapping[str, tuple[float, ...]]:
        """Σ|τ_k| of every tensor; the experts are read for it."""
        return self.setup.maker.changes()

    def move(self, step: int, gradient: Sequence[float]) -> None:
        found, own = self.coefficients(), self.learnt
        hold = self.anchor / max(1, len(own))
        slopes = [(gradient[i] + hold * _sign(found[i] - self.initial)) * found[i] * (1 - found[i]) for i in own]
        for i, number in zip(own, self.adam.moved([self.numbers[i] for i in own], slopes), strict=True):
            self.numbers[i] = number


def _sign(x: float) -> float:
    return 0.0 if abs(x) < 1e-12 else math.copysign(1.0, x)
