"""One basis for the task vectors of all experts: the singular vectors of all of them side by side (KnOTS).

Task vectors (m, n) side by side are a matrix (m, Nn) = U diag(S) [V₁ᵀ … V_Nᵀ]. Only U is computed, from the smaller of
two products; the coordinates of an expert in it are Uᵀτ = diag(S) Vᵀ, and U times these is τ again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evolver.merging.methods.here import Stack
from evolver.merging.methods.lowrank import outer_roots
from evolver.merging.methods.quadratic import gram_of
from evolver.merging.methods.spectrum import eigen

# Directions with so small a share of the largest singular value are rounding.
NEGLIGIBLE = 1e-6


def basis(stack: Stack, least: float = NEGLIGIBLE) -> Tensor:
    """The orthonormal columns U (m, k) that all matrices (m, n) share, in the order of their strength.

    Args:
        least: directions whose singular value is this share of the largest one, or less, are left out.

    Raises FloatingPointError where a matrix is not finite, or no eigenvectors are found.
    """
    columns = outer_roots(stack)
    if columns[0].shape[0] <= sum(c.shape[1] for c in columns):
        values, vectors = eigen(sum((gram_of(c.T) for c in columns), torch.zeros(())))
        return vectors[:, _strong(values, least)].flip(1).float()
    values, vectors = eigen(_all_products(columns))
    chosen = _strong(values, least)
    parts = (vectors[:, chosen] * values[chosen].rsqrt()).flip(1).split([c.shape[1] for c in columns])
    return sum((c @ part.float() for c, part in zip(columns, parts, strict=True)), torch.zeros(()))


def _strong(values: Tensor, least: float) -> Tensor:
    """Which eigenvalues, the squares of singular values, count."""
    return (values > 0) & (values > least**2 * values[-1])


def _all_products(columns: Stack) -> Tensor:
    """The inner products of all columns (m, k) of all matrices, in float64: (Σk, Σk)."""
    wide = [c.double() for c in columns]
    count = len(wide)
    upper = {(a, b): wide[a].T @ wide[b] for a in range(count) for b in range(a, count)}
    rows = [[upper[a, b] if a <= b else upper[b, a].T for b in range(count)] for a in range(count)]
    return torch.cat([torch.cat(row, dim=1) for row in rows])
