"""AdaMerging: coefficients that make the merged model sure of its predictions, without a look at any right answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from evolver.records.loss import UnlabelledLoss
from evolver.search.base import Setup, algorithm
from evolver.search.descent.adam import Adam
from evolver.search.descent.base import Descent, DescentSettings, chosen_places


class AdaMergingSettings(DescentSettings):
    """Settings of AdaMerging. The defaults are the paper's, with 64 items of all tasks for 16 items of each."""

    algorithm: Literal["adamerging"] = Field(description="name of this search")
    steps: int = Field(500, ge=1, le=10**6, description="steps of Adam")
    lr: float = Field(1e-3, gt=0, le=1, description="learning rate of Adam")
    initial: float = Field(0.3, ge=0, le=1, description="coefficient of every expert before the first step")


@algorithm("adamerging", AdaMergingSettings, partial=True, losses=("entropy",))
class AdaMerging(Descent):
    """Adaptive merging by entropy (AdaMerging, Yang et al. 2024, ICLR, arXiv 2310.02575, equations 3 and 4).

    It makes the entropy of the merged model's predictions small on dev items, by gradients, with coefficients between 0
    and 1 for every expert and layer. Unlike a search of coefficients it looks at no label. It assumes that a model that
    is sure is right, which holds for classifiers; a language model gets sure by repeating itself, so for one it is
    refused, and ``expert_merging`` is the search to use. The paper gives every tensor of an expert a coefficient, as
    ``per: tensor`` does; by default the tensors of a layer share one. Constraints cannot move it: the run judges the
    one model that was learnt.
    """

    def __init__(self, setup: Setup, settings: AdaMergingSettings) -> None:
        self.initial = settings.initial
        places = chosen_places(setup, settings.per)
        super().__init__(setup, settings, "adamerging", settings.steps, UnlabelledLoss("entropy"), places)
        self.adam = Adam(len(self.numbers), settings.lr)

    def start(self) -> list[float]:
        return [self.initial] * (len(self.places) * self.experts)

    def move(self, step: int, gradient: Sequence[float]) -> None:
        self.numbers = [min(max(x, 0.0), 1.0) for x in self.adam.moved(self.numbers, gradient)]
