"""Merging row by row: the weights with which one neuron reads its inputs."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from evolver.merging.methods import Range, each, method, number, operators
from evolver.merging.methods.averages import Weight
from evolver.merging.methods.here import PieceView, Stack
from evolver.merging.methods.sparse import Scope, disjoint, kept_of, magnitudes

# Votes whose sum is so small beside their sizes elect no sign.
UNDECIDED = 1e-9


@method(
    "Fang et al. 2025, Disentangling multi-task interference (NeuroMerging), arXiv 2503.05320",
    rows=True,
    exact=False,
    identity={"density": 1.0, "parallel": 1.0, "rescale": "none"},
)
def neuro(
    deltas: Stack,
    *,
    here: PieceView,
    weight: Weight = each(1.0),
    density: Annotated[Tensor, Range(0.02, 1.0, above=0.0, most=1.0)] = each(0.1),
    lambda_: Annotated[Tensor, Range(0.3, 3.0, log=True)] = number(1.0),
    parallel: Annotated[Tensor, Range(0.0, 1.5)] = number(0.0),
    rescale: Literal["none", "l1"] = "l1",
    trim_scope: Scope = "global",
) -> Tensor:
    """NeuroMerging: what the experts change in a neuron's direction, and what they change along it, by a vote each.

    After trimming, each row τ of a task vector is split into a part along the base's row and the rest, τ⊥. In the
    coordinates of the singular value decomposition of the E rows τ⊥, every coordinate elects a sign, and those that
    agree are averaged with the weights; so is the part along the base's row, on its one coordinate. The result is λ·f·
    (what was made of τ⊥ + ``parallel`` · the part along the base), so the paper's λ2 is λ·f, and its λ1 ``parallel``
    times that. With ``rescale: l1`` f is the paper's 1 / (1 - σ), σ being the largest share of an expert's L1 norm that
    was trimmed away; else it is 1. Vectors are merged as by ``ties``.

    A coordinate on which the votes cancel elects no sign, and nothing is changed along it. Rows of a tensor of more
    than two dimensions are its vectors along the last one.
    """
    cuts = here.kth_largest(magnitudes, lambda n: [[kept_of(d, n)] for d in density.tolist()], trim_scope)[:, 0]

    def trimmed(d: Stack) -> list[Tensor]:
        return list(map(operators.trim, d, cuts.unbind(0)))

    factor = lambda_
    if rescale == "l1":
        sizes = here.sum(lambda d, _: torch.stack([_lengths(d), _lengths(trimmed(d))]), trim_scope, [cuts])
        factor = lambda_ * _restoring(*sizes)
    if here.vector:
        return disjoint(trimmed(deltas), weight, factor, True, "weighted", "mass")
    return factor * _by_neuron(trimmed(deltas), here.base, weight, parallel)


def _by_neuron(deltas: Stack, base: Tensor, weight: Tensor, parallel: Tensor) -> Tensor:
    """The merged rows, (rows, columns) as the deltas and the base; both parts are combinations of their rows."""
    wide, origin = [d.double() for d in deltas], base.double()
    length = operators.total_of_rows(origin.square())
    safe = torch.where(length > 0, length, 1.0)
    along = torch.stack([operators.total_of_rows(d * origin) / safe for d in wide], dim=1)  # (rows, E)
    rest = [d - a[:, None] * origin for d, a in zip(wide, along.unbind(1), strict=True)]
    products = operators.gram(rest, operators.total_of_rows).movedim(-1, 0)  # (rows, E, E)
    # With rows X = U S Vᵀ, expert i has the coordinates U_ik S_k. Their mean over those that agree, times V, is a
    # combination of the rows in which the S_k cancel.
    _, basis = torch.linalg.eigh(products)
    chosen = _voted(basis, weight)  # (rows, E)
    factors = (basis * chosen[:, None, :]).sum(2)
    own: Tensor = parallel * _voted(along[:, :, None], weight)[:, 0] - (factors * along).sum(1)
    moved: Tensor = operators.total_of([d * f[:, None].float() for d, f in zip(deltas, factors.unbind(1), strict=True)])
    return moved + own[:, None].float() * base


def _voted(votes: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean of the votes with the sign of their weighted sum; of (rows, E, C) over the experts."""
    weighted = votes * weight[:, None]
    sums, sizes = weighted.sum(1, keepdim=True), weighted.abs().sum(1, keepdim=True)
    sign = torch.where(sums.abs() > UNDECIDED * sizes, torch.sign(sums), 0.0)
    agrees = (torch.sign(weighted) * sign > 0).double()
    divisor = (agrees * weight[:, None]).sum(1)
    return (weighted * agrees).sum(1) / torch.where(divisor == 0, 1.0, divisor)


def _lengths(deltas: Stack) -> Tensor:
    """The L1 norm of a piece of every expert, float64 (E)."""
    return torch.stack([operators.total(d.abs()) for d in deltas])


def _restoring(whole: Tensor, kept: Tensor) -> Tensor:
    """One divided by the smallest share that an expert kept of its L1 norm, (); of those that kept something."""
    shares = torch.where(kept > 0, kept / torch.where(whole > 0, whole, 1.0), 1.0)
    return 1.0 / shares.amin()
