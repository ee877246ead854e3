"""Methods that keep what the base uses: where its inputs are large, or its weights important."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from evolver.merging.methods import Of, Range, each, method, number
from evolver.merging.methods.averages import Mass, Weight
from evolver.merging.methods.curvature import smallest_kept
from evolver.merging.methods.here import Stack
from evolver.merging.methods.operators import kept_sum, total_of, weighted_sum


@method(
    "Nobari et al. 2025, Activation-informed merging of large language models, arXiv 2502.02421",
    whole=True, exact=False, identity={"omega": 1.0},
)  # fmt: skip
def aim(
    deltas: Stack,
    *,
    activation: Annotated[Stack | None, Of("activation", base=True)],
    weight: Weight = each(1.0),
    lambda_: Mass = number(1.0),
    omega: Annotated[Tensor, Range(0.0, 1.0, least=0.0, most=1.0)] = number(0.4),
    power: Annotated[Tensor, Range(0.25, 4.0, log=True, above=0.0)] = number(1.0),
) -> Tensor:
    """AIM: λ Σ w·τ with every column c of a linear layer times 1 - a(1 - ω), a being how much the base uses input c.

    a is the mean |x| of the base's input c, by the largest of its layer, to ``power`` (1 in the paper). At ω = 1 it is
    task arithmetic; over a single input, which may be a merge by any method, it is that method with AIM. Tensors that
    are no weights of a linear layer are scaled by nothing.
    """
    merged = lambda_ * weighted_sum(deltas, weight, False)
    if activation is None:
        return merged
    mean = total_of([a.to(merged.device).double() for a in activation]) / len(activation)
    used = (mean / mean.amax().clamp(min=1e-30)).pow(power.to(mean.device))
    return merged * (1 - used * (1 - omega)).float()


@method(
    "Ma et al. 2025, LED-Merging: mitigating safety-utility conflicts in model merging, arXiv 2502.16770",
    whole=True, exact=False, identity={"density": 1.0},
)  # fmt: skip
def led(
    deltas: Stack,
    *,
    importance: Annotated[Stack | None, Of("importance")],
    of_base: Annotated[Stack | None, Of("importance", base=True)],
    weight: Weight = each(1.0),
    lambda_: Annotated[Tensor, Range(0.3, 12.0, log=True)] = number(1.0),
    density: Annotated[Tensor, Range(0.02, 0.7, above=0.0, most=1.0)] = each(0.4),
    disjoint: Literal["drop", "keep"] = "drop",
) -> Tensor:
    """LED: λ Σ w·m·τ with masks m of what is important to an expert and to the base on the expert's own items.

    Locate: the ``density`` largest |θ·∂L/∂θ| of the expert and of the base in this tensor. Elect: those in both.
    Disjoint: what several experts elected belongs to none of them (``keep``: to all). Weights of 1 are the paper's.
    Without statistics of gradients: λ Σ w·τ.
    """
    if importance is None or of_base is None:
        return lambda_ * weighted_sum(deltas, weight, False)
    pairs = zip(importance, of_base, density.tolist(), strict=True)
    masks = [(_located(own, share) & _located(old, share)).to(deltas[0].device) for own, old, share in pairs]
    if disjoint == "drop":
        claimed, several = torch.zeros_like(masks[0]), torch.zeros_like(masks[0])
        for mask in masks:
            several |= claimed & mask
            claimed |= mask
        masks = [mask & ~several for mask in masks]
    return lambda_ * kept_sum(deltas, weight, masks, False)


def _located(scores: Tensor, share: float) -> Tensor:
    """Which scalars are among the largest, bool; ones that equal the smallest of them are."""
    return scores >= smallest_kept(scores, share)
