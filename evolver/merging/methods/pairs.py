"""Methods that bring one model to another."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from evolver.kernels.softmax import softmax
from evolver.merging.methods import Range, method
from evolver.merging.methods.here import PieceView, Stack
from evolver.merging.methods.operators import TINY, total_of_rows


@method("Alchemist 2024, NearSwap, as in mergekit", takes=1, symmetric=False, identity=None)
def nearswap(deltas: Stack, *, t: Annotated[Tensor, Range(1e-5, 1e-2, log=True, least=0.0)]) -> Tensor:
    """The base, moved towards one model by at most t in every scalar: a delta of 3 with t = 2 becomes 2."""
    return torch.minimum(torch.maximum(deltas[0], -t.float()), t.float())


@method("Arcee 2024, Arcee Fusion, as in mergekit", rows=True, takes=1, symmetric=False, identity=None)
def arcee_fusion(models: Stack, *, here: PieceView) -> Tensor:
    """The base, with the scalars of one model whose change is an outlier of importance.

    Importance is |τ| times the divergence KL(softmax of the model's row ‖ softmax of the base's); outliers lie at or
    above the median plus 1.5 interquartile ranges, all three taken over the whole tensor.
    """

    def ranks(n: int) -> list[list[int]]:
        return [[n - int(q * (n - 1)) for q in (0.5, 0.25, 0.75)]]

    median, low, high = here.kth_largest(_importance, ranks)[0]
    important = _importance(models, here)[0] >= median + 1.5 * (high - low)
    return here.base + torch.where(important, models[0] - here.base, 0.0)


def _importance(models: Stack, here: PieceView) -> Stack:
    ours, theirs = (softmax(x) + TINY for x in (models[0], here.base))
    # In float64, as float32's logarithms and sums differ in the last bit from one processor to another.
    divergence = total_of_rows(ours * torch.log((ours / theirs).double()).float())[:, None].float()
    # The divergence of equal rows is 0 up to rounding, and scores have no sign.
    return [((models[0] - here.base).abs() * divergence).clamp(min=0)]
