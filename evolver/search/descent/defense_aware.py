"""Defense-aware merging: a mask that keeps predictions sure although an adversary disturbs the inputs of each task."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evolver.records.loss import Adversary, UnlabelledLoss
from evolver.search.base import Setup, algorithm
from evolver.search.descent.masks import MaskSearch, MaskSettings


class DefenseAwareSettings(MaskSettings):
    """Settings of defense-aware merging. The defaults are those of the released code where it has the same setting,
    with 64 items of all tasks a step.
    """

    algorithm: Literal["defense_aware"] = Field(description="name of this search")
    steps: int = Field(
        1000,
        ge=1,
        le=10**6,
        description="steps of Adam for the mask, before each of which goes one of the coefficients",
    )
    adversary: float = Field(
        0.1, gt=0, le=100, description="weight of the entropy on disturbed items, beside that on the items as they are"
    )
    attacks: int = Field(
        5,
        ge=1,
        le=1000,
        description="steps of Adam that the adversary takes in each step of the mask. Each one passes the items "
        "forward and backward through the model",
    )
    attack_lr: float = Field(
        0.02,
        gt=0,
        le=10,
        description="learning rate of the adversary, in units of the root mean square of tokens' embeddings, or of the "
        "processed images' own. It gets about ``attacks`` times as far",
    )


@algorithm("defense_aware", DefenseAwareSettings, partial=True, losses=("entropy",))
class DefenseAware(MaskSearch):
    """Defense-aware merging (Yang et al. 2024, arXiv 2410.13910, read in a summary of the released code [S]).

    It is Concrete AdaMerging against an adversary, see ``concrete``: the same mask and coefficients, but the loss of a
    step of the mask is H(f(x)) + w·H(f(x + p)), the entropies of predictions on dev items as they are and as they are
    disturbed. p is one for all items of a task. Adam makes CE(f(x + p), f(x)) large with it, where f(x) is the label
    that the model itself predicts. Steps of the coefficients look at H(f(x)) alone, and so do the ``after`` ones. It
    is meant for pools in which an expert may have been trained to obey a hidden trigger, and assumes that p finds what
    a trigger uses. A model that is sure need not be right, and language models are refused.

    The paper's abstract speaks of two masks; the code as summarised has one and p. It moves p once before each step of
    the mask, by Adam at 1e-4, and keeps it, which goes no further than about 0.1 in 1000 steps; it sets no other bound.
    Here p begins at 0 in each step of the mask and moves ``attacks`` times, about as far, so that a step depends on its
    candidate alone and a run that was stopped repeats it. The paper has images. Of texts p is one vector, which is
    added to the embedding of every token.
    """

    def __init__(self, setup: Setup, settings: DefenseAwareSettings) -> None:
        against = Adversary(settings.adversary, settings.attacks, settings.attack_lr)
        self.disturbed = UnlabelledLoss("entropy", adversary=against)
        super().__init__(setup, settings, "defense_aware", UnlabelledLoss("entropy"), settings.steps, learn=True)

    def loss_of(self, step: int) -> UnlabelledLoss:
        return self.disturbed if self.moves_mask(step) else self.loss
