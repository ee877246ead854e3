"""Methods that fit the merged layer to what the layers of the models do, in closed form."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from evolver.merging.methods import Of, Range, each, method, number
from evolver.merging.methods.averages import Mass, Weight, simple
from evolver.merging.methods.here import Stack
from evolver.merging.methods.operators import total_of, weighted_sum

# How often a ridge is made tenfold where a sum of Grams stays singular.
TRIES = 7
SINGULAR = (
    "Gram matrices of a layer are singular, as those of few items are, so a larger ridge than the given one draws what "
    "they do not determine to the average; a larger statistics.items or ridge ends this."
)
Grams = Annotated[Stack | None, Of("gram")]
MergedGrams = Annotated[Stack | None, Of("gram", merged="regmean")]
OffDiagonal = Annotated[Tensor, Range(0.0, 1.0, least=0.0, most=1.0)]
Ridge = Annotated[Tensor, Range(1e-6, 1e-1, log=True, above=0.0)]


@method(
    "Jin et al. 2022, Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849",
    whole=True,
    exact=False,
)
def regmean(
    models: Stack, *, gram: Grams, a: OffDiagonal = number(0.9), ridge: Ridge = number(1e-6)
) -> Tensor:  # fmt: skip
    """RegMean: the linear layer whose outputs are nearest to those of the models' layers on their own inputs X.

    W = (Σ G)⁻¹ Σ G W with G = XᵀX, entries off the diagonal times ``a``: at a = 0 it is an average with weights for
    every input of the layer. Tensors of other layers are averaged. A ridge, a share of the mean of the diagonal of Σ G,
    draws what the inputs do not determine to the average; it grows tenfold as long as Σ G stays singular.
    """
    average = simple(models)
    if gram is None:
        return average
    return _nearest(models, [_damped(g, a) for g in gram], average, ridge)


@method("Nguyen et al. 2025, RegMean++, arXiv 2508.03121", whole=True, exact=False)
def regmean_plus_plus(
    models: Stack, *, gram: MergedGrams, a: OffDiagonal = number(0.9), ridge: Ridge = number(1e-6)
) -> Tensor:  # fmt: skip
    """RegMean++: RegMean in which the inputs X of every layer are those that it gets in the merged model.

    W = (Σ G)⁻¹ Σ G W with G = XᵀX, X on each expert's items through the merged layers before it. The paper merges block
    by block while it goes, and reads each block's inputs in the expert's own block. Here the Grams are those of whole
    models: of the RegMean merge at its defaults, so that they are collected once for all values of ``a``; with
    ``statistics: {passes: N}``, of the merge that the Grams of the pass before give. Each pass puts one more linear
    layer of the chain on the inputs that it has in the merged model.
    """
    return regmean(models, gram=gram, a=a, ridge=ridge)


@method("Bayesian model merging, 2026, arXiv 2605.12843", whole=True, exact=False)
def bayes_mm(
    deltas: Stack,
    *,
    gram: Grams,
    weight: Weight = each(1.0),
    lambda_: Mass = number(1.0),
    mu: Annotated[Tensor, Range(1e-3, 1e3, log=True, above=0.0)] = number(1.0),
    a: OffDiagonal = number(1.0),
) -> Tensor:
    """Bayesian model merging: RegMean with the prior that the merged layer lies near an anchor A = Σ w·τ / Σ w.

    λ (Σ τ·G + μ̄·A)(Σ G + μ̄·I)⁻¹ with μ̄ = μ times the mean of the diagonal of Σ G: for μ → ∞ it is the anchor, which
    all tensors without a Gram get, and for μ → 0 RegMean. λ is the paper's scale of a module. The reading is that of
    the abstract: the closed form belongs to an isotropic prior; the outer optimisation is the search.
    """
    anchor = weighted_sum(deltas, weight, True)
    return lambda_ * (anchor if gram is None else _nearest(deltas, [_damped(g, a) for g in gram], anchor, mu))


@method("Bayesian model merging, 2026, its variant without data, arXiv 2605.12843", whole=True, exact=False)
def bayes_mm_free(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: Mass = number(1.0),
    mu: Annotated[Tensor, Range(1e-3, 1e3, log=True, above=0.0)] = number(1.0),
    a: OffDiagonal = number(1.0),
) -> Tensor:
    """``bayes_mm`` without data: the task vectors (outputs, inputs) give the Grams, G = τᵀτ.

    The paper says that inputs and task vectors align; their scale is a reading, and only its ratio between experts
    counts here. Tensors that are no matrices get the anchor.
    """
    anchor = weighted_sum(deltas, weight, True)
    if anchor.dim() != 2:
        return lambda_ * anchor
    return lambda_ * _nearest(deltas, [_damped(d.double().T @ d.double(), a) for d in deltas], anchor, mu)


def _nearest(models: Stack, grams: Sequence[Tensor], anchor: Tensor, ridge: Tensor) -> Tensor:
    """(Σ W·G + r·A)(Σ G + r·I)⁻¹, r being ``ridge`` times the mean of the diagonal of Σ G; (outputs, inputs) float32.

    Args:
        models: W (outputs, inputs), of E models.
        grams: G (inputs, inputs) float64, symmetric, of E models.
        anchor: A (outputs, inputs), what the ridge draws to.
    """
    # Of the differences to the anchor, which a ridge draws to zero; W is (outputs, inputs).
    away = (g @ (m.double() - anchor.double()).T for g, m in zip(grams, models, strict=True))
    right = sum(away, torch.zeros((), dtype=torch.float64, device=anchor.device))
    return anchor + torch.cholesky_solve(right, _factor(total_of(grams), ridge)).T.float()


def _damped(gram: Tensor, a: Tensor) -> Tensor:
    """AG + (1 - a) diag G, (d, d) float64."""
    wide = gram.double()
    return torch.diag(wide.diagonal()) + a * (wide - torch.diag(wide.diagonal()))


def _factor(total: Tensor, share: Tensor) -> Tensor:
    """The Cholesky factor of a positive semi-definite matrix (d, d), with a ridge, or as much of one as it needs.

    Warns where that is more than it was given. The text names no tensor, so that a search says it once.

    Raises FloatingPointError where the matrix is not finite, or is no sum of Grams.
    """
    mean, one = total.diagonal().mean(), torch.eye(len(total), dtype=total.dtype, device=total.device)
    ridge = share * torch.where(mean > 0, mean, 1.0)
    factor: Tensor
    for tried in range(TRIES):
        factor, failed = torch.linalg.cholesky_ex(total + ridge * one)
        if not failed:
            if tried:
                warnings.warn(SINGULAR, stacklevel=2)
            return factor
        ridge = 10 * ridge
    raise FloatingPointError("the statistics of the experts are not Gram matrices")
