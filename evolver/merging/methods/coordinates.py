"""Methods that merge the coordinates of the task vectors in a basis that all experts share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from evolver.merging.methods import Range, each, method, number
from evolver.merging.methods.averages import Mass, SumMass, Weight
from evolver.merging.methods.bases import basis
from evolver.merging.methods.here import Stack
from evolver.merging.methods.isotropic import evened
from evolver.merging.methods.operators import disjoint_sum, elected_sign, trim, weighted_sum
from evolver.merging.methods.singular import orthogonal_sum
from evolver.merging.methods.sparse import Density
from evolver.merging.methods.spectrum import matrix_by_matrix

# DRM leaves out directions with so small a share of the largest singular value.
WEAK = 0.01
Combine = Callable[[Stack], Tensor]


@method("Chaichana et al. 2025, Decom-Renorm-Merge, arXiv 2505.23117", whole=True, exact=False, identity={"drop": 0.0})
def drm(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: Mass = number(1.0),
    drop: Annotated[Tensor, Range(0.0, 0.95, least=0.0, most=1.0)] = number(0.8),
    direction: Literal["horizontal", "vertical"] = "horizontal",
    renorm: bool = True,
) -> Tensor:
    """Trim and elect in the shared basis, where the rows of every expert are compared at one length.

    The task vectors side by side (``horizontal``; ``vertical``: one below the other) are U S [V₁ᵀ … V_Nᵀ]. Of the
    scalars of all V, their rows brought to length 1 (``renorm``), the largest 1 - ``drop`` stay; of what stays of S V a
    sign is elected, and what agrees is averaged, times λ. Directions below 1 % of the largest singular value are left
    out. At drop 0 nothing is left out or elected, as in the authors' code: it is λ Σwτ / Σw. Vectors are trimmed and
    elected as they are.
    """
    if not float(drop) > 0:
        return lambda_.float() * weighted_sum(deltas, weight, True)

    def elected(parts: Stack) -> Tensor:
        return disjoint_sum(parts, weight, parts, elected_sign(parts, "mass"), True)

    def of_matrix(stack: Stack) -> Tensor:
        turned = [x.T for x in stack] if direction == "vertical" else stack
        shared = basis(turned, WEAK)
        parts = [shared.T @ x for x in turned]
        merged = shared @ elected(_largest_jointly(parts, 1 - float(drop), renorm))
        return merged.T if direction == "vertical" else merged

    return lambda_.float() * matrix_by_matrix(
        deltas, of_matrix, lambda stack: elected([largest(x, 1 - float(drop)) for x in stack])
    )


@method("Stoica et al. 2025, KnOTS, arXiv 2410.19735", whole=True, exact=False, identity={"density": 1.0})
def knots(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: Mass = number(1.0),
    density: Density = number(0.2),
    inner: Literal["ties", "linear", "dare"] = "ties",
    seed: int = 0,
) -> Tensor:
    """TIES, DARE or a sum on the coordinates S V of the experts in the basis of all task vectors side by side.

    ``ties`` keeps the largest ``density`` of each expert's coordinates, elects signs and averages what agrees;
    ``dare`` keeps each coordinate with that probability, divides by it and adds; ``linear`` adds, which is task
    arithmetic. Directions below a millionth of the largest singular value are rounding, and left out. Vectors are
    merged the same way without a basis.
    """
    draws = [_draws(x, seed) for x in deltas] if inner == "dare" else []

    def combine(parts: Stack) -> Tensor:
        if inner == "ties":
            return _ties(parts, weight, float(density))
        kept = [_thinned(x, draw, float(density)) for x, draw in zip(parts, draws, strict=True)] if draws else parts
        return weighted_sum(kept, weight, False)

    def of_matrix(stack: Stack) -> Tensor:
        shared = basis(stack)
        return shared @ combine([shared.T @ x for x in stack])

    return lambda_.float() * matrix_by_matrix(deltas, of_matrix, combine)


@method("Panariello et al. 2025, Core Space, arXiv 2509.17786", whole=True, exact=False)
def core_space(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: SumMass = number(1.0),
    density: Density = number(0.2),
    inner: Literal["ties", "tsv", "iso", "task_arithmetic"] = "ties",
) -> Tensor:
    """Merge LoRA experts as small matrices M = UᵀτV, which hold all of them, and put the result back as U M Vᵀ.

    U and V are the singular vectors of all task vectors side by side and one below the other, at most as many as all
    adapters have ranks. Inside, ``ties`` trims to ``density`` and elects; ``tsv`` is ``tsv_m``; ``iso`` is ``iso_c``;
    ``task_arithmetic`` is what it is outside, λ Σwτ, so that it gains nothing. ``density`` belongs to ``ties``. The
    factors of the adapters are not asked for: their ranges are found from the task vectors, so that full fine-tunes
    are merged as well, without a gain. Vectors are merged by TIES, or else added.
    """
    merge: Combine = {
        "task_arithmetic": lambda parts: weighted_sum(parts, weight, False),
        "ties": lambda parts: _ties(parts, weight, float(density)),
        "tsv": lambda parts: orthogonal_sum(parts, weight),
        "iso": lambda parts: evened(weighted_sum(parts, weight, False)),
    }[inner]

    def of_matrix(stack: Stack) -> Tensor:
        left, right = basis(stack), basis([x.T for x in stack])
        if not left.shape[1]:
            return torch.zeros_like(stack[0])
        return left @ merge([left.T @ x @ right for x in stack]) @ right.T

    def of_rest(stack: Stack) -> Tensor:
        return merge(stack) if inner == "ties" else weighted_sum(stack, weight, False)

    return lambda_.float() * matrix_by_matrix(deltas, of_matrix, of_rest)


def _ties(parts: Stack, weight: Tensor, density: float) -> Tensor:
    kept = [largest(x, density) for x in parts]
    return disjoint_sum(kept, weight, kept, elected_sign(kept, "mass"), True)


def largest(part: Tensor, share: float) -> Tensor:
    """The tensor with its largest ``share`` of scalars, at least one, and zeros elsewhere."""
    return trim(part, _cut([part], share))


def _largest_jointly(parts: Stack, share: float, renorm: bool) -> list[Tensor]:
    """The coordinates S V (k, n) whose size in V, or in V with rows of length 1, is among the largest of all experts'.

    Without ``renorm`` V is (S V) / S, and S² is the sum of the squared rows of all experts.
    """
    rows = [x.norm(dim=1, keepdim=True) for x in parts]
    lengths = rows if renorm else [torch.stack(rows).square().sum(0).sqrt()] * len(rows)
    compared = [x.abs() / torch.where(r > 0, r, 1.0) for x, r in zip(parts, lengths, strict=True)]
    cut = _cut(compared, share)
    return [torch.where(c >= cut, x, 0.0) for x, c in zip(parts, compared, strict=True)]


def _cut(tensors: Stack, share: float) -> Tensor:
    """The smallest of the largest ``share`` of all scalars by size: at least one is as large."""
    sizes = torch.cat([t.abs().reshape(-1) for t in tensors])
    if share >= 1 or not len(sizes):
        return sizes.new_zeros(())
    place = len(sizes) - max(1, round(share * len(sizes)))
    if sizes.is_cuda:
        return sizes.kthvalue(place + 1).values
    return torch.tensor(np.partition(sizes.numpy(), place)[place])  # many times faster than torch's on a CPU


def _draws(delta: Tensor, seed: int) -> torch.Generator:
    """Random numbers that belong to an expert's tensor: the same wherever it stands among the experts."""
    data = delta.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    said = hashlib.blake2b(data, digest_size=7, key=str(seed).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(said, "big"))


def _thinned(part: Tensor, draw: torch.Generator, density: float) -> Tensor:
    return torch.where(torch.rand(part.shape, generator=draw).to(part.device) < density, part / density, 0.0)
