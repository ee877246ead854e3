"""A merge of LoRA experts that treats the lengths of columns and their directions apart."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from evolver.merging.methods import Range, each, method, number
from evolver.merging.methods.averages import Mass, Weight
from evolver.merging.methods.here import Stack
from evolver.merging.methods.interference import BalancedWeights
from evolver.merging.methods.operators import weighted_sum
from evolver.merging.methods.spectrum import factors, matrix_by_matrix


@method("Zheng et al. 2025, Decouple and orthogonalize (DO-Merging), arXiv 2505.15875", whole=True, exact=False)
def do_merging(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: Mass = number(1.0),
    renorm: Annotated[Tensor, Range(0.0, 1.0, least=0.0, most=1.0)] = number(0.0),
    gamma: Annotated[Tensor, Range(1e-3, 10.0, log=True, above=0.0)] = number(0.1),
    steps: int = 100,
) -> Tensor:
    """DO-Merging: the columns' lengths are averaged, and apart from them their directions; both times, λ Σw.

    First the experts are made more orthogonal to each other: each matrix is BA, and small changes of all A minimise
    Σ ‖A Aᵀ‖² over pairs of experts plus γ times the squared changes, by ``steps`` steps of gradient descent; so do
    changes of B. ``renorm`` is a second mass, for the directions: at 0 their average is shorter where experts disagree,
    at 1 it has length 1 again. Read so, because the paper's constants are not known: A and B are found from the task
    vector, B = U√S and A = √S Vᵀ of its strongest ⌊min(m, n)/N⌋ directions (what is beyond stays as it is), scaled so
    that the A of the experts have squared length 1 on average; the norms in the loss are squared. Vectors get λ Σwτ.
    """
    put = BalancedWeights.of(weight)

    def of_matrix(stack: Stack) -> Tensor:
        signed = put.signed(stack)
        moved = _orthogonalised(signed, float(gamma), steps) if len(stack) > 1 and steps > 0 else signed
        lengths = [x.norm(dim=0) for x in moved]
        ways = [x / torch.where(n > 0, n, 1.0) for x, n in zip(moved, lengths, strict=True)]
        length = weighted_sum(lengths, weight.abs(), False)
        way = weighted_sum(ways, weight.abs(), True)
        size = way.norm(dim=0)
        return way * length * torch.where(size > 0, size, 1.0) ** -float(renorm)

    return lambda_.float() * matrix_by_matrix(deltas, of_matrix, lambda stack: weighted_sum(stack, weight, False))


def _orthogonalised(stack: Stack, gamma: float, steps: int) -> list[Tensor]:
    """The matrices with factors that overlap less with those of the other experts."""
    found = [factors(x).first(max(1, min(x.shape) // len(stack))) for x in stack]
    left, right = (
        pushed_apart([side * f.s.sqrt() for f, side in zip(found, sides, strict=True)], gamma, steps)
        for sides in ([f.u for f in found], [f.v for f in found])
    )
    return [x - f.product() + b @ a.T for x, f, b, a in zip(stack, found, left, right, strict=True)]


def pushed_apart(sides: Stack, gamma: float, steps: int) -> list[Tensor]:
    """The columns of every expert's factor (m, k), moved by gradient descent on their overlap with the others'.

    All of them together are X (m, K), and stay combinations XT of what they were, so that T (K, K) and the products
    XᵀX are all that is computed with. In every step T -= h (4 T O + 2γ (T - 1)), where O are the products of columns of
    different experts; h is one over the largest curvature of the loss.
    """
    sizes = [x.shape[1] for x in sides]
    stacked = torch.cat(list(sides), dim=1).double()
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(stacked.device)
    others = owner[:, None] != owner[None, :]
    products = stacked.T @ stacked
    mean = products.trace() / len(sides)
    if not mean > 0:
        return list(sides)
    products = products / mean
    step = 1 / (12 * torch.linalg.matrix_norm(products, 2) + 2 * gamma)
    one = torch.eye(len(products), dtype=torch.float64, device=stacked.device)
    turned = one.clone()
    for _ in range(steps):
        overlap = (turned.T @ products @ turned) * others
        turned -= step * (4 * turned @ overlap + 2 * gamma * (turned - one))
    return list((stacked @ turned).float().split(sizes, dim=1))
