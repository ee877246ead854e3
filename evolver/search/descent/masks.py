"""The common part of searches that learn a mask over tensors, or over parts of their rows, that all experts share."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from evolver.records.loss import UnlabelledLoss
from evolver.search.base import Setup
from evolver.search.descent.adam import Adam
from evolver.search.descent.base import Descent, DescentSettings, chosen_places
from evolver.search.descent.places import owner_of, tensor_places


class MaskSettings(DescentSettings):
    """Settings of every search that learns a mask."""

    per: Literal["layer", "tensor", "model"] = Field(
        "layer",
        description="what has coefficients of its own, one for each expert, where they are learned. The mask is finer",
    )
    parts: int = Field(
        1,
        ge=1,
        le=1024,
        description="into how many parts the rows of every tensor are divided, each with a number of the mask of its "
        "own; 1: the mask has one number for each tensor",
    )
    lr: float = Field(1e-3, gt=0, le=1, description="learning rate of Adam for the mask")
    temperature: float = Field(0.5, gt=0, le=100, description="temperature T of the mask")
    initial: float = Field(0.3, ge=0, le=1, description="coefficient λ of every expert before the first step")
    inner: float = Field(
        1.0, gt=0, le=100, description="learning rate of the coefficients' step before one of the mask"
    )
    after: int = Field(
        1000,
        ge=0,
        le=10**6,
        description="steps of Adam for the coefficients after those of the mask, where coefficients are learned",
    )
    after_lr: float = Field(1e-3, gt=0, le=1, description="learning rate of these steps")


class MaskSearch(Descent):
    """A search whose coefficients are m/mean(m)·λ_k, of which it learns the mask m, and also the λ where it is told to.

    Args:
        steps: of the mask.
        learn: whether each of them comes after one of the λ, and ``after`` steps of the λ come in the end.
    """

    def __init__(
        self, setup: Setup, settings: MaskSettings, name: str, loss: UnlabelledLoss, steps: int, learn: bool
    ) -> None:  # fmt: skip
        self.settings, self.learn_too, self.mask_steps = settings, learn, steps * (2 if learn else 1)
        shapes = setup.maker.shapes
        self.masked = tensor_places(shapes, dict.fromkeys(shapes, settings.parts))
        owners = chosen_places(setup, settings.per)
        self.owners = [owner_of(owners, found.name) for found in self.masked]
        self.groups = len(owners)
        total = sum(found.size for found in self.masked)
        self.shares = [found.size / total for found in self.masked]
        self.logits = [0.0] * len(self.masked)
        places = [found.place for found in self.masked]
        super().__init__(setup, settings, name, self.mask_steps + (settings.after if learn else 0), loss, places)
        self.adam = Adam(len(self.logits), settings.lr)
        self.last_adam = Adam(len(self.numbers), settings.after_lr)

    def start(self) -> list[float]:
        return [self.settings.initial] * (self.groups * self.experts)

    def moves_mask(self, step: int) -> bool:
        """Whether this step is one of the mask, and not one of the coefficients."""
        return step < self.mask_steps and not (self.learn_too and step % 2 == 0)

    def coefficients(self, step: int | None) -> list[float]:
        masks = self.scaled(self.mask(step))
        return [m * self._of(of, e) for m, of in zip(masks, self.owners, strict=True) for e in range(self.experts)]

    def move(self, step: int, gradient: Sequence[float]) -> None:
        mask, pairs = self.mask(step), range(self.experts)
        rows = [gradient[first : first + self.experts] for first in range(0, len(gradient), self.experts)]
        if not self.moves_mask(step):
            slopes = [0.0] * len(self.numbers)
            for m, of, row in zip(self.scaled(mask), self.owners, rows, strict=True):
                for e in pairs:
                    slopes[of * self.experts + e] += m * row[e]
            moved = self._moved(step, slopes)
            self.numbers = [min(max(x, 0.0), 1.0) for x in moved]
            return
        wanted = [math.fsum(self._of(of, e) * row[e] for e in pairs) for of, row in zip(self.owners, rows, strict=True)]
        self.logits = self.adam.moved(self.logits, self.slopes(mask, wanted))

    def mask(self, step: int | None) -> list[float]:
        """The numbers m of all places: drawn for a step of the mask, and with u = 1/2 after them."""
        if step is None or step >= self.mask_steps:
            noise = [0.0] * len(self.logits)
        else:  # the step of the coefficients has the mask of the step that it belongs to
            draw = random.Random(f"{self.setup.seed}:{self.name}:{step // 2 if self.learn_too else step}")
            noise = [_logit(draw.uniform(1e-6, 1 - 1e-6)) for _ in self.logits]
        warmth = self.settings.temperature
        return [_sigmoid((n + x) / warmth) for n, x in zip(noise, self.logits, strict=True)]

    def scaled(self, mask: Sequence[float]) -> list[float]:
        """m/mean(m), with the mean over all scalars."""
        mean = self._mean(mask)
        return [m / mean for m in mask]

    def slopes(self, mask: Sequence[float], wanted: Sequence[float]) -> list[float]:
        """∂L/∂x from ∂L/∂(m/mean(m)), where ∂(m_v/μ)/∂m_u = ([u = v] - share_u·m_v/μ)/μ and ∂m/∂x = m(1 - m)/T."""
        mean = self._mean(mask)
        whole = math.fsum(w * m for w, m in zip(wanted, mask, strict=True)) / mean
        return [
            (w - share * whole) / mean * m * (1 - m) / self.settings.temperature
            for w, share, m in zip(wanted, self.shares, mask, strict=True)
        ]

    def _mean(self, mask: Sequence[float]) -> float:
        return max(math.fsum(share * m for share, m in zip(self.shares, mask, strict=True)), 1e-12)

    def _of(self, place: int, expert: int) -> float:
        return self.numbers[place * self.experts + expert]

    def _moved(self, step: int, slopes: Sequence[float]) -> list[float]:
        if step >= self.mask_steps:
            return self.last_adam.moved(self.numbers, slopes)
        return [x - self.settings.inner * slope for x, slope in zip(self.numbers, slopes, strict=True)]


def _logit(u: float) -> float:
    return math.log(u / (1 - u))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
