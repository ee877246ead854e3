"""Methods that fit the merged layer to what the layers of the models do, in closed form."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from evolver.merging.methods import Of, Range, method, number
from evolver.merging.methods.averages import simple
from evolver.merging.methods.here import Stack

# What is added to the diagonal of the summed Grams, as a share of its mean; tenfold as long as they stay singular.
RIDGE, TRIES = 1e-6, 7


@method("Jin et al. 2022, Dataless knowledge fusion by merging weights of language models", whole=True, exact=False)
def regmean(
    models: Stack,
    *,
    gram: Annotated[Stack | None, Of("gram")],
    a: Annotated[Tensor, Range(0.0, 1.0, least=0.0, most=1.0)] = number(0.9),
) -> Tensor:
    """RegMean: the linear layer whose outputs are nearest to those of the models' layers on their own inputs X.

    W = (Σ G)⁻¹ Σ G W with G = XᵀX, entries off the diagonal times ``a``: at a = 0 it is an average with weights for
    every input of the layer. Tensors of other layers are averaged. Where Σ G is singular, a ridge of 1e-6 of its mean
    diagonal makes the average of what the inputs do not determine.
    """
    average = simple(models)
    if gram is None:
        return average
    grams = [_damped(g.to(average.device).double(), a) for g in gram]
    # Of the differences to the average, which a ridge draws to zero; W is (outputs, inputs), and G is symmetric.
    right = sum((g @ (m.double() - average.double()).T for g, m in zip(grams, models, strict=True)), torch.zeros(()))
    return average + torch.cholesky_solve(right, _factor(sum(grams, torch.zeros(())))).T.float()


def _damped(gram: Tensor, a: Tensor) -> Tensor:
    """The Gram (d, d) with what is off its diagonal times ``a``."""
    return torch.diag(gram.diagonal()) + a * (gram - torch.diag(gram.diagonal()))


def _factor(total: Tensor) -> Tensor:
    """The Cholesky factor of a positive semi-definite matrix (d, d), with as much of a ridge as it needs.

    Raises FloatingPointError where the matrix is not finite, or is no sum of Grams.
    """
    mean, one = total.diagonal().mean(), torch.eye(len(total), dtype=total.dtype, device=total.device)
    ridge = RIDGE * torch.where(mean > 0, mean, 1.0)
    factor: Tensor
    for _ in range(TRIES):
        factor, failed = torch.linalg.cholesky_ex(total + ridge * one)
        if not failed:
            return factor
        ridge = 10 * ridge
    raise FloatingPointError("the statistics of the experts are not Gram matrices")
