"""Singular values and vectors of task vectors: factorised once, truncated, kept in the cache.

All sizes: a matrix is (m, n), k ≤ min(m, n) directions are kept. Matrices and factors are float32. Where a matrix is
much longer than it is wide, or only a few directions are wanted, less than a whole decomposition is computed.
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
# Of matrices so many times longer than wide, the smaller product is decomposed instead.
LONG = 4
# A sketch is used for at most this share of the directions; so many more directions and products it takes.
SKETCHED, MORE, PRODUCTS = 1 / 8, 16, 3
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

    def product(self) -> Tensor:
        """The matrix (m, n)."""
        return (self.u * self.s) @ self.v.T

    def rank(self, energy: float = ENERGY) -> int:
        """How many directions hold ``energy`` of all squared singular values; 0 for a matrix of zeros."""
        squares = self.s.double().square()
        if not (whole := float(squares.sum())) > 0:
            return 0
        return min(len(squares), 1 + int((squares.cumsum(0) < energy * whole).sum()))


def matrix_by_matrix(stack: Stack, of_matrix: Callable[[Stack], Tensor], of_rest: Callable[[Stack], Tensor]) -> Tensor:
    """Merge tensors of any shape by a function of matrices.

    Tensors of three dimensions and more are a matrix for each first index (the experts of a fused layer), or, where
    the last dimension is 16 and less (a convolution), one matrix of all that belongs to a first index. Zeros alone,
    of a frozen embedding for example, are merged to zeros without a look.

    Args:
        stack: one tensor an expert, all of one shape.
        of_matrix: from matrices (m, n) to a matrix.
        of_rest: for what is no matrix: vectors, and matrices of one row or column.
    """
    shape = stack[0].shape
    if not any(t.any() for t in stack):
        return torch.zeros_like(stack[0])
    if len(shape) > 2 and min(shape) > 0:
        if shape[-1] <= WIDEST_KERNEL:
            return matrix_by_matrix([t.flatten(1) for t in stack], of_matrix, of_rest).view(shape)
        slices = zip(*(t.unbind(0) for t in stack), strict=True)
        return torch.stack([matrix_by_matrix(part, of_matrix, of_rest) for part in slices])
    return of_rest(stack) if len(shape) < 2 or min(shape) < 2 else of_matrix(stack)


def factors(matrix: Tensor, count: int | None = None) -> Factors:
    """The ``count`` strongest directions of a matrix (m, n); None: all min(m, n).

    A large matrix is decomposed once: its directions are read from the cache of this machine the next time.

    Raises FloatingPointError where no decomposition is found, in float64 neither, or the matrix is not finite.
    """
    most = min(matrix.shape)
    count = most if count is None else min(count, most)
    if most < KEPT_FROM:
        return _decomposed(matrix, count)
    key = _key(matrix)
    file = Path(expand("$EVOLVER_CACHE")) / FOLDER / f"{key}.safetensors"
    found = _read(file, key, matrix.device)
    if found is None or len(found.s) < count:
        found = _decomposed(matrix, count)
        _write(file, key, found)
    return found.first(count)


def polar(matrix: Tensor) -> Tensor:
    """The orthonormal columns U Vᵀ nearest to those of a matrix (m, k), k ≤ m, whose decomposition is U S Vᵀ.

    Directions in which the columns depend on each other are left out: they come back as zeros, not as noise.
    """
    values, vectors = eigen(matrix.double().T @ matrix.double())
    usable = values > values[-1].clamp(min=0) * 1e-10
    inverse = torch.where(usable, values.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    return (matrix.double() @ ((vectors * inverse) @ vectors.T)).to(matrix.dtype)


def _decomposed(matrix: Tensor, count: int) -> Factors:
    """The ``count`` strongest directions, computed the cheapest way that the shape allows."""
    rows, columns = matrix.shape
    if rows < columns:
        u, s, v = _decomposed(matrix.T, count)
        return Factors(v, s, u)
    if not matrix.isfinite().all():
        raise FloatingPointError("the task vector is not finite")
    if columns >= KEPT_FROM and count <= SKETCHED * columns:
        return _sketched(matrix, count)
    if rows >= LONG * columns:
        return _from_product(matrix).first(count)
    for dtype in (torch.float32, torch.float64):
        with contextlib.suppress(NOT_FOUND):
            u, s, vt = torch.linalg.svd(matrix.to(dtype), full_matrices=False)
            return Factors(u.float(), s.float(), vt.T.float().contiguous()).first(count)
    raise FloatingPointError("no singular value decomposition is found, in float64 neither")


def _from_product(matrix: Tensor) -> Factors:
    """All directions of a long matrix (m, n) from the eigenvectors of its small product (n, n), in float64."""
    values, vectors = eigen(matrix.double().T @ matrix.double())
    s, v = values.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    u = matrix.double() @ v
    return Factors((u / s.clamp(min=torch.finfo(torch.float64).tiny)).float(), s.float(), v.float().contiguous())


def _sketched(matrix: Tensor, count: int) -> Factors:
    """The strongest directions from a random sketch (Halko, Martinsson and Tropp 2011, algorithm 4.4), always the same
    for the same matrix.
    """
    columns = matrix.shape[1]
    drawn = torch.randn(columns, min(columns, count + MORE), generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ drawn.to(matrix.device)).Q
    for _ in range(PRODUCTS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    small = _from_product((basis.T @ matrix).T)
    return Factors(basis @ small.v, small.s, small.u).first(count)


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
