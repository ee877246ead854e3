"""What a search that descends wants to make small: a loss that needs no right answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LossName = Literal["entropy", "distillation"]


@dataclass(frozen=True)
class UnlabelledLoss:
    """A loss of a merged model on items; the mean over the tasks, or over the experts, that have some of the items.

    Attributes:
        name: ``entropy`` is that of the model's predictions, in nats (AdaMerging). ``distillation`` compares the model
            with each expert on the expert's own task: T²·KL(expert ‖ model) of the predictions at the temperature T, in
            nats, plus ``hidden`` times Σ over the layers of the mean squared error of their outputs (Expert Merging).
        temperature: T.
        hidden: weight of the outputs of the layers.
    """

    name: LossName
    temperature: float = 1.0
    hidden: float = 1.0
