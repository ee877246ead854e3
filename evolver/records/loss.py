"""What a search that descends wants to make small: a loss that needs no right answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LossName = Literal["entropy", "distillation"]


@dataclass(frozen=True)
class Adversary:
    """Who disturbs the inputs of each task by one vector or image, which is the same for all of its items.

    Attributes:
        weight: of the loss on disturbed items, beside that on the items as they are.
        steps: of Adam that the adversary takes, from no disturbance at all.
        rate: its learning rate, in units of the root mean square of tokens' embeddings; of images, in their own units.
    """

    weight: float
    steps: int
    rate: float


@dataclass(frozen=True)
class UnlabelledLoss:
    """A loss of a merged model on items; the mean over the tasks, or over the experts, that have some of the items.

    Attributes:
        name: ``entropy`` is that of the model's predictions, in nats (AdaMerging). ``distillation`` compares the model
            with each expert on the expert's own task: T²·KL(expert ‖ model) of the predictions at the temperature T, in
            nats, plus ``hidden`` times Σ over the layers of the mean squared error of their outputs (Expert Merging).
        temperature: T.
        hidden: weight of the outputs of the layers.
        adversary: on whose disturbed items the entropy is made small, too; None: on none.
    """

    name: LossName
    temperature: float = 1.0
    hidden: float = 1.0
    adversary: Adversary | None = None
