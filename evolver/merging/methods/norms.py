"""Weights from how far each expert moved a tensor, and from how deep the tensor lies."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from evolver.merging.methods import Range, Simplex, each, method, number, operators
from evolver.merging.methods.averages import Mass, Weight
from evolver.merging.methods.here import PieceView, Stack


@method("Wei and Chen 2025, Training-free reasoning and reflection in MLLMs (FRANK), arXiv 2505.16151")
def frank(
    deltas: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    exponent: Annotated[Tensor, Range(-1.0, 2.0)] = number(2.0),
    fading: Annotated[Tensor, Simplex()] = each(0.0),
    alpha: Annotated[Tensor, Range(0.0, 10.0, least=0.0)] = number(3.0),
    floor: Annotated[Tensor, Range(0.0, 0.5, least=0.0, most=1.0)] = number(0.0),
    normalise: Literal["max", "mean"] = "max",
    lambda_: Mass = number(1.0),
) -> Tensor:
    """λ Σ λ_i·τ_i in every tensor, with λ_i ∝ w_i · ‖τ_i‖ᵉ · (prior of the depth), which sum to 1 in each.

    e = ``exponent``: 2 is FRANK, and without a prior it is MetaGPT tensor by tensor; 0 is the average with the weights;
    -1 makes all experts move the tensor equally far (the norm equalisation of DOGE-TA).

    An expert with ``fading: 1`` loses share from the first layer to the last: its prior is that of equal experts times
    g(d) = floor + (1 - floor)·exp(-α·d), d from 0 to 1 being the depth, and the others get what it loses in equal
    parts. With ``normalise: mean`` g is divided by its mean over the depth, so that its share is the usual one in the
    whole, not in the first layer. Outside the layers there is no prior. α is the paper's slope for a layer times the
    number of layers less one.

    Readings: norms are those of a tensor, not of a layer; any number of experts can fade; and the paper's prior, which
    sums to 1 over the layers of the model, is not offered, as the expert would nearly vanish everywhere.
    """
    squares = here.sum(lambda d, _: torch.stack([operators.total(x.double().square()) for x in d]))
    norms = squares.sqrt()
    relative = norms / torch.where(norms.amax() > 0, norms.amax(), 1.0)
    # An expert that did not move adds nothing, whatever its weight; 0 to the power of 0 is 1.
    size = torch.where((relative > 0) | (exponent >= 0), relative**exponent, 0.0)
    prior = torch.ones_like(norms)
    if here.depth is not None:
        prior = _prior(fading, _profile(here.depth, alpha, floor, normalise))
    raw = weight * prior * size
    total = raw.sum(0)
    return lambda_ * operators.weighted_sum(deltas, raw / torch.where(total > 0, total, 1.0), False)


def _profile(depth: Tensor, alpha: Tensor, floor: Tensor, normalise: str) -> Tensor:
    """What a fading expert has left at a depth, relative to its usual share, ()."""
    if normalise == "max":
        return floor + (1 - floor) * torch.exp(-alpha * depth)
    mean = torch.where(alpha > 0, -torch.expm1(-alpha) / torch.where(alpha > 0, alpha, 1.0), 1.0)
    return (floor + (1 - floor) * torch.exp(-alpha * depth)) / (floor + (1 - floor) * mean)


def _prior(fading: Tensor, profile: Tensor) -> Tensor:
    """Shares relative to those of equal experts, (E): what fading experts lose goes to the others."""
    lost, others = fading * (1 - profile), 1 - fading
    total = others.sum(0)
    gained = lost.sum(0) * others / torch.where(total > 0, total, 1.0)
    return (1 - lost + gained).clamp(min=0)
