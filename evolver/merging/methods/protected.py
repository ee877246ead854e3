"""TIES with a vote that some experts may lose without losing their scalars."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from evolver.merging.methods import Range, Simplex, each, method, number, operators
from evolver.merging.methods.averages import Mass, Weight
from evolver.merging.methods.here import PieceView, Stack
from evolver.merging.methods.sparse import Density, Elect, Scope, Sign, kept_of, magnitudes


@method(
    "Tao et al. 2024, Unlocking the potential of model merging for low-resource languages (TIES-SV), arXiv 2407.03994"
)
def ties_slack(
    deltas: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    density: Density = each(1.0),
    lambda_: Mass = number(1.0),
    slack: Annotated[Tensor, Range(0.01, 10.0, log=True, least=0.0)] = number(1.0),
    protected: Annotated[Tensor, Simplex()] = each(1.0),
    normalize: bool = True,
    trim_scope: Scope = "tensor",
    elect: Elect = "weighted",
    sign: Sign = "mass",
) -> Tensor:
    """TIES in which a protected expert keeps a scalar although the others outvoted its sign, if it lost narrowly.

    After trimming and electing as ``ties`` does, an expert i on the losing side keeps its scalar where |τ_i| + ξ_i ≥ Σ
    |τ| of the winning side, with ξ_i = slack · protected_i · (standard deviation of τ_i in the tensor). What is kept is
    averaged with the weights. With ``slack: 0`` it is ``ties``, bit for bit; an expert with ``protected: 0`` has no
    slack, and with a very large slack a protected expert keeps all that was not trimmed.

    The paper has two experts, a continually pre-trained one and a protected one; its formula could not be read, so
    this is a reading of its abstract: for more than two experts the loser is compared with the sum of its opponents.
    The share of the protected expert's scalars that may stay is its ``density``.
    """
    cuts = here.kth_largest(magnitudes, lambda n: [[kept_of(d, n)] for d in density.tolist()], trim_scope)[:, 0]
    kept = list(map(operators.trim, deltas, cuts.unbind(0)))
    weighted = [k * w.to(k.dtype) for k, w in zip(kept, weight.unbind(0), strict=True)]
    votes = weighted if elect == "weighted" else kept
    elected = operators.elected_sign(votes, sign)
    agreeing = [(torch.sign(v) * elected).clamp(min=0.0) for v in votes]  # 0 or 1
    winners = operators.total_of([k.abs() * a for k, a in zip(kept, agreeing, strict=True)])
    room = slack * protected * _deviations(here)
    stays = [_stays(k, a, winners, r) for k, a, r in zip(kept, agreeing, room.unbind(0), strict=True)]
    return lambda_ * operators.kept_sum(kept, weight, stays, normalize)


def _stays(kept: Tensor, agrees: Tensor, winners: Tensor, room: Tensor) -> Tensor:
    """1 where a scalar stays: its expert agrees, or has room and lost by no more than that. Else 0."""
    size, bound = kept.abs(), torch.where(room > 0, room, -torch.inf).to(kept.dtype)
    return torch.maximum(agrees, ((size > 0) & (size + bound >= winners)).float())


def _deviations(here: PieceView) -> Tensor:
    """The standard deviation of every expert's task vector in the tensor, float64 (E)."""

    def moments(deltas: Stack, _: PieceView) -> Tensor:
        count = operators.total((deltas[0].abs() >= 0.0).float())
        sums = [torch.stack([count, operators.total(d), operators.total(d.double().square())]) for d in deltas]
        return torch.stack(sums)

    count, plain, squares = here.sum(moments).unbind(1)
    size = count.clamp(min=1)
    return (squares / size - (plain / size).square()).clamp(min=0).sqrt()
