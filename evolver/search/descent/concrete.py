"""Concrete subspaces: which tensors, or rows of tensors, of the merged task vectors stay, learned by gradients."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from evolver.records.loss import LossName, UnlabelledLoss
from evolver.search.base import Setup, algorithm
from evolver.search.descent.adam import Adam
from evolver.search.descent.base import Descent, DescentSettings, chosen_places
from evolver.search.descent.places import owner_of, tensor_places


class ConcreteSettings(DescentSettings):
    """Settings of concrete subspaces. The defaults are those of the paper's Concrete Task Arithmetic, with 64 items of
    all tasks for 16 items of each.
    """

    algorithm: Literal["concrete"] = Field(description="name of this search")
    per: Literal["layer", "tensor", "model"] = Field(
        "layer",
        description="what has coefficients of its own, one for each expert, where they are learned: see ``learn``. The "
        "mask is finer",
    )
    loss: LossName = Field(
        "entropy",
        description="what is made small: the entropy of predictions (entropy), or what tells the model from each "
        "expert on the expert's own task (distillation)",
    )
    parts: int = Field(
        1,
        ge=1,
        le=1024,
        description="into how many parts the rows of every tensor are divided, each with a number of the mask of its "
        "own; 1: the mask has one number for each tensor",
    )
    steps: int = Field(2000, ge=1, le=10**6, description="steps of Adam for the mask; the paper takes 1000 with learn")
    lr: float = Field(1e-3, gt=0, le=1, description="learning rate of Adam for the mask")
    temperature: float = Field(0.5, gt=0, le=100, description="temperature T of the mask")
    initial: float = Field(0.3, ge=0, le=1, description="coefficient λ of every expert before the first step")
    learn: bool = Field(
        False,
        description="whether coefficients are learned, too (Concrete AdaMerging): one step of them before each step of "
        "the mask, which makes each step two, and ``after`` steps in the end",
    )
    inner: float = Field(
        1.0, gt=0, le=100, description="learning rate of the coefficients' step before one of the mask"
    )
    after: int = Field(
        1000, ge=0, le=10**6, description="with ``learn``, steps of Adam for the coefficients in the end"
    )
    after_lr: float = Field(1e-3, gt=0, le=1, description="learning rate of these steps")


@algorithm("concrete", ConcreteSettings, partial=True, losses=("entropy", "distillation"))
class Concrete(Descent):
    """Concrete subspace learning (Tang et al. 2023, arXiv 2312.06173, read in a summary of the released code [S]).

    All experts share a mask: θ = θ₀ + Σ_k λ_k·m/mean(m)∘τ_k. A number of it is m = σ((log(u/(1 - u)) + x)/T), with a
    new u from (0, 1) in every step, and Adam moves the logits x, from 0, down the gradient of a loss without labels. In
    the end u = 1/2, and m/mean(m)·λ_k are the coefficients of an ordinary merge. With ``learn`` (Concrete AdaMerging),
    λ ← λ - inner·∂L/∂λ goes before each step of the mask, and steps of AdaMerging with the mask that was learnt come
    last. Unlike ``adamerging`` it learns where the sum of the task vectors counts, and not which expert counts where.

    The paper's mask has a number for every scalar, which no recipe of a few numbers can hold; here it has one for every
    tensor, or for every part of its rows. The mean is that over all scalars. The summary does not say whether λ starts
    anew at each step of the mask; here it goes on from where it is, and it stays between 0 and 1. It assumes that some
    tensors hold what is common to all tasks, and that others are in the tasks' way.
    """

    def __init__(self, setup: Setup, settings: ConcreteSettings) -> None:
        self.settings, shapes = settings, setup.maker.shapes
        self.masked = tensor_places(shapes, dict.fromkeys(shapes, settings.parts))
        owners = chosen_places(setup, settings.per)
        self.owners = [owner_of(owners, found.name) for found in self.masked]
        self.groups = len(owners)
        total = sum(found.size for found in self.masked)
        self.shares = [found.size / total for found in self.masked]
        self.logits = [0.0] * len(self.masked)
        count = settings.steps * 2 + settings.after if settings.learn else settings.steps
        places = [found.place for found in self.masked]
        super().__init__(setup, settings, "concrete", count, UnlabelledLoss(settings.loss), places)
        self.adam = Adam(len(self.logits), settings.lr)
        self.last_adam = Adam(len(self.numbers), settings.after_lr)

    def start(self) -> list[float]:
        return [self.settings.initial] * (self.groups * self.experts)

    def coefficients(self, step: int | None) -> list[float]:
        masks = self.scaled(self.mask(step))
        return [m * self._of(of, e) for m, of in zip(masks, self.owners, strict=True) for e in range(self.experts)]

    def move(self, step: int, gradient: Sequence[float]) -> None:
        mask, pairs = self.mask(step), range(self.experts)
        rows = [gradient[first : first + self.experts] for first in range(0, len(gradient), self.experts)]
        if self.settings.learn and (step % 2 == 0 or step >= self.settings.steps * 2):
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
        each = 2 if self.settings.learn else 1
        if step is None or step >= self.settings.steps * each:
            noise = [0.0] * len(self.logits)
        else:  # the step of the coefficients has the mask of the step that it belongs to
            draw = random.Random(f"{self.setup.seed}:concrete:{step // each}")
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
        if step >= self.settings.steps * 2:
            return self.last_adam.moved(self.numbers, slopes)
        return [x - self.settings.inner * slope for x, slope in zip(self.numbers, slopes, strict=True)]


def _logit(u: float) -> float:
    return math.log(u / (1 - u))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
