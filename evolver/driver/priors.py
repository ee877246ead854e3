"""Merges that are guessed from the experts' task vectors and scores, as a search begins with them.

Each lies in the space of the search, if that tunes weights: there each place (such as a group of layers) has weights
from the statistics of its own tensors. For all other searches it is task arithmetic over the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from evolver.checkpoints.grams import TensorGrams
from evolver.config.starts import PriorWord
from evolver.merging.corrected import Corrected
from evolver.merging.settings.genome import Genome
from evolver.records import Standing
from evolver.records.recipe import Expert, Merge, Place, Recipe, Rule, layer_of
from evolver.search.priors import (
    GramMatrix,
    Weighing,
    cluster_weights,
    depth_mass,
    inverse_norms,
    relevance,
    score_shares,
    score_softmax,
    soup_order,
)

WEIGHINGS: Mapping[PriorWord, Weighing] = {"nan": inverse_norms, "relevance": relevance}
Weights = Sequence[float]
# Of the experts' scores.
RATINGS: Mapping[PriorWord, Callable[[Sequence[Standing]], tuple[float, ...]]] = {
    "mwa": score_shares,
    "cocktail": score_softmax,
}
Shares = Mapping[str, float]


def prior_count(word: PriorWord, experts: int) -> int:
    """How many models a word stands for."""
    return experts - 1 if word == "greedy" else 1


@dataclass(frozen=True)
class PriorMaker:
    """Makes the merges that the words of ``start`` stand for.

    Args:
        names: of the base's tensors.
        space: of the search; None: it has none with weights.
        grams: reads the inner products of the task vectors of every tensor.
    """

    experts: tuple[Expert, ...]
    base: Expert
    names: Sequence[str]
    space: Genome | Corrected | None
    grams: Callable[[], TensorGrams]

    def recipes(self, word: PriorWord, mass: float, standings: Sequence[Standing]) -> Iterator[Recipe]:
        """The merges of a word, see ``prior_count``.

        Args:
            mass: their total mass; ``depth`` has it in the middle of the model.
            standings: of the experts.
        """
        equal = (1.0 / len(self.experts),) * len(self.experts)
        if word == "depth":
            yield self._by_depth(equal, mass)
        elif word == "greedy":
            yield from (self._merge(partial(_always, weights), mass) for weights in soup_order(standings))
        elif word in RATINGS:
            yield self._merge(partial(_always, RATINGS[word](standings)), mass)
        elif word == "clusters":
            weights = cluster_weights(self._gram(dict.fromkeys(self.names, 1.0)))
            yield self._merge(partial(_always, weights), mass)
        else:
            yield self._merge(lambda shares: WEIGHINGS[word](self._gram(shares)), mass)

    def _merge(self, weighing: Callable[[Shares], Weights], mass: float) -> Recipe:
        point = self.space and self.space.encode_weights(self.names, lambda shares: (weighing(shares), mass))
        if self.space and point:
            return self.space.decode(point)
        return self._arithmetic(weighing(dict.fromkeys(self.names, 1.0)), mass)

    def _by_depth(self, weights: Weights, mass: float) -> Recipe:
        """Equal weights whose total mass grows with depth. Where no places of the space lie deeper than others, each
        layer has a mass of its own.
        """
        depths = set[float]()

        def weighing(shares: Shares) -> tuple[Weights, float]:
            depth = self._depth(shares)
            depths.add(depth)
            return weights, depth_mass(depth, mass)

        point = self.space and self.space.encode_weights(self.names, weighing)
        if self.space and point and max(depths) > min(depths):
            return self.space.decode(point)
        by_layer = [
            Rule.of({"lambda": depth_mass(layer / max(1, self._layers - 1), mass)}, Place((layer, layer + 1)))
            for layer in range(self._layers)
        ]
        return self._arithmetic(weights, mass, by_layer)

    def _arithmetic(self, weights: Weights, mass: float, more: Sequence[Rule] = ()) -> Recipe:
        values = {"weight": tuple(weights), "lambda": mass, "normalize": False}
        return Merge("task_arithmetic", self.experts, self.base, (Rule.of(values), *more))

    def _gram(self, shares: Shares) -> GramMatrix:
        """Σ share · Gram matrix over tensors; those that are not floating have none."""
        found, count = self.grams(), len(self.experts)
        parts = [share * found[name] for name, share in shares.items() if name in found]
        return np.sum(parts, axis=0) if parts else np.zeros((count, count))

    def _depth(self, shares: Shares) -> float:
        """Where a place lies, from 0 to 1: the mean over its tensors; what is in no layer counts as the middle."""
        last = max(1, self._layers - 1)
        placed = [(share, layer_of(name)) for name, share in shares.items()]
        total = math.fsum(share for share, _ in placed) or 1.0
        return math.fsum(s * (0.5 if layer is None else layer / last) for s, layer in placed) / total

    @property
    def _layers(self) -> int:
        return 1 + max((layer for name in self.names if (layer := layer_of(name)) is not None), default=-1)


def _always(weights: Weights, shares: Shares) -> Weights:
    """The same weights at every place."""
    return weights
