"""FW-Merging: steps towards the one expert that lowers the loss most, by the algorithm of Frank and Wolfe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from evolver.records.loss import LossName, UnlabelledLoss
from evolver.search.base import Setup, algorithm
from evolver.search.descent.base import Descent, DescentSettings, chosen_places


class FrankWolfeSettings(DescentSettings):
    """Settings of FW-Merging. The defaults are the paper's; it has 100 items of each task."""

    algorithm: Literal["fw_merging"] = Field(description="name of this search")
    loss: LossName = Field(
        "entropy",
        description="what is made small: the entropy of predictions (entropy), or what tells the model from each "
        "expert on the expert's own task (distillation)",
    )
    steps: int = Field(10, ge=1, le=10**6, description="steps, in each of which one expert is merged in")
    items: int = Field(100, ge=1, le=10**9, description="dev items of a step. Their labels are not looked at")
    redraw: bool = Field(False, description="whether every step has other items")
    eta: float = Field(1.0, gt=0, le=1, description="factor η of the step size 2/(t + 2)")
    scale: float = Field(0.3, gt=0, le=3, description="how far a whole step goes towards an expert")


@algorithm("fw_merging", FrankWolfeSettings, partial=True, losses=("entropy", "distillation"))
class FrankWolfe(Descent):
    """Frank-Wolfe over the experts (FW-Merging, Chen et al. 2025, arXiv 2503.12649, algorithm 1).

    Step t finds the vertex to which the loss falls fastest, argmin_k ⟨∂L/∂θ, θ_k⟩ over the experts and the base, and
    goes there by γ = scale·η·2/(t + 2): θ ← θ + γ(θ_k - θ). With ``per: layer`` every layer has a vertex of its own. As
    θ is linear in the coefficients, ⟨∂L/∂θ, θ_k⟩ is ∂L/∂c_k up to a constant. Unlike the gradient descent of
    ``adamerging``, an expert that never helps gets exactly 0, so it suits pools in which many experts are of no use.
    The released code divides by the norms of whole models, which are nearly equal, and takes labelled items; here the
    inner product is the algorithm's own, and the loss needs no labels. It assumes that good merges lie between the
    experts and the base, where it starts.
    """

    def __init__(self, setup: Setup, settings: FrankWolfeSettings) -> None:
        self.eta, self.scale = settings.eta, settings.scale
        places = chosen_places(setup, settings.per)
        super().__init__(setup, settings, "fw_merging", settings.steps, UnlabelledLoss(settings.loss), places)

    def start(self) -> list[float]:
        return [0.0] * (len(self.places) * self.experts)

    def move(self, step: int, gradient: Sequence[float]) -> None:
        size = min(1.0, self.scale * self.eta * 2 / (step + 2))
        for first in range(0, len(self.numbers), self.experts):
            own = range(first, first + self.experts)
            best = min(own, key=lambda i: gradient[i])
            towards = best if gradient[best] < 0 else None  # None: the base, whose slope is 0
            for i in own:
                self.numbers[i] += size * ((i == towards) - self.numbers[i])
