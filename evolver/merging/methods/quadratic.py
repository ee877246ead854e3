"""The gram merge: the matrix that is nearest to the targets of all experts, each measured by a Gram matrix of its own.

It minimises Σ w ‖(θ - T) G^½‖² over θ, where every expert has a weight w, a target T (m, n) and a Gram matrix
G = RᵀR (n, n), which is given by its root R (r, n). With C = Σ w G and D = Σ w (T - start) G, all answers here are
start + D φ(C): φ(λ), a function of the eigenvalues, says how far to go from the start in each direction. Where the
roots have fewer rows than columns in all, only the small product of the stacked roots is decomposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from evolver.merging.methods.spectrum import ROWS_AT_ONCE, eigen

# How the number of directions that a solution may use is chosen.
Directions = Literal["share", "participation", "stable", "entropy", "variance", "gavish_donoho"]
# From eigenvalues, rising, and the width n of the problem to one factor each.
Shrink = Callable[[Tensor, int], Tensor]
# From eigenvalues, rising, and the width n to how many of the largest are used.
Count = Callable[[Tensor, int], int]


class Term(NamedTuple):
    """What one expert wants: w ‖(θ - target) rootᵀ‖²."""

    target: Tensor  # (m, n)
    root: Tensor  # (r, n)
    weight: float  # w, not negative


def gram_merge(terms: Iterable[Term], rows: int, start: Tensor, shrink: Shrink) -> Tensor:
    """The matrix start + D φ(C), in float32.

    Args:
        terms: of the experts, taken one after the other and not kept.
        rows: of all their roots together.
        start: (m, n), where the way to the solution begins.
        shrink: φ, one factor for each eigenvalue of C.

    Raises FloatingPointError where the eigenvectors are not found.
    """
    return (_by_stacked_roots if rows < start.shape[1] else _by_gram)(terms, start, shrink)


def _by_gram(terms: Iterable[Term], start: Tensor, shrink: Shrink) -> Tensor:
    m, n = start.shape
    total, pull = start.new_zeros((n, n), dtype=torch.float64), start.new_zeros((m, n), dtype=torch.float64)
    for term in terms:
        gram = gram_of(term.root).mul_(term.weight)
        total += gram
        for at in range(0, m, ROWS_AT_ONCE):
            block = slice(at, at + ROWS_AT_ONCE)
            pull[block] += (term.target[block].double() - start[block].double()) @ gram
    values, vectors = eigen(total)
    way = (vectors * shrink(_cleaned(values), n)) @ vectors.T
    out = torch.empty_like(start)
    for at in range(0, m, ROWS_AT_ONCE):
        block = slice(at, at + ROWS_AT_ONCE)
        out[block] = start[block] + (pull[block] @ way).float()
    return out


def _by_stacked_roots(terms: Iterable[Term], start: Tensor, shrink: Shrink) -> Tensor:
    """The same through F = the stacked roots (r, n): D φ(FᵀF) = B φ(FFᵀ) F, where D = BF. Nothing is divided."""
    roots, pulls = [], []
    for term in terms:
        root = term.root.double() * math.sqrt(term.weight)
        roots.append(root)
        pulls.append((term.target.double() - start.double()) @ root.T)
    if not roots:
        return start
    stacked, pull = torch.cat(roots), torch.cat(pulls, dim=1)
    values, vectors = eigen(stacked @ stacked.T)
    way = (vectors * shrink(_cleaned(values), start.shape[1])) @ vectors.T
    return start + (pull @ way @ stacked).float()


def gram_of(matrix: Tensor) -> Tensor:
    """MᵀM of a matrix (m, n) in float64, (n, n)."""
    total = matrix.new_zeros((matrix.shape[1],) * 2, dtype=torch.float64)
    for block in matrix.split(ROWS_AT_ONCE):
        wide = block.double()
        total += wide.T @ wide
    return total


def _cleaned(values: Tensor) -> Tensor:
    """Eigenvalues with zeros where there is nothing but rounding."""
    if not len(values):  # no expert has a direction
        return values
    noise = values[-1] * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > noise, values, 0.0)


def flow(time: float, kept: Count) -> Shrink:
    """Gradient descent with steps that vanish, for so much time (SWUDI): φ(λ) = (1 - exp(-λ time)) / λ.

    At time 0 the start stays; with much time it is the solution. Directions beyond the ``kept`` ones stay at the start.
    """

    def shrink(values: Tensor, width: int) -> Tensor:
        usable = values > 0
        factors = torch.where(usable, -torch.expm1(-values * time) / torch.where(usable, values, 1.0), 0.0)
        count = min(kept(values, width), len(values))
        factors[: len(values) - count] = 0.0
        return factors

    return shrink


def ridge(share: float) -> Shrink:
    """A pull towards the start, ``share`` of the mean eigenvalue strong: φ(λ) = 1 / (λ + μ)."""

    def shrink(values: Tensor, width: int) -> Tensor:
        usable = values > 0
        return torch.where(usable, 1 / torch.where(usable, values + share * values.sum() / width, 1.0), 0.0)

    return shrink


def directions(rank: Directions, rho: float, rows: int) -> Count:
    """How many directions are used, of eigenvalues λ = σ² of the stacked roots (rows, n).

    ``share``: ⌈ρn⌉. ``variance``: as many as hold the share ρ of Σλ. ``participation``: (Σσ)²/Σλ. ``stable``:
    Σλ/max λ. ``entropy``: exp of the entropy of σ/Σσ (Roy and Vetterli 2007). ``gavish_donoho``: those with σ above
    ω(β) times the median σ, where β is the shorter side over the longer one (Gavish and Donoho 2014, equation 5).
    """

    def kept(values: Tensor, width: int) -> int:
        total, sigma = float(values.sum()), values.sqrt()
        if rank == "share":
            return math.ceil(rho * width)
        if not total > 0:
            return 0
        if rank == "variance":
            return 1 + int((values.flip(0).cumsum(0) < rho * total).sum())
        if rank == "participation":
            return math.ceil(float(sigma.sum()) ** 2 / total - 1e-9)
        if rank == "stable":
            return math.ceil(total / float(values[-1]) - 1e-9)
        if rank == "entropy":
            shares = sigma[sigma > 0] / sigma.sum()
            return math.ceil(math.exp(-float((shares * shares.log()).sum())) - 1e-9)
        return int((sigma > _noise_edge(sigma, rows, width)).sum())

    return kept


def _noise_edge(sigma: Tensor, rows: int, width: int) -> float:
    """The singular value of a (rows, width) matrix above which there is signal; those not given are zero."""
    short, long = sorted((rows, width))
    beta = short / long
    place = len(sigma) - short + (short - 1) // 2  # of the lower median among ``short`` values, in the given ones
    median = float(sigma[place]) if place >= 0 else 0.0
    return (0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43) * median
