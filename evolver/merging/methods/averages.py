"""Averages of weights and of task vectors."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from evolver.merging.methods import Range, Simplex, method
from evolver.merging.operators import weighted_sum

Weight = Annotated[tuple[float, ...], Simplex()]
Mass = Annotated[float, Range(0.2, 3.0, log=True)]


@method("Wortsman et al. 2022, Model soups", elementwise=True)
def simple(models: Tensor) -> Tensor:
    """The plain average of the models."""
    return models.mean(0)


@method("Wortsman et al. 2022, Model soups", elementwise=True)
def linear(models: Tensor, *, weight: Weight = (1.0,), normalize: bool = True) -> Tensor:
    """Σ w·θ, divided by Σ w where ``normalize`` is set."""
    return weighted_sum(models, weight, normalize)


@method("Ilharco et al. 2023, Editing models with task arithmetic", elementwise=True)
def task_arithmetic(deltas: Tensor, *, weight: Weight = (1.0,), lambda_: Mass = 1.0, normalize: bool = False) -> Tensor:
    """λ Σ w·τ. With weights that sum to 1, λ is the total mass of the task vectors."""
    return lambda_ * weighted_sum(deltas, weight, normalize)
