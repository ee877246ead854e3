"""Methods that ask, scalar by scalar, which experts matter."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from evolver.merging import operators
from evolver.merging.here import Here
from evolver.merging.methods import Range, each, method, number
from evolver.merging.methods.averages import Mass, Weight

Small = Annotated[Tensor, Range(1e-7, 1e-3, log=True, least=0.0)]
Top = Annotated[Tensor, Range(0.05, 1.0, above=0.0, most=1.0)]


@method("Wan et al. 2024, FuseChat (SCE)")
def sce(deltas: Tensor, *, here: Here, select_topk: Top = number(1.0)) -> Tensor:
    """Select the scalars on which the experts differ most, weigh experts by their energy there, erase minority signs.

    Of the scalars with any variance the ``select_topk`` with the most stay; where nothing has variance, all do.
    """
    if deltas.shape[0] == 1:
        return deltas[0]
    varied = here.sum(lambda d, _: (_variance(d) > 0).sum())

    def rank(size: int) -> list[list[int]]:
        everything = float(select_topk) >= 1 or not varied
        return [[size if everything else max(1, int(int(varied) * float(select_topk)))]]

    cut = here.kth_largest(lambda d, _: _variance(d)[None], rank)[0, 0]

    def selected(d: Tensor) -> Tensor:
        return torch.where(_variance(d) >= cut, d, 0.0)

    energy = here.sum(lambda d, _: selected(d).square().sum(1, dtype=torch.float64))
    total = energy.sum()
    weight = torch.where(total > 0, energy / torch.where(total > 0, total, 1.0), 1 / deltas.shape[0])
    kept = selected(deltas)
    return operators.disjoint_sum(kept, weight, kept, operators.elected_sign(kept, "mass"), True)


@method("Yuan et al. 2025, Reinforced agent merging (RAM)")
def ram(deltas: Tensor, *, epsilon: Small = number(1e-5)) -> Tensor:
    """Scalars that one expert moved by more than ε keep its full delta; where several moved, the average of theirs."""
    return _ram(deltas, epsilon, torch.ones(deltas.shape[0], device=deltas.device))


@method("Yuan et al. 2025, Reinforced agent merging (RAM+)")
def ramplus_tl(
    deltas: Tensor,
    *,
    here: Here,
    epsilon: Small = number(1e-5),
    r: Annotated[Tensor, Range(0.0, 1.0)] = number(0.1),
    alpha: Annotated[Tensor, Range(0.0, 2.0)] = number(0.2),
) -> Tensor:
    """As ``ram``; what one expert alone moved is enlarged by 1 + r·clip(shared ÷ unique, 0, α), counted per tensor."""

    def counts(d: Tensor, _: Here) -> Tensor:
        active = d.abs() > epsilon
        alone = active.sum(0) == 1
        return torch.stack([(active & ~alone).sum(1), (active & alone).sum(1)])

    shared, unique = here.sum(counts)
    ratio = torch.where(unique > 0, shared / torch.where(unique > 0, unique, 1.0), 0.0)
    return _ram(deltas, epsilon, 1 + r * torch.minimum(ratio.clamp(min=0), alpha.to(ratio)))


@method("Wang et al. 2024, Localizing task information (TALL masks, Consensus)")
def consensus(
    deltas: Tensor,
    *,
    weight: Weight = each(1.0),
    lambda_: Mass = number(1.0),
    tall: Annotated[Tensor, Range(0.1, 1.0, least=0.0)] = number(0.4),
    agree: int = 2,
) -> Tensor:
    """λ Σ w·τ on the scalars that matter to at least ``agree`` experts.

    A scalar matters to an expert where |τ| > tall · |Σ w·τ - τ| (equations 4 and 6). ``agree: 0`` is task arithmetic.
    """
    merged = operators.weighted_sum(deltas, weight, False)
    votes = torch.zeros_like(merged)
    for e in range(deltas.shape[0]):
        votes = votes + (deltas[e].abs() > tall * (merged - deltas[e]).abs()).float()
    return lambda_ * torch.where(votes >= agree, merged, 0.0)


@method("He et al. 2024, Localize-and-Stitch (dataless form)")
def localize_and_stitch(
    deltas: Tensor, *, here: Here, density: Top = number(0.1), scope: Literal["global", "tensor"] = "global"
) -> Tensor:
    """Keep the largest ``density`` of each task vector, over the whole model; average where several keep a scalar."""

    def ranks(size: int) -> list[list[int]]:
        return [[max(1, int(float(density) * size))]] * deltas.shape[0]

    cut = here.kth_largest(lambda d, _: d.abs(), ranks, scope)[:, 0]
    kept, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for e in range(deltas.shape[0]):
        mask = deltas[e].abs() >= cut[e]
        kept = kept + torch.where(mask, deltas[e], 0.0)
        count = count + mask.float()
    return kept / count.clamp(min=1)


@method("Du et al. 2024, Parameter competition balancing (PCB-Merging)")
def pcb(
    deltas: Tensor,
    *,
    here: Here,
    weight: Weight = each(1.0),
    density: Top = number(0.1),
    lambda_: Annotated[Tensor, Range(0.5, 2.2)] = number(1.2),
    inter: Literal["pairs", "sum"] = "pairs",
) -> Tensor:
    """Weigh every scalar by how much it stands out in its expert and how well the experts agree on it.

    β = exp(E·τ²/max τ²) · Σ_j tanh(n_i n_j) with n = τ/max|τ| (``inter: sum``: tanh(τ_i Σ τ)); the largest ``density``
    of β stay, scaled to [0, 1]; then λ Σ β̂·w·τ / Σ β̂. Maxima and shares are those of each tensor.
    """
    largest = here.maximum(lambda d, _: d.reshape(d.shape[0], -1).abs().amax(1)).float()

    def balance(d: Tensor) -> Tensor:
        unit = d.double() / torch.where(largest > 0, largest, 1.0)[:, None]
        sums = torch.tanh(d.double() * d.double().sum(0)) if inter == "sum" else torch.zeros_like(unit)
        if inter == "pairs":
            for e in range(d.shape[0]):
                sums = sums + torch.tanh(unit * unit[e])
        return (torch.exp(d.shape[0] * unit.square()) * sums).clamp(min=0).float()  # exp differs in float32's last bit

    def ranks(size: int) -> list[list[int]]:
        return [[1, max(1, int(float(density) * size))]] * deltas.shape[0]

    top, cut = here.kth_largest(lambda d, _: balance(d), ranks).T
    beta = balance(deltas)
    span = torch.where(top > cut, top - cut, 1.0)[:, None]
    scaled = torch.where(top[:, None] > cut[:, None], (beta - cut[:, None]) / span, 1.0)
    score = torch.where((beta >= cut[:, None]) & (beta > 0), scaled, 0.0)
    total = score.sum(0)
    merged = (score * deltas * operators.per_expert(weight, deltas)).sum(0)
    return lambda_ * merged / torch.where(total > 0, total, 1.0)


@method("Huang et al. 2024, EMR-Merging (its elected vector)")
def emr_max(deltas: Tensor, *, lambda_: Annotated[Tensor, Range(0.1, 1.0)] = number(1.0)) -> Tensor:
    """λ times, scalar by scalar, the largest delta of those with the sign of the sum: of 3, 1 and -2 it is 3."""
    sign = operators.elected_sign(deltas, "mass")
    best = torch.zeros_like(sign)
    for e in range(deltas.shape[0]):
        best = torch.maximum(best, deltas[e] * sign)
    return lambda_ * sign * best


@method("Yu et al. 2024, Extend model merging to pre-trained models (WIDEN)", rows=True)
def widen(
    models: Tensor,
    *,
    here: Here,
    ratio: Annotated[Tensor, Range(0.5, 1.5, least=0.0)] = number(1.0),
    calibration: Annotated[Tensor, Range(0.3, 1.2)] = number(1.0),
    lambda_: Mass = number(1.0),
) -> Tensor:
    """Weigh every column of an expert by how far its magnitude and its direction moved, ranked within the expert.

    Softmax over the experts of the ranks; where a rank exceeds ``ratio`` times the expert's mean rank, the score is
    ``calibration``. Vectors are weighed scalar by scalar, by |τ|.
    """
    magnitude, direction = _moved(here)
    score = (_importance(magnitude, ratio, calibration) + _importance(direction, ratio, calibration)) / 2
    deltas = models - here.base
    return here.base + lambda_ * (score.float()[:, None, :] * deltas).sum(0)


def _columns(models: Tensor, here: Here) -> Tensor:
    """Squares of every expert's columns, their products with the base's, and the base's squares: (2E + 1, columns)."""
    wide, base = models.double(), here.base.double()
    return torch.cat([wide.square().sum(1), (wide * base).sum(1), base.square().sum(0)[None]])


def _moved(here: Here) -> tuple[Tensor, Tensor]:
    """How far the columns moved in magnitude and in direction, (E, columns) each."""
    count = here.stack.shape[0]
    if here.vector:
        moved = (here.stack - here.base).abs()[:, 0].double()
        return moved, moved
    sums = here.sum(_columns)
    norms, base = sums[:count].sqrt(), sums[-1].sqrt()
    scale = norms * base
    cosine = torch.where(scale > 0, sums[count : 2 * count] / torch.where(scale > 0, scale, 1.0), 1.0)
    return (norms - base).abs(), 1 - cosine


def _importance(moved: Tensor, ratio: Tensor, calibration: Tensor) -> Tensor:
    rank = moved.argsort(dim=1).argsort(dim=1) / moved.shape[1]
    score = torch.softmax(rank, dim=0)
    return torch.where(rank > ratio * rank.mean(1, keepdim=True), calibration, score)


def _ram(deltas: Tensor, epsilon: Tensor, enlarged: Tensor) -> Tensor:
    total, alone, count = (torch.zeros_like(deltas[0]) for _ in range(3))
    for e in range(deltas.shape[0]):
        active = deltas[e].abs() > epsilon
        moved = torch.where(active, deltas[e], 0.0)
        total, alone, count = total + moved, alone + moved * enlarged[e].to(deltas.dtype), count + active.float()
    return torch.where(count > 1, total / count.clamp(min=1), alone)


def _variance(deltas: Tensor) -> Tensor:
    mean = deltas[0]
    for e in range(1, deltas.shape[0]):
        mean = mean + deltas[e]
    mean = mean / deltas.shape[0]
    squares = torch.zeros_like(mean)
    for e in range(deltas.shape[0]):
        squares = squares + (deltas[e] - mean).square()
    return squares / (deltas.shape[0] - 1)
