"""Concrete subspaces: which tensors, or rows of tensors, of the merged task vectors stay, learned by gradients."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evolver.records.loss import LossName, UnlabelledLoss
from evolver.search.base import Setup, algorithm
from evolver.search.descent.masks import MaskSearch, MaskSettings


class ConcreteSettings(MaskSettings):
    """Settings of concrete subspaces. The defaults are those of the paper's Concrete Task Arithmetic, with 64 items of
    all tasks for 16 items of each.
    """

    algorithm: Literal["concrete"] = Field(description="name of this search")
    loss: LossName = Field(
        "entropy",
        description="what is made small: the entropy of predictions (entropy), or what tells the model from each "
        "expert on the expert's own task (distillation)",
    )
    steps: int = Field(2000, ge=1, le=10**6, description="steps of Adam for the mask; the paper takes 1000 with learn")
    learn: bool = Field(
        False,
        description="whether coefficients are learned, too (Concrete AdaMerging): one step of them before each step of "
        "the mask, which makes each step two, and ``after`` steps in the end",
    )


@algorithm("concrete", ConcreteSettings, partial=True, losses=("entropy", "distillation"))
class Concrete(MaskSearch):
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
        loss = UnlabelledLoss(settings.loss)
        super().__init__(setup, settings, "concrete", loss, settings.steps, settings.learn)
