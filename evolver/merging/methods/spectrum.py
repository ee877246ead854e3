"""Singular values and vectors of task vectors: factorised once, truncated, kept in the cache.

All sizes: a matrix is (m, n), k ≤ min(m, n) directions are kept. Matrices and factors are float32. Where a matrix is
much longer than it is wide, or has a low rank, less than a whole decomposition is computed. The result depends on the
matrix alone, never on what is in the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from evolver.checkpoints.kept import Damaged, open_kept, write_kept
from evolver.errors import EvolverError
from evolver.merging.methods.here import Stack
from evolver.storage.paths import expand

# The folder of the cache, and how many bytes of it are left when older files make room.
FOLDER, ROOM = "spectra", 8 << 30
# Smaller matrices (their shorter side) are decomposed faster than a file is read.
KEPT_FROM = 256
# This share of the squared singular values counts: what is beyond is the rounding of stored weights.
ENERGY = 0.999
# Of matrices so many times longer than wide, only the square factor of a QR decomposition is decomposed.
LONG = 4
# Matrices whose rank is at most this share of their shorter side are decomposed in the span of so few products.
LOW = 1 / 8
# What is smaller than this share of the matrix is the rounding of float32.
ROUNDED = 1e-5
# Columns depend on each other in directions in which their product has less than this share of its largest eigenvalue.
DEPENDENT = 1e-10
# Rows of a long matrix that are handled at a time in float64.
ROWS_AT_ONCE = 4096
# Kernels of convolutions are no wider; a longer last dimension belongs to a matrix for each first index.
WIDEST_KERNEL = 16
# What torch raises where an iteration does not end.
NOT_FOUND = torch.linalg.LinAlgError  # type: ignore[attr-defined]


class Factors(NamedTuple):
    """U diag(s) Vᵀ: the directions of a matrix in the order of their strength."""

    u: Tensor  # (m, k), orthonormal columns
    s: Tensor  # (k), falling, not negative
    v: Tensor  # (n, k), orthonormal columns

    def first(self, count: int) -> Factors:
        """The strongest ``count`` directions."""
        return Factors(self.u[:, :count], self.s[:count], self.v[:, :count])

    def that_count(self) -> Factors:
        """Those whose singular values are more than rounding."""
        return self.first(int((self.s > ROUNDED * self.s[:1]).sum()))

    def turned(self) -> Factors:
        """The directions of the transposed matrix."""
        return Factors(self.v, self.s, self.u)

    def product(self) -> Tensor:
        """The matrix (m, n)."""
        return (self.u * self.s) @ self.v.T

    def rank(self, energy: float = ENERGY, whole: float | None = None) -> int:
        """How many directions it takes to leave at most 1 - ``energy`` of the squared singular values.

        Args:
            whole: the sum of squares of which that share may be left; None: of these directions.
        """
        left = self.s.double().square().flip(0).cumsum(0).flip(0)
        if not len(left):
            return 0
        return int((left > (1 - energy) * (float(left[0]) if whole is None else whole)).sum())


def matrix_by_matrix(stack: Stack, of_matrix: Callable[[Stack], Tensor], of_rest: Callable[[Stack], Tensor]) -> Tensor:
    """Merge tensors of any shape by a function of matrices.

    Tensors of three dimensions and more are a matrix for each first index (the experts of a fused layer), or, where
    the last dimension is 16 and less (a convolution), one matrix of all that belongs to a first index.

    Args:
        stack: one tensor an expert, all of one shape.
        of_matrix: from matrices (m, n) to a matrix; not asked where all are zero, as the merge is then.
        of_rest: for what is no matrix: vectors, and matrices of one row or column.
    """
    shape = stack[0].shape
    if len(shape) > 2 and min(shape) > 0:
        if shape[-1] <= WIDEST_KERNEL:
            return matrix_by_matrix([t.flatten(1) for t in stack], of_matrix, of_rest).view(shape)
        slices = zip(*(t.unbind(0) for t in stack), strict=True)
        return torch.stack([matrix_by_matrix(part, of_matrix, of_rest) for part in slices])
    if len(shape) < 2 or min(shape) < 2:
        return of_rest(stack)
    return of_matrix(stack) if any(t.any() for t in stack) else torch.zeros_like(stack[0])


def factors(matrix: Tensor) -> Factors:
    """The directions of an expert's matrix (m, n), falling, but for those whose singular values are rounding.

    A large matrix is decomposed once: its directions are read from the cache of this machine the next time.

    Raises FloatingPointError where no decomposition is found, in float64 neither, or the matrix is not finite.
    """
    if not matrix.any():
        rows, columns = matrix.shape
        return Factors(matrix.new_zeros(rows, 0), matrix.new_zeros(0), matrix.new_zeros(columns, 0))
    if min(matrix.shape) < KEPT_FROM:
        return decomposed(matrix).that_count()
    key = _key(matrix)
    file = Path(expand("$EVOLVER_CACHE")) / FOLDER / f"{key}.safetensors"
    found = _read(file, key, matrix.device)
    if found is None:
        found = (_of_low_rank(matrix) or decomposed(matrix)).that_count()
        _write(file, key, found)
    return found


def decomposed(matrix: Tensor) -> Factors:
    """All min(m, n) directions of a matrix (m, n), falling, computed afresh: for merges, of which each comes once.

    Raises FloatingPointError as ``factors``.
    """
    rows, columns = matrix.shape
    if rows < columns:
        return decomposed(matrix.T).turned()
    if not matrix.isfinite().all():
        raise FloatingPointError("the task vector is not finite")
    if rows >= LONG * columns:
        basis, square = torch.linalg.qr(matrix)
        found = decomposed(square)
        return Factors(basis @ found.u, found.s, found.v)
    for dtype in (torch.float32, torch.float64):
        with contextlib.suppress(NOT_FOUND):
            u, s, vt = torch.linalg.svd(matrix.to(dtype), full_matrices=False)
            return Factors(u.float(), s.float(), vt.T.float().contiguous())
    raise FloatingPointError("no singular value decomposition is found, in float64 neither")


def polar(matrix: Tensor) -> Tensor:
    """The orthonormal columns U Vᵀ nearest to those of a matrix (m, k), k ≤ m, whose decomposition is U S Vᵀ.

    Directions in which the columns depend on each other are left out: they come back as zeros, not as noise. Computed
    in float64 from the product (k, k), as the columns may be nearly dependent.
    """
    if not matrix.shape[1]:
        return matrix
    values, vectors = eigen(products_of_columns(matrix))
    usable = values > values[-1].clamp(min=0) * DEPENDENT
    inverse = torch.where(usable, values.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    root = (vectors * inverse) @ vectors.T
    return torch.cat([(b.double() @ root).to(matrix.dtype) for b in matrix.split(ROWS_AT_ONCE)])


def products_of_columns(matrix: Tensor) -> Tensor:
    """The inner products of the columns of a matrix (m, k) in float64, (k, k), with little memory beside them."""
    out = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for block in matrix.split(ROWS_AT_ONCE):
        wide = block.double()
        out.addmm_(wide.T, wide)
    return out


def _of_low_rank(matrix: Tensor) -> Factors | None:
    """The directions that are more than rounding, where they are few; None where they are not.

    They lie in the span of a few random products (Halko, Martinsson and Tropp 2011, algorithm 4.1), which are always
    the same for matrices of one shape.
    """
    rows, columns = matrix.shape
    if rows < columns:
        found = _of_low_rank(matrix.T)
        return found and found.turned()
    drawn = torch.randn(columns, int(LOW * columns), generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ drawn.to(matrix.device)).Q
    within = basis.T @ matrix
    if not torch.linalg.norm(matrix - basis @ within) <= ROUNDED * torch.linalg.norm(matrix):
        return None
    found = decomposed(within)
    return Factors(basis @ found.u, found.s, found.v)


def eigen(product: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors of a symmetric matrix.

    Raises FloatingPointError where none are found.
    """
    try:
        values, vectors = torch.linalg.eigh(product)
    except NOT_FOUND as error:
        raise FloatingPointError("no eigenvectors are found") from error
    return values, vectors


def _key(matrix: Tensor) -> str:
    data = matrix.detach().float().cpu().contiguous()
    said = hashlib.blake2b(f"{tuple(data.shape)}".encode(), digest_size=16)
    said.update(data.view(-1).view(torch.uint8).numpy().data)
    return said.hexdigest()


def _read(file: Path, key: str, device: torch.device) -> Factors | None:
    """The directions in the cache; None where there are none, or none that can be read: they are found again."""
    with contextlib.suppress(Damaged, OSError):
        if (kept := open_kept(file, key)) is not None:
            u, s, v = (kept.get(name) for name in Factors._fields)
            if u is not None and s is not None and v is not None:
                file.touch()  # it was of use: others make room first
                return Factors(u.to(device), s.to(device), v.to(device))
    return None


def _write(file: Path, key: str, found: Factors) -> None:
    """Keep directions, where the disk allows; the files that were of no use for longest make room."""
    with contextlib.suppress(OSError, EvolverError):
        write_kept(file, key, {name: t.cpu().contiguous() for name, t in found._asdict().items()})
        files = sorted(os.scandir(file.parent), key=lambda entry: entry.stat().st_mtime)
        taken = sum(entry.stat().st_size for entry in files)
        for entry in files[:-1]:
            if taken <= ROOM:
                break
            taken -= entry.stat().st_size
            os.unlink(entry.path)
