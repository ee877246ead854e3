"""Optimal transport between the hidden units of two models: exact, or softened by entropy.

OTFusion (Singh and Jaggi 2020, arXiv 1910.05653), of weights: units are compared by their incoming weights, and what
is found is carried to the next layer. Transformer-OT (Imfeld et al. 2024, arXiv 2310.05719) found that soft transport
works better for Transformers.

A transport is a matrix Π (theirs, ours), whose columns sum to 1: a new unit is a weighted mean of their units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evolver.merging.alignment.matching import best_order

# Sinkhorn's iterations end when the masses are met so closely, or after so many.
PRECISION, SINKHORN_STEPS = 1e-9, 5000
# The scalings are folded into the potentials before they leave what float64 can hold.
LARGEST = 1e100


def unit_costs(ours: Tensor, theirs: Tensor, metric: str) -> Tensor:
    """The distance of every pair of units, float64 (theirs, ours), divided by the largest one, so from 0 to 1.

    Args:
        ours: (units, n) incoming weights of the model that stays as it is.
        theirs: (units, n) of the model that is re-ordered.
        metric: euclidean, or cosine (1 - cos).
    """
    a, b = theirs.double(), ours.double()
    if metric == "cosine":
        cost = 1.0 - torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
        cost = cost.clamp(min=0.0)
    else:
        squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2.0 * a @ b.T
        cost = squares.clamp(min=0.0).sqrt()
    largest = cost.max()
    return cost / largest if largest > 0 else cost


def unit_masses(rows: Tensor, kind: str) -> Tensor:
    """How much each unit counts, float64 (units,), which sums to 1.

    Args:
        rows: (units, n) incoming weights.
        kind: uniform, or norms: in proportion to ‖row‖.
    """
    sizes = rows.double().norm(dim=1) if kind == "norms" else torch.ones(len(rows), dtype=torch.float64)
    if not (sizes > 0).all():  # a dead unit, which has to go somewhere, too
        sizes = sizes + 1e-6 * sizes.sum().clamp(min=1.0) / len(sizes)
    return sizes / sizes.sum()


def exact_order(cost: Tensor) -> Tensor:
    """The exact transport between equal masses of equally many units, which is an assignment (Birkhoff's theorem), as
    the order ``p`` of their units.
    """
    return best_order(-cost.T)


def sinkhorn(cost: Tensor, ours: Tensor, theirs: Tensor, regularisation: float) -> Tensor:
    """The transport T (theirs, ours) that minimises ⟨T, cost⟩ - regularisation · H(T) with the given masses as sums, by
    Sinkhorn's iterations (Cuturi 2013, arXiv 1306.0895), stabilised by potentials.

    Args:
        cost: float64 (theirs, ours).
        ours, theirs: masses that sum to 1; those of ours are met exactly.
        regularisation: above 0, in units of the cost.
    """
    f = -regularisation * (torch.logsumexp(-cost / regularisation, 1) - theirs.log())
    g = -regularisation * (torch.logsumexp((f[:, None] - cost) / regularisation, 0) - ours.log())
    left, done = SINKHORN_STEPS, False
    while not done and left > 0:
        kernel = ((f[:, None] + g - cost) / regularisation).exp()
        u, v = torch.ones_like(f), torch.ones_like(g)
        while left > 0:
            left -= 1
            sums = kernel @ v
            done = float((u * sums - theirs).abs().sum()) < PRECISION
            if done:
                break
            u = theirs / sums
            v = ours / (kernel.T @ u)
            if max(u.max(), v.max()) > LARGEST or min(u.min(), v.min()) < 1 / LARGEST:
                break
        f, g = f + regularisation * u.log(), g + regularisation * v.log()
    return ((f[:, None] + g - cost) / regularisation).exp()


def soft_transport(ours: Tensor, theirs: Tensor, regularisation: float, metric: str, masses: str) -> Tensor:
    """Π = T diag(1 / column sums), float32 (theirs, ours): of OTFusion, algorithm 1, with Sinkhorn's T.

    The two models may have different numbers of units.
    """
    cost = unit_costs(ours, theirs, metric)
    plan = sinkhorn(cost, unit_masses(ours, masses), unit_masses(theirs, masses), regularisation)
    return (plan / plan.sum(0)).float()
