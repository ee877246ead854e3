"""Averages of weights and of task vectors."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from evolver.merging.methods import Range, Simplex, each, method, number
from evolver.merging.methods.here import Stack
from evolver.merging.methods.operators import total_of, weighted_sum

Weight = Annotated[Tensor, Simplex()]
Mass = Annotated[Tensor, Range(0.2, 3.0, log=True)]
# Of methods whose papers scale the sum of the task vectors: with weights that sum to 1 it is N times their scale.
SumMass = Annotated[Tensor, Range(0.3, 12.0, log=True)]


@method("Wortsman et al. 2022, Model soups, arXiv 2203.05482")
def simple(models: Stack) -> Tensor:
    """The plain average of the models: of 1 and 3 it is 2."""
    return total_of(models) / len(models)


@method("Wortsman et al. 2022, Model soups, arXiv 2203.05482", divides="normalize")
def linear(models: Stack, *, weight: Weight = each(1.0), normalize: bool = True) -> Tensor:
    """Σ w·θ, divided by Σ w where ``normalize`` is set: of 1 and 3 with weights 3 and 1 it is 6/4 = 1.5."""
    return weighted_sum(models, weight, normalize)


@method("Ilharco et al. 2023, Editing models with task arithmetic, arXiv 2212.04089", divides="normalize")
def task_arithmetic(
    deltas: Stack, *, weight: Weight = each(1.0), lambda_: Mass = number(1.0), normalize: bool = False
) -> Tensor:
    """λ Σ w·τ: of deltas 1 and 3 with weights 0.5 and λ = 0.5 it is 1.

    With weights that sum to 1, λ is the total mass of the task vectors.
    """
    return lambda_ * weighted_sum(deltas, weight, normalize)
