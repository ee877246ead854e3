"""Methods that ask, scalar by scalar, which experts matter."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from evolver.merging.methods import Range, each, method, number, operators
from evolver.merging.methods.averages import Mass, Weight
from evolver.merging.methods.here import PieceView, Stack

Small = Annotated[Tensor, Range(1e-7, 1e-3, log=True, least=0.0)]
Top = Annotated[Tensor, Range(0.05, 1.0, above=0.0, most=1.0)]


@method("Wan et al. 2024, FuseChat (SCE), arXiv 2408.07990")
def sce(deltas: Stack, *, here: PieceView, select_topk: Top = number(1.0), mask_delta: bool = True) -> Tensor:
    """Select the scalars on which the experts differ most, weigh experts by their energy there, erase minority signs.

    Of the scalars with any variance the ``select_topk`` with the most stay; where nothing has variance, all do. With
    ``mask_delta: false`` the others are merged, too, and the selection only decides about the weights, as in the
    authors' code; mergekit's leaves them out.
    """
    if len(deltas) == 1:
        return deltas[0]
    varied = here.sum(lambda d, _: operators.total((_variance(d) > 0).float()))

    def rank(size: int) -> list[list[int]]:
        everything = float(select_topk) >= 1 or not varied
        return [[size if everything else max(1, int(int(varied) * float(select_topk)))]]

    cut = here.kth_largest(lambda d, _: [_variance(d)], rank)[0, 0]

    def selected(d: Stack) -> list[Tensor]:
        chosen = _variance(d) >= cut
        return [torch.where(chosen, x, 0.0) for x in d]

    energy = here.sum(lambda d, _: torch.stack([operators.total(x.square()) for x in selected(d)]))
    total = energy.sum()
    weight = torch.where(total > 0, energy / torch.where(total > 0, total, 1.0), 1 / len(deltas))
    kept = selected(deltas) if mask_delta else deltas
    return operators.disjoint_sum(kept, weight, kept, operators.elected_sign(kept, "mass"), True)


@method("Yuan et al. 2026, Reinforced agent merging (RAM), arXiv 2601.13572", identity={"epsilon": 0.0})
def ram(deltas: Stack, *, epsilon: Small = number(1e-5)) -> Tensor:
    """Scalars that one expert moved by more than ε keep its full delta; where several moved, the average of theirs."""
    return _ram(deltas, epsilon, torch.ones(len(deltas), device=deltas[0].device))


@method("Yuan et al. 2026, Reinforced agent merging (RAM+), arXiv 2601.13572", identity={"epsilon": 0.0, "r": 0.0})
def ramplus_tl(
    deltas: Stack,
    *,
    here: PieceView,
    epsilon: Small = number(1e-5),
    r: Annotated[Tensor, Range(0.0, 1.0)] = number(0.1),
    alpha: Annotated[Tensor, Range(0.0, 2.0)] = number(0.2),
) -> Tensor:
    """As ``ram``; what one expert alone moved is enlarged by 1 + r·clip(shared ÷ unique, 0, α), counted per tensor."""

    def counts(d: Stack, _: PieceView) -> Tensor:
        active = [x.abs() > epsilon for x in d]
        alone = operators.total_of([a.int() for a in active]) == 1
        shared = torch.stack([operators.total((a & ~alone).float()) for a in active])
        return torch.stack([shared, torch.stack([operators.total((a & alone).float()) for a in active])])

    shared, unique = here.sum(counts)
    ratio = torch.where(unique > 0, shared / torch.where(unique > 0, unique, 1.0), 0.0)
    return _ram(deltas, epsilon, 1 + r * torch.minimum(ratio.clamp(min=0), alpha.to(ratio)))


@method(
    "Wang et al. 2024, Localizing task information (TALL masks, Consensus), arXiv 2405.07813", identity={"agree": 1}
)
def consensus(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: Annotated[Tensor, Range(0.3, 12.0, log=True)] = number(1.0),
    tall: Annotated[Tensor, Range(0.1, 1.0, least=0.0)] = number(0.4),
    agree: int = 2,
) -> Tensor:
    """λ Σ w·τ on the scalars that matter to at least ``agree`` experts.

    A scalar matters to an expert where |τ| > tall · |Σ τ - τ| (equations 4 and 6). The paper's task vectors have no
    weights; here each counts w times, the weights being scaled so that their mean is 1. ``agree: 0`` is task
    arithmetic. The paper's α on the sum of E task vectors is λ = α with weights of 1, and λ = E·α with weights that
    sum to 1.
    """
    share = weight * (len(deltas) / operators.divisor_of(weight, torch.float64))
    own = [d * w.to(d.dtype) for d, w in zip(deltas, share.unbind(0), strict=True)]
    together = operators.total_of(own)
    votes = operators.total_of([(d.abs() > tall * (together - d).abs()).float() for d in own])
    return lambda_ * torch.where(votes >= agree, operators.weighted_sum(deltas, weight, False), 0.0)


@method("He et al. 2024, Localize-and-Stitch (dataless form), arXiv 2408.13656", identity={"density": 1.0})
def localize_and_stitch(
    deltas: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    density: Top = number(0.1),
    lambda_: Mass = number(1.0),
    scope: Literal["global", "tensor"] = "global",
) -> Tensor:
    """λ Σ w·m·τ / Σ w·m with masks m of the largest ``density`` of each task vector, over the whole model.

    Where one expert alone keeps a scalar, it is λτ. The paper has no weights and no λ: they are 1 in it. Weights count
    by their ratios only, where experts overlap, and λ is the total mass.
    """

    def ranks(size: int) -> list[list[int]]:
        return [[max(1, int(float(density) * size))]] * len(deltas)

    cut = here.kth_largest(lambda d, _: [x.abs() for x in d], ranks, scope)[:, 0].unbind(0)
    kept = ((d.abs() >= c).float() for d, c in zip(deltas, cut, strict=True))
    return lambda_ * operators.kept_sum(deltas, weight, kept, True)


# The scalar of the smallest balance is always dropped.
@method("Du et al. 2024, Parameter competition balancing (PCB-Merging), arXiv 2410.02396", identity=None)
def pcb(
    deltas: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    density: Top = number(0.1),
    lambda_: Annotated[Tensor, Range(0.5, 2.2)] = number(1.2),
    inter: Literal["pairs", "sum"] = "pairs",
    clip: Annotated[Tensor, Range(0.0, 0.05, least=0.0, most=1.0)] = number(0.0),
    scope: Literal["tensor", "global"] = "tensor",
) -> Tensor:
    """Weigh every scalar by how much it stands out in its expert and how well the experts agree on it.

    β = exp(E·n²) · Σ_j tanh(n_i n_j) with n = τ/max|τ| (``inter: sum``: tanh(τ_i Σ τ)); the largest ``density`` of β
    stay, scaled to [0, 1]; then λ Σ β̂·w·τ / Σ β̂. The largest share ``clip`` of |τ| counts as large as the smallest of
    them, as in the authors' code with 0.01. Maxima and shares are those of each tensor, or with ``scope: global`` of
    the model as in the paper.
    """

    def tail(size: int) -> list[list[int]]:
        return [[max(1, int(float(clip) * size))]] * len(deltas)

    largest = here.kth_largest(lambda d, _: [x.abs() for x in d], tail, scope)[:, 0]
    safe = torch.where(largest > 0, largest, 1.0).unbind(0)

    def balance(d: Stack) -> list[Tensor]:
        wide = [x.double() for x in d]
        unit = [(x / m).clamp(-1.0, 1.0) for x, m in zip(wide, safe, strict=True)]
        if inter == "sum":
            total = operators.total_of(wide)
            agreement = [torch.tanh(x * total) for x in wide]
        else:
            agreement = [operators.total_of([torch.tanh(u * other) for other in unit]) for u in unit]
        # In float64, as exp differs in float32's last bit from one processor to another.
        return [(torch.exp(len(d) * u.square()) * a).clamp(min=0).float() for u, a in zip(unit, agreement, strict=True)]

    def ranks(size: int) -> list[list[int]]:
        return [[1, max(1, int(float(density) * size))]] * len(deltas)

    edges = here.kth_largest(lambda d, _: balance(d), ranks, scope).unbind(0)
    score = [_scaled(b, top, cut) for b, (top, cut) in zip(balance(deltas), edges, strict=True)]
    total = operators.total_of(score)
    merged = operators.weighted_sum([s * d for s, d in zip(score, deltas, strict=True)], weight, False)
    return lambda_ * merged / torch.where(total > 0, total, 1.0)


@method("Huang et al. 2024, EMR-Merging (its elected vector), arXiv 2405.17461")
def emr_max(deltas: Stack, *, lambda_: Annotated[Tensor, Range(0.1, 1.0)] = number(1.0)) -> Tensor:
    """λ times, scalar by scalar, the largest delta of those with the sign of the sum: of 3, 1 and -2 it is 3."""
    sign = operators.elected_sign(deltas, "mass")
    best = torch.zeros_like(sign)
    for delta in deltas:
        best = torch.maximum(best, delta * sign)
    return lambda_ * sign * best


@method(
    "Yu et al. 2024, Extend model merging to pre-trained models (WIDEN), arXiv 2408.03092",
    rows=True,
    identity={"ratio": 0.0},
)
def widen(
    models: Stack,
    *,
    here: PieceView,
    ratio: Annotated[Tensor, Range(0.5, 1.5, least=0.0)] = number(1.0),
    calibration: Annotated[Tensor, Range(0.3, 1.2)] = number(1.0),
    lambda_: Mass = number(1.0),
) -> Tensor:
    """Weigh every column of an expert by how far its magnitude and its direction moved, ranked within the expert.

    Softmax over the experts of the ranks; where a rank exceeds ``ratio`` times the expert's mean rank, the score is
    ``calibration``. Vectors are weighed scalar by scalar, by |τ| itself in the place of ranks. Embeddings are treated
    as other matrices, not transposed.
    """
    moved = _moved(here)
    ranks = moved if here.vector else [_ranks(m) for m in moved]
    score = (_importance(ranks[0], ratio, calibration) + _importance(ranks[1], ratio, calibration)) / 2
    moves = [s * (m - here.base) for s, m in zip(score.float().unbind(0), models, strict=True)]
    return here.base + lambda_ * operators.total_of(moves)


def _columns(models: Stack, here: PieceView) -> Tensor:
    """Squares of every expert's columns, their products with the base's, and the base's squares: (2E + 1, columns)."""
    wide, base = [m.double() for m in models], here.base.double()
    squares, products = [w.square() for w in wide], [w * base for w in wide]
    return torch.stack([operators.halved(x) for x in (*squares, *products, base.square())])


def _moved(here: PieceView) -> tuple[Tensor, Tensor]:
    """How far the columns moved in magnitude and in direction, (E, columns) each."""
    count = len(here.inputs)
    if here.vector:
        moved = torch.stack([(m - here.base).abs()[0].double() for m in here.inputs])
        return moved, moved
    sums = here.sum(_columns)
    norms, base = sums[:count].sqrt(), sums[-1].sqrt()
    scale = norms * base
    cosine = torch.where(scale > 0, sums[count : 2 * count] / torch.where(scale > 0, scale, 1.0), 1.0)
    return (norms - base).abs(), 1 - cosine


def _ranks(moved: Tensor) -> Tensor:
    """Within each expert, from 0 for the least to almost 1, (E, columns)."""
    return moved.argsort(dim=1, stable=True).argsort(dim=1).double() / moved.shape[1]


def _importance(rank: Tensor, ratio: Tensor, calibration: Tensor) -> Tensor:
    # In float64, as exp differs in float32's last bit from one processor to another.
    score = torch.softmax(rank, dim=0)
    return torch.where(rank > ratio * rank.mean(1, keepdim=True), calibration, score)


def _scaled(beta: Tensor, top: Tensor, cut: Tensor) -> Tensor:
    """Scores from ``cut`` to ``top`` scaled to [0, 1], smaller ones 0; all that stay are 1 where the two are equal."""
    scaled = torch.where(top > cut, (beta - cut) / torch.where(top > cut, top - cut, 1.0), 1.0)
    return torch.where((beta >= cut) & (beta > 0), scaled, 0.0)


def _ram(deltas: Stack, epsilon: Tensor, enlarged: Tensor) -> Tensor:
    total, alone, count = (torch.zeros_like(deltas[0]) for _ in range(3))
    for delta, factor in zip(deltas, enlarged.unbind(0), strict=True):
        active = delta.abs() > epsilon
        moved = torch.where(active, delta, 0.0)
        total, alone, count = total + moved, alone + moved * factor.to(delta.dtype), count + active.float()
    return torch.where(count > 1, total / count.clamp(min=1), alone)


def _variance(deltas: Stack) -> Tensor:
    mean = operators.total_of(deltas) / len(deltas)
    return operators.total_of([(d - mean).square() for d in deltas]) / (len(deltas) - 1)
