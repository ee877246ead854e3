"""Matrices of low rank, such as what LoRA adds to a layer, as products of two thin ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from evolver.merging.methods.here import Stack
from evolver.merging.methods.spectrum import eigen

# A part of a matrix, a quarter as long and as wide and at least so large, says which rank to expect.
SAMPLED = 32
# A matrix is of low rank up to its shorter side divided by this.
SHARE = 8
# So many more columns than the expected rank are drawn.
SPARE = 8
# This share of the squares may be left out: what float32 has rounded off.
SQUARES_ROUNDED = 1e-10


class ThinFactors(NamedTuple):
    """A matrix (m, n) of rank r as columns @ rows."""

    columns: Tensor  # (m, r), orthonormal, float32
    rows: Tensor  # (r, n), float32


def low_rank(matrix: Tensor) -> ThinFactors | None:
    """A matrix of at most an eighth of its possible rank as two thin ones; None for any other matrix.

    Few products find it (Halko, Martinsson and Tropp 2011, algorithm 4.1): the rank of a part of the matrix says how
    many random columns to draw, and what the product leaves out is measured.

    Raises FloatingPointError where the matrix is not finite.
    """
    most, whole = min(matrix.shape), float(matrix.double().square().sum())
    if not math.isfinite(whole):
        raise FloatingPointError("the task vector is not finite")
    if whole == 0 or most < SHARE or (expected := _rank_of_part(matrix)) > most // SHARE:
        return None
    drawn = torch.randn(matrix.shape[1], min(most, expected + SPARE), generator=torch.Generator().manual_seed(0))
    columns = torch.linalg.qr(matrix @ drawn.to(matrix.device)).Q
    rows = columns.T @ matrix
    if float((matrix - columns @ rows).double().square().sum()) > SQUARES_ROUNDED * whole:
        return None
    values, vectors = eigen(rows.double() @ rows.double().T)
    turned = vectors[:, values > SQUARES_ROUNDED * 1e-2 * values[-1]].float()
    return ThinFactors(columns @ turned, turned.T @ rows)


def root_of(matrix: Tensor) -> Tensor:
    """As few rows R (r, n) as are known to have the matrix's Gram: RᵀR = MᵀM. At worst the matrix (m, n) itself."""
    found = low_rank(matrix)
    return matrix if found is None else found.rows


def outer_roots(stack: Stack) -> list[Tensor]:
    """For every matrix as few columns C (m, r) as are known to have its outer Gram: CCᵀ = MMᵀ."""
    return [root_of(m.T).T for m in stack]


def _rank_of_part(matrix: Tensor) -> int:
    """The rank of a part with rows and columns from everywhere in the matrix: never more than that of the matrix."""
    height, width = (max(1, min(n, max(SAMPLED, n // 4))) for n in matrix.shape)
    size = min(height, width)
    steps = [max(1, n // size) for n in matrix.shape]
    part = matrix[:: steps[0], :: steps[1]][:size, :size].double()
    values, _ = eigen(part @ part.T)
    return int((values > SQUARES_ROUNDED * values[-1]).sum()) if values[-1] > 0 else 0
