"""Averages whose weights follow from a number that was measured for every expert, such as its loss or its score."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from evolver.merging.methods import Measured, Range, method, number, operators
from evolver.merging.methods.averages import Mass
from evolver.merging.methods.here import Stack

Kind = Literal["loss", "score"]


@method(
    "Yu and Choi 2025, Parameter-efficient checkpoint merging via metrics-weighted averaging (MWA), arXiv 2504.18580"
)
def mwa(
    deltas: Stack,
    *,
    measured: Annotated[Tensor, Measured(above=0.0)],
    kind: Kind = "loss",
    power: Annotated[Tensor, Range(0.1, 20.0, log=True, least=0.0)] = number(1.0),
    lambda_: Mass = number(1.0),
) -> Tensor:
    """λ Σ w·τ with weights that are powers of what was ``measured``: w ∝ loss⁻ᵖ, or scoreᵖ with ``kind: score``.

    The weights sum to 1, so at λ = 1 it is an average of the models; at p = 0 the plain one. A score is any number that
    grows as models get better, such as an accuracy, or the step of a checkpoint. The exact formula of the paper could
    not be read; this is a reconstruction.
    """
    sign = -1.0 if kind == "loss" else 1.0
    return lambda_ * operators.weighted_sum(deltas, torch.softmax(sign * power * measured.log(), dim=0), False)


@method("Xiao et al. 2023, LM-Cocktail: Resilient tuning of language models via model merging, arXiv 2311.13534")
def lm_cocktail(
    deltas: Stack,
    *,
    measured: Annotated[Tensor, Measured()],
    kind: Kind = "loss",
    temperature: Annotated[Tensor, Range(0.05, 20.0, log=True, above=0.0)] = number(5.0),
    lambda_: Mass = number(1.0),
) -> Tensor:
    """λ Σ w·τ with w = softmax(-loss / T), or softmax(score / T) with ``kind: score``.

    The losses are the experts' mean losses on a few examples of the task that the merge is for. The weights sum to 1
    whatever the losses are; the larger T, the nearer they are to equal. The paper's second step, α·(target model) +
    (1 - α)·(this average), is λ = 1 - α where the target is the base.
    """
    sign = -1.0 if kind == "loss" else 1.0
    return lambda_ * operators.weighted_sum(deltas, torch.softmax(sign * measured / temperature, dim=0), False)
