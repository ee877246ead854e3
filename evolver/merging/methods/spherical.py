"""Methods on spheres. All but the row-wise ones need nothing of a tensor but the experts' inner products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import torch
from torch import Tensor

from evolver.merging.methods import Range, each, method, number, operators
from evolver.merging.methods.averages import Weight
from evolver.merging.methods.here import PieceView, Stack
from evolver.records.recipe import Value

# The weights of two models whose sum is smaller have no ratio.
CANCELLED = 1e-6
# Beyond the two models the arc goes on around the sphere, away from both: no merge of them lies there.
Share = Annotated[Tensor, Range(0.0, 1.0, least=0.0, most=1.0)]


@method("Shoemake 1985, Animating rotation with quaternion curves", takes=2, symmetric=False)
def slerp(models: Stack, *, here: PieceView, t: Share) -> Tensor:
    """From the first of two models (t = 0) to the second (t = 1) along the arc between them.

    Of (1, 0) and (0, 1) at t = 0.5 it is (0.7071, 0.7071). Where |cos| > 0.9995 the way is straight.
    """
    _, cosine = operators.unit(here.sum(lambda m, _: operators.gram(m)))
    first, second = operators.slerp_factors(cosine[0, 1], t, operators.nearly_parallel)
    return models[0] * first.float() + models[1] * second.float()


def _by_first_dimension(settings: Mapping[str, Value]) -> bool:
    return bool(settings["nuslerp_row_wise"]) and not settings["nuslerp_flatten"]


@method(
    "Shoemake 1985, as mergekit's NuSLERP",
    rows=True,
    takes=2,
    symmetric=False,
    slices=_by_first_dimension,
)
def nuslerp(
    models: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    task_vectors: bool = False,
) -> Tensor:
    """Spherical interpolation of two models at t = w2 / (w1 + w2): of whole tensors, or of vectors.

    Without ``nuslerp_flatten`` the vectors are those that mergekit means: along the first dimension where
    ``nuslerp_row_wise`` is set, else along the last. Where the weights cancel, t is one half.

    ``task_vectors``: of the differences to the base instead of the weights.
    """
    total = weight.sum(0)
    cancel = total.abs() < CANCELLED
    t = torch.where(cancel, 0.5, weight[1] / torch.where(cancel, 1.0, total))
    origin = here.base if task_vectors else torch.zeros_like(here.base)
    whole = nuslerp_flatten or here.vector

    def products(m: Stack, h: PieceView) -> Tensor:
        a, b = ((x - h.base if task_vectors else x).double() for x in m)
        pairs = (a * a, a * b, b * b)
        if whole:
            return torch.stack([operators.total(x) for x in pairs])
        if nuslerp_row_wise:
            return torch.stack([operators.halved(x) for x in pairs])
        return torch.stack([operators.total_of_rows(x)[:, None] for x in pairs])

    # Rows are whole within a piece; the other two kinds need a pass.
    aa, ab, bb = here.sum(products) if whole or nuslerp_row_wise else products(models, here)
    norms = (aa * bb).sqrt()
    cosine = torch.where(norms > 0, ab / torch.where(norms > 0, norms, 1.0), 1.0)
    first, second = operators.slerp_factors(cosine, t, operators.no_sine)
    return origin + (models[0] - origin) * first.float() + (models[1] - origin) * second.float()


@method(
    "Buss and Fillmore 2001, Spherical averages, as mergekit's Multi-SLERP",
    divides="normalize_weights",
)
def multislerp(
    models: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    normalize_weights: bool = True,
    task_vectors: bool = False,
) -> Tensor:
    """One step towards the weighted mean on the sphere, from the mean direction, times the mean norm.

    ``task_vectors``: of the differences to the base instead of the weights.
    """
    norms, cosine = operators.unit(
        here.sum(lambda m, h: operators.gram([x - h.base for x in m] if task_vectors else m))
    )
    w = weight / operators.divisor_of(weight, torch.float64) if normalize_weights else weight
    mean = _normalised(w, cosine)
    tangent = w - (w @ (cosine @ mean)) * mean  # Σ w (u - (u·m) m), in coordinates of the units u
    return _on_sphere(models, here, task_vectors, _step(mean, tangent, cosine), norms, (w * norms).sum())


@method("Karcher 1977, Riemannian center of mass and mollifier smoothing")
def karcher(
    models: Stack, *, here: PieceView, weight: Weight = each(1.0), max_iter: int = 10, tol: Tensor = number(1e-5)
) -> Tensor:
    """The weighted mean on the sphere, iterated until a step is shorter than ``tol``, times the mean norm.

    Of (1, 0) and (0, 1) it is (0.7071, 0.7071). mergekit has it for equal weights only.
    """
    norms, cosine = operators.unit(here.sum(lambda m, _: operators.gram(m)))
    w = weight / operators.divisor_of(weight, torch.float64)
    mean = _normalised(w, cosine)
    for _ in range(max_iter):
        towards = (cosine @ mean).clamp(-1, 1)
        angle = torch.arccos(towards)
        sine = torch.sin(angle)
        pull = torch.where(sine > operators.TINY, w * angle / torch.where(sine > operators.TINY, sine, 1.0), 0.0)
        tangent = pull - (pull @ towards) * mean
        done = _length(tangent, cosine) < tol
        mean = torch.where(done, mean, _normalised(_step(mean, tangent, cosine), cosine))
    return _on_sphere(models, here, False, mean, norms, (w * norms).sum())


@method("Jang et al. 2024, Model Stock, arXiv 2403.19522", rows=True, least=2)
def model_stock(models: Stack, *, here: PieceView, filter_wise: bool = False) -> Tensor:
    """Between the base and the average of the models, the nearer to the average the more their deltas agree.

    t = N c / (1 + (N - 1) c) with c the mean cosine of two deltas (equation 5): orthogonal deltas give the base,
    equal ones that model. ``filter_wise``: one t for every row. Needs two models. Where the deltas cancel, so that t
    has no value, it is the base.
    """
    count = len(models)

    def products(m: Stack, h: PieceView, summed: Callable[[Tensor], Tensor] = operators.total) -> Tensor:
        return operators.gram([d - h.base for d in m], summed)

    # Rows are whole within a piece.
    of_rows = products(models, here, operators.total_of_rows).movedim(-1, 0) if filter_wise else None
    by_row = here.sum(products)[None] if of_rows is None else of_rows
    norms = by_row.diagonal(dim1=1, dim2=2).sqrt()
    scale = norms[:, :, None] * norms[:, None, :]
    cosine = torch.where(scale > 0, by_row / torch.where(scale > 0, scale, 1.0), 1.0).clamp(-1, 1)
    upper = torch.triu_indices(count, count, 1)
    c = cosine[:, upper[0], upper[1]].mean(1)
    divisor = 1 + (count - 1) * c
    gone = divisor < CANCELLED  # c = -1 / (N - 1), at which the average is the base itself
    t = torch.where(gone, 0.0, count * c / torch.where(gone, 1.0, divisor)).float()[:, None]
    average = operators.weighted_sum(models, torch.ones(count, device=here.base.device), True)
    return t * average + (1 - t) * here.base


def _length(coordinates: Tensor, cosine: Tensor) -> Tensor:
    return (coordinates @ cosine @ coordinates).clamp(min=0).sqrt()


def _normalised(coordinates: Tensor, cosine: Tensor) -> Tensor:
    length = _length(coordinates, cosine)
    return coordinates / torch.where(length > 0, length, 1.0)


def _step(mean: Tensor, tangent: Tensor, cosine: Tensor) -> Tensor:
    """The exponential map on the unit sphere, in coordinates."""
    length = _length(tangent, cosine)
    still = length < operators.TINY
    return torch.where(
        still, mean, torch.cos(length) * mean + torch.sin(length) / torch.where(still, 1.0, length) * tangent
    )


def _on_sphere(
    models: Stack, here: PieceView, task_vectors: bool, mean: Tensor, norms: Tensor, radius: Tensor
) -> Tensor:
    factors = radius * mean / torch.where(norms > 0, norms, 1.0)
    if not task_vectors:
        return operators.weighted_sum(models, factors, False)
    return here.base + operators.weighted_sum([m - here.base for m in models], factors, False)
