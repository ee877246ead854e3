"""Inner products of task vectors: how large the experts' changes are, and how much alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evolver.checkpoints.weights import Checkpoint, Source, cached
from evolver.records.canonical import content_hash

# So many scalars of all models together are in float64 at a time: 32 MiB.
GRAM_PIECE = 1 << 22
TensorGrams = Mapping[str, NDArray[np.float64]]


def task_grams(base: Checkpoint, experts: Sequence[Source]) -> TensorGrams:
    """Of every floating tensor the inner products of the experts' task vectors θ_i - θ₀, (E, E) in float64.

    The models are read a tensor at a time, once: the result is remembered for files that have not changed since.
    """
    models = (base, *experts)
    kind = f"grams/{content_hash([model.digest() for model in models])}"  # one file may be seen with other tokens
    text = cached(kind, [f for model in models for f in model.files()], lambda: json.dumps(_measured(base, experts)))
    return {name: np.array(products) for name, products in json.loads(text).items()}


def task_sizes(base: Checkpoint, experts: Sequence[Source]) -> Mapping[str, tuple[float, ...]]:
    """Of every floating tensor the sum Σ|θ_i - θ₀| of each expert's changes; remembered like ``task_grams``."""
    models = (base, *experts)
    kind = f"sizes/{content_hash([model.digest() for model in models])}"

    def found() -> str:
        names = [name for name, info in base.headers.items() if info.dtype.is_floating_point]
        return json.dumps({n: [_changed(base.tensor(n), e.tensor(n)) for e in experts] for n in names})

    text = cached(kind, [f for model in models for f in model.files()], found)
    return {name: tuple(sizes) for name, sizes in json.loads(text).items()}


def _changed(origin: Tensor, tensor: Tensor) -> float:
    pieces = zip(*(t.reshape(-1).split(GRAM_PIECE) for t in (origin, tensor)), strict=True)
    return sum(float((other.double() - zero.double()).abs().sum()) for zero, other in pieces)


def _measured(base: Checkpoint, experts: Sequence[Source]) -> dict[str, list[list[float]]]:
    floating = [name for name, info in base.headers.items() if info.dtype.is_floating_point]
    return {name: _gram(base.tensor(name), [e.tensor(name) for e in experts]).tolist() for name in floating}


def _gram(origin: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The inner products of the differences of ``tensors`` to ``origin``, piece by piece, as float64 takes room."""
    out = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    length = max(1, GRAM_PIECE // (1 + len(tensors)))
    pieces = zip(*(t.reshape(-1).split(length) for t in (origin, *tensors)), strict=True)
    for zero, *others in pieces:
        moved = torch.stack([other.double() - zero.double() for other in others])
        out += moved @ moved.T
    return out
