"""Averages of checkpoints of one training run."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from evolver.merging.methods import Range, method, number, operators
from evolver.merging.methods.averages import Mass
from evolver.merging.methods.here import Stack


@method(
    "Tian et al. 2025, WSM: Decay-free learning rate schedule via checkpoint merging, arXiv 2507.17634", symmetric=False
)
def wsm(
    deltas: Stack,
    *,
    power: Annotated[Tensor, Range(0.25, 4.0, log=True, above=0.0)] = number(0.5),
    lambda_: Mass = number(1.0),
) -> Tensor:
    """The average of checkpoints, the first model being the earliest, that a decay of the learning rate would give.

    If the step from checkpoint j - 1 to j is to count w_j = 1 - (j/n)ᵖ, n being the number of checkpoints, then
    checkpoint j has the weight w_j - w_{j+1} = ((j+1)/n)ᵖ - (j/n)ᵖ, with j from 0. These sum to 1. At p = 1 it is the
    plain average, at a large p the last checkpoint, and p = 0.5 is the paper's best shape, "1-sqrt". The result is base
    + λ·(average - base), so at λ = 1 the base does not matter.

    The printed shape has n - 1 for n, which leaves the last checkpoint out: give one checkpoint less for that.
    """
    edges = (torch.arange(len(deltas) + 1, dtype=torch.float64) / len(deltas)) ** power
    return lambda_ * operators.weighted_sum(deltas, edges[1:] - edges[:-1], False)
