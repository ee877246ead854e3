"""Methods that thin task vectors out before they are combined."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from evolver.merging import operators
from evolver.merging.methods import Range, method
from evolver.merging.methods.averages import Mass, Weight

Density = Annotated[float, Range(0.05, 1.0)]


@method("Yadav et al. 2023, TIES-Merging")
def ties(
    deltas: Tensor, *, weight: Weight = (1.0,), density: Density = 1.0, lambda_: Mass = 1.0, normalize: bool = True
) -> Tensor:
    """Trim each task vector (per tensor), elect a sign by mass, merge what agrees."""
    return lambda_ * operators.disjoint_merge(operators.trim(deltas, density), weight, normalize)


@method("Yu et al. 2024, Language models are super Mario (DARE)")
def dare_ties(
    deltas: Tensor,
    *,
    tensor: str,
    weight: Weight = (1.0,),
    density: Density = 1.0,
    lambda_: Mass = 1.0,
    normalize: bool = False,
    rescale: Literal["l1", "inv_p", "none"] = "l1",
    seed: int = 0,
) -> Tensor:
    """Drop at random and rescale, then as TIES.

    ``rescale: l1`` restores each task vector's L1 norm per tensor, as mergekit does; ``inv_p`` divides by the density,
    as the paper does.
    """
    kept = operators.drop(deltas, density, seed, tensor)
    kept = operators.rescale(kept, deltas, rescale, density)
    return lambda_ * operators.disjoint_merge(kept, weight, normalize)
