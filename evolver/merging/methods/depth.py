"""Methods about layers: copy them, or scale a merge by how deep they lie."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from evolver.merging.methods import Range, each, method, number
from evolver.merging.methods.averages import Weight
from evolver.merging.methods.here import PieceView, Stack
from evolver.merging.methods.operators import total, total_of, weighted_sum


@method("mergekit 2023, passthrough", takes=1, symmetric=False)
def passthrough(models: Stack, *, scale: Annotated[Tensor, Range(0.5, 1.5)] = number(1.0)) -> Tensor:
    """One model as it is, times ``scale``."""
    return models[0] * scale


@method("Wang et al. 2024, LiNeS: Layer scaling prevents forgetting, arXiv 2410.17146")
def lines(
    deltas: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    alpha: Annotated[Tensor, Range(0.0, 1.5)] = number(1.0),
    beta: Annotated[Tensor, Range(-0.5, 2.0)] = number(0.0),
    match: Literal["none", "l1"] = "none",
) -> Tensor:
    """Σ w·τ, scaled by α + β·l/(L - 1) in layer l of L and by α outside the layers (equation 3).

    Over a single input, which may be a merge by any method, it is that method with LiNeS: at α = 1, β = 0 the same.
    With ``match: l1`` all is also multiplied by f = ‖Σ τ‖₁ ÷ (E · ‖Σ w·τ‖₁), measured over the whole model, so that at
    α = 1, β = 0 the merge has the L1 norm of the plain average of E experts. The paper's numbers for merging many tasks
    are α = f and its own β on Σ w·τ, which is α = 1 and β ÷ f here.
    """
    scale = alpha if here.depth is None else alpha + beta * here.depth
    if match == "l1":

        def lengths(d: Stack, _: PieceView) -> Tensor:
            return torch.stack([total(x.abs()) for x in (total_of(d), weighted_sum(d, weight, False))])

        plain, ours = here.sum(lengths, "global", [weight])
        scale = scale * torch.where(ours > 0, plain / (len(deltas) * torch.where(ours > 0, ours, 1.0)), 1.0)
    return scale * weighted_sum(deltas, weight, False)
