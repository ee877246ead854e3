"""What task vectors look like before they are merged: how large they are, how much alike, how many directions they use.

Measured a tensor at a time, summed up by layer, and remembered for files that have not changed since.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from evolver.checkpoints.grams import TensorGrams, task_grams
from evolver.checkpoints.weights import Checkpoint, Source, cached
from evolver.merging.methods.here import Stack
from evolver.merging.methods.spectrum import factors, matrix_by_matrix
from evolver.records.canonical import content_hash
from evolver.records.recipe import layer_of

# Directions that are compared: those that a sketch finds in a moment, and that hold most of what fine-tuning changes.
DIRECTIONS = 16


@dataclass(frozen=True)
class TensorLikeness:
    """What one tensor's task vectors have in common, beside their inner products.

    Attributes:
        base: the squared norm of the base's tensor.
        disputed: scalars that at least two experts change, and not all in the same direction.
        shared: scalars that at least two experts change.
        ranks: for each of its matrices the effective rank of each expert's change; 0 where nothing changes.
        overlap: for each of its matrices the mean over all pairs of experts; None where fewer than two change it.
        chance: for each of its matrices the overlap of random directions.
    """

    base: float
    disputed: int
    shared: int
    ranks: tuple[tuple[float, ...], ...] = ()
    overlap: tuple[float | None, ...] = ()
    chance: tuple[float, ...] = ()


@dataclass(frozen=True)
class Likeness:
    """The same of a layer, or of all tensors of a model.

    Attributes:
        tensors: how many were measured.
        norms: ‖τ‖ of each expert.
        relative: ‖τ‖ ÷ ‖θ₀‖ of each expert.
        cosines: between the experts' task vectors, (E, E); 0 for a task vector of zeros.
        conflict: of the scalars that at least two experts change, the share in which two of them disagree in sign.
        ranks: of each expert, the mean effective rank of its matrices, where (Σ σ²)² / Σ σ⁴ is the number of equally
            strong directions (the participation ratio); None where there is no matrix.
        overlap: how far the experts' 16 strongest input directions lie in each other's span, ‖VᵢᵀVⱼ‖² / 16, from 0 to
            1, as a mean over pairs and matrices; None where there is no matrix that two experts change.
        chance: the same of random directions.
    """

    tensors: int
    norms: tuple[float, ...]
    relative: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]
    conflict: float
    ranks: tuple[float, ...] | None
    overlap: float | None
    chance: float


def likeness(
    base: Checkpoint, experts: Sequence[Source], measured: Callable[[str], None] = lambda _: None
) -> tuple[Likeness, dict[int | None, Likeness]]:
    """What the experts' task vectors have in common: of the whole model, and by layer (None: outside of all layers).

    Args:
        measured: is told the name of each tensor that has been measured; of none where all is remembered.
    """
    grams, models = task_grams(base, experts), (base, *experts)
    kind = f"likeness/{content_hash([model.digest() for model in models])}"
    names = [name for name, info in base.headers.items() if info.dtype.is_floating_point]

    def found() -> str:
        out = {}
        for name in names:
            out[name] = asdict(tensor_likeness(base.tensor(name), [e.tensor(name) for e in experts]))
            measured(name)
        return json.dumps(out)

    text = cached(kind, [f for model in models for f in model.files()], found)
    parts = {name: TensorLikeness(**part) for name, part in json.loads(text).items()}
    layers = sorted({layer_of(n) for n in names}, key=lambda layer: -1 if layer is None else layer)
    of = {layer: [n for n in names if layer_of(n) == layer] for layer in layers}
    return _summed(names, grams, parts), {layer: _summed(group, grams, parts) for layer, group in of.items()}


def tensor_likeness(base: Tensor, experts: Stack) -> TensorLikeness:
    """What the task vectors of one tensor have in common."""
    origin = base.float()
    deltas = [expert.float() - origin for expert in experts]
    up, down = (sum(((d > 0) if way else (d < 0) for d in deltas), torch.zeros(())) for way in (True, False))
    shared = (up + down) > 1
    matrices = _Matrices()
    matrix_by_matrix(deltas, matrices.see, lambda rest: rest[0])
    return TensorLikeness(
        float(origin.double().square().sum()), int((shared & (up > 0) & (down > 0)).sum()), int(shared.sum()),
        tuple(matrices.ranks), tuple(matrices.overlap), tuple(matrices.chance),
    )  # fmt: skip


class _Matrices:
    """What is found out about the matrices of a tensor."""

    def __init__(self) -> None:
        self.ranks: list[tuple[float, ...]] = []
        self.overlap: list[float | None] = []
        self.chance: list[float] = []

    def see(self, deltas: Stack) -> Tensor:
        """Measure the task vectors of one matrix (m, n)."""
        count = min(DIRECTIONS, *deltas[0].shape)
        self.ranks.append(tuple(map(effective_rank, deltas)))
        spans = [factors(d).first(count).v for d in deltas if d.any()]
        pairs = [float((a.T @ b).square().sum()) / min(a.shape[1], b.shape[1]) for a, b in combinations(spans, 2)]
        self.overlap.append(sum(pairs) / len(pairs) if pairs else None)
        self.chance.append(count / deltas[0].shape[1])
        return deltas[0]


def effective_rank(matrix: Tensor) -> float:
    """The number of equally strong directions, (Σ σ²)² / Σ σ⁴, of a matrix (m, n), from its products alone; 0 for a
    matrix of zeros.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    scale = wide.norm()
    if not scale > 0:
        return 0.0
    return 1.0 / float((wide / scale @ (wide / scale).T).double().square().sum())


def _summed(names: Sequence[str], grams: TensorGrams, parts: dict[str, TensorLikeness]) -> Likeness:
    """The likeness of some tensors together."""
    products = np.sum([grams[n] for n in names], axis=0)
    norms = np.sqrt(np.diagonal(products).clip(min=0.0))
    scale = np.outer(norms, norms)
    cosines = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    found = [parts[n] for n in names]
    shared, whole = sum(p.shared for p in found), sum(p.base for p in found) ** 0.5
    ranks = [r for p in found for r in p.ranks]
    overlap = [o for p in found for o in p.overlap if o is not None]
    chance = [c for p in found for c in p.chance]
    return Likeness(
        len(names), tuple(norms.tolist()), tuple((norms / whole if whole > 0 else norms).tolist()),
        tuple(map(tuple, cosines.tolist())), sum(p.disputed for p in found) / shared if shared else 0.0,
        tuple(np.mean(ranks, axis=0).tolist()) if ranks else None, float(np.mean(overlap)) if overlap else None,
        float(np.mean(chance)) if chance else 0.0,
    )  # fmt: skip
