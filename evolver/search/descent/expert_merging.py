"""Expert Merging: coefficients with which the merged model does what each expert does on the expert's own task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from evolver.records.loss import UnlabelledLoss
from evolver.search.base import Setup, algorithm
from evolver.search.descent.adam import Adam
from evolver.search.descent.base import Descent, DescentSettings, chosen_places


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
    """

    def __init__(self, setup: Setup, settings: ExpertMergingSettings) -> None:
        self.initial, self.anchor = settings.initial, settings.anchor
        loss = UnlabelledLoss("distillation", settings.temperature, settings.hidden)
        places = chosen_places(setup, settings.per)
        learnt = [n for n, place in enumerate(places) if settings.outside or not place.outside]
        super().__init__(setup, settings, "expert_merging", settings.steps, loss, places, learnt)
        self.adam = Adam(len(self.learnt), settings.lr, settings.decay)

    def start(self) -> list[float]:
        return [math.log(self.initial / (1 - self.initial))] * (len(self.places) * self.experts)

    def coefficients(self, step: int | None = None) -> list[float]:
        return [1 / (1 + math.exp(-a)) for a in self.numbers]

    def move(self, step: int, gradient: Sequence[float]) -> None:
        found, own = self.coefficients(), self.learnt
        hold = self.anchor / max(1, len(own))
        slopes = [(gradient[i] + hold * _sign(found[i] - self.initial)) * found[i] * (1 - found[i]) for i in own]
        for i, number in zip(own, self.adam.moved([self.numbers[i] for i in own], slopes), strict=True):
            self.numbers[i] = number


def _sign(x: float) -> float:
    return 0.0 if abs(x) < 1e-12 else math.copysign(1.0, x)
