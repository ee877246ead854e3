"""Seeded noise on weights: which numbers a seed stands for, how large they are, and their sum added to a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from evolver.kernels import random
from evolver.kernels.compiled import Kernels
from evolver.kernels.encoded import RUN
from evolver.merging.methods.operators import halved
from evolver.records.noise import Distribution

# Scalars of a piece: those of a few tensors stay in a core's cache.
NOISE_PIECE = 16 * random.BLOCK
QUANTILE_DECIMALS = 6  # of a quantile, so that logarithms of another processor give the same numbers


def task_vector_rms(experts: Sequence[Tensor], base: Tensor) -> float:
    """σ of ``evolver.records.noise.Noise`` for one tensor: √(Σ_e ‖expert_e − base‖² / (E · n)).

    The squares are added in float64, in an order that neither the pieces nor the device change.

    Args:
        experts: E tensors of one shape with n ≥ 1 scalars, of any floating dtype.
        base: of the same shape.
    """
    return math.sqrt(math.fsum(_squares(e, base) for e in experts) / (len(experts) * base.numel()))


def _squares(expert: Tensor, base: Tensor) -> float:
    """‖expert − base‖²: sums of runs of 512 scalars, which are added by halves."""
    ours, theirs = expert.reshape(-1), base.reshape(-1)
    sums = []
    for start in range(0, base.numel(), NOISE_PIECE):
        piece = slice(start, start + NOISE_PIECE)
        difference = ours[piece].double() - theirs[piece].double()
        squares = torch.nn.functional.pad(difference * difference, (0, -difference.numel() % RUN))
        sums.append(halved(squares.view(-1, RUN).T))
    return float(halved(torch.cat(sums)))


def with_noise(
    point: Tensor, sigma: float, terms: Sequence[tuple[int, float]], distribution: Distribution, rank: int, name: str,
    kernels: Kernels | None = None,
) -> Tensor:  # fmt: skip
    """The point + σ · Σ_k coefficient_k · ε(seed_k), in float32, the terms added in their order, rounded once.

    Args:
        point: a tensor of any floating dtype.
        sigma: how large the noise of a coefficient of 1 is.
        terms: pairs of a seed and its coefficient.
        rank: of each ε; 0: full. See ``evolver.records.noise.Noise``, of which this is one tensor.
        name: of the tensor, which tells its draws from those of others.
        kernels: fused kernels that draw on a GPU, where there are some; the bits are the same.

    Returns:
        Tensor of the point's shape and dtype, the same bits for every device, piece and thread count; the point itself
        where σ is 0.
    """
    if not sigma:
        return point
    flat, out = point.reshape(-1), torch.empty(point.numel(), dtype=point.dtype, device=point.device)
    low = rank > 0 and point.dim() > 1
    columns = point[0].numel() if low else 1
    drawn = [_Drawn(seed, name, distribution, rank if low else 0, point.device, kernels) for seed, _ in terms]
    factors = [_number(c / math.sqrt(rank) if low else c, point) for _, c in terms]
    scale, step = _number(sigma, point), max(1, NOISE_PIECE // columns) * columns
    for start in range(0, len(flat), step):
        piece = flat[start : start + step].float()
        total = torch.zeros_like(piece).view(-1, columns)
        for noise, factor in zip(drawn, factors, strict=True):
            noise.add(total, factor, start)
        out[start : start + step] = piece + scale * total.view(-1)
    return out.view(point.shape)


class _Drawn:
    """ε of one seed and one tensor, or its factors A and B."""

    def __init__(
        self, seed: int, name: str, distribution: Distribution, rank: int, device: torch.device, kernels: Kernels | None
    ) -> None:
        streams = [f"{name}#noise A", f"{name}#noise B"] if rank else [f"{name}#noise"]
        self.streams = [random.Drawn(seed, [stream], device, kernels) for stream in streams]
        self.rank, self.distribution = rank, distribution

    def add(self, total: Tensor, factor: Tensor, start: int) -> None:
        """Add factor · ε, of a low rank factor · A Bᵀ, to ``total``, (rows, columns), from scalar ``start`` on."""
        if not self.rank:
            total.add_(self._numbers(0, start, total.shape).mul_(factor))
            return
        rows, columns = total.shape
        left = self._numbers(0, start // columns * self.rank, (rows, self.rank)).mul_(factor)
        right = self._numbers(1, 0, (columns, self.rank)).T.contiguous()
        for k in range(self.rank):  # one after the other: a product of matrices is added up in another order elsewhere
            total.add_(left[:, k, None] * right[k])

    def _numbers(self, stream: int, start: int, shape: Sequence[int]) -> Tensor:
        (draws,) = self.streams[stream].piece(start, shape)
        if self.distribution == "rademacher":
            return draws.sub_((random.LEVELS - 1) / 2).sign_()
        return _quantiles(draws.device)[draws.int()]


@cache
def _quantiles(device: torch.device) -> Tensor:
    """Draw u as a normal number: the quantile at (u + 1/2) / 65536; float32 (65536), symmetric, up to 4.32."""
    normal, half = NormalDist(), random.LEVELS // 2
    lower = torch.tensor([round(normal.inv_cdf((u + 0.5) / random.LEVELS), QUANTILE_DECIMALS) for u in range(half)])
    return torch.cat([lower, -lower.flip(0)]).to(device)


def _number(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)
