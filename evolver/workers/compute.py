"""Chooses the dtype in which forward passes run: that of the weights, or float32 where the processor is faster in it.

A processor without instructions for bfloat16 converts every operand, which makes bfloat16 up to ten times slower than
float32. Both dtypes hold the weights exactly, but they round sums differently. For this reason one dtype is chosen for
the whole run, and every worker computes in it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from evolver.checkpoints.weights import TensorInfo
from evolver.config import Config
from evolver.config.changes import computing
from evolver.config.model import ModelSettings
from evolver.errors import BadInput
from evolver.evaluation.live import free_memory

Headers = Mapping[str, TensorInfo]
Shape = tuple[int, int]

NARROW, COMPUTE_WIDE = ("bfloat16", "float16"), "float32"
# How many shapes are timed, and the most scalars of a matrix, rows of a product and operations of a product.
SHAPES, SCALARS, ROWS, OPERATIONS = 3, 1 << 22, 256, 10**9
# Each product is timed at most TIMING_ROUNDS times. After PATIENCE seconds no further round begins.
TIMING_ROUNDS, PATIENCE = 5, 0.3
# float32 takes more memory, so it is chosen only if it takes less than this share of the time of the other dtype.
WORTH = 0.9
# Matrices (outputs, inputs) and their number that are timed where no model is given: 12 layers of width 768.
TYPICAL = {(2304, 768): 12.0, (3072, 768): 12.0, (768, 3072): 12.0}


@dataclass(frozen=True)
class ComputeChoice:
    """A dtype for forward passes.

    Attributes:
        compute: name of the dtype, such as ``float32``.
        why: the reason for it, as the second half of a sentence.
    """

    compute: str
    why: str


def stored_dtype(settings: ModelSettings, headers: Headers) -> str:
    """The dtype that merged weights are rounded to: ``model.dtype``, or, for ``auto``, the base's dtype.

    Where the base has tensors of several dtypes, this is the one with the most scalars.
    """
    if settings.dtype != "auto":
        return settings.dtype
    scalars: Counter[torch.dtype] = Counter()
    for info in headers.values():
        if info.dtype.is_floating_point:
            scalars[info.dtype] += math.prod(info.shape)
    found = scalars.most_common(1)
    return str(found[0][0]).removeprefix("torch.") if found else COMPUTE_WIDE


def settled(config: Config, headers: Headers) -> Config:
    """The configuration with ``model.compute`` decided, if it can be decided without measuring.

    That is so where the user named a dtype, and where the weights are stored in float32, as float32 is then the only
    dtype that holds them exactly. Where ``evaluation.backend`` names another model class of lm-eval, the configuration
    is returned as it is, because that class chooses its dtype itself.

    Raises BadInput where the user named a dtype and another model class computes.
    """
    if config.evaluation.backend != "resident":
        if config.model.compute != "auto":
            raise BadInput(
                f"model.compute: the backend {config.evaluation.backend} chooses its dtype itself; leave the key "
                "out, or write the backend's own argument under evaluation.model_args."
            )
        return config
    if config.model.compute == "auto" and stored_dtype(config.model, headers) not in NARROW:
        return computing(config, COMPUTE_WIDE)
    return config


def is_open(config: Config) -> bool:
    """Whether the dtype of forward passes still has to be chosen by measuring."""
    return config.model.compute == "auto" and config.evaluation.backend == "resident"


def choose(config: Config, headers: Headers, device: str) -> ComputeChoice:
    """Time the weights' own dtype and float32 on matrices of the model's shapes, and choose the faster one.

    Takes half a second at most, and sets the number of threads of this process to that of a worker.

    Args:
        headers: shapes and dtypes of the base's tensors.
        device: where to measure, such as ``cpu`` or ``cuda``.
    """
    torch.set_num_threads(config.evaluation.threads)
    own, scalars = stored_dtype(config.model, headers), sum(math.prod(i.shape) for i in headers.values())
    if own not in NARROW:
        return ComputeChoice(COMPUTE_WIDE, f"the weights are {own}")
    if scalars * 4 > free_memory(device):
        return ComputeChoice(
            own, f"it is the weights' dtype, and the model in {COMPUTE_WIDE} does not fit into memory here"
        )
    return _choose(own, _shapes(headers), device)


def choose_for_any(own: str, device: str) -> ComputeChoice:
    """As ``choose``, but without a model: for weights of the dtype ``own`` and matrices of a typical small model."""
    return _choose(own, TYPICAL, device)


def refuse_compute(compute: str, device: str) -> None:
    """Check that a device can compute in a dtype.

    Raises BadInput where it cannot.
    """
    try:
        _operands(compute, (16, 16), device).multiply()
    except (RuntimeError, NotImplementedError) as error:
        raise BadInput(
            f"model.compute: {device} cannot compute in {compute} ({' '.join(str(error).split())[:120]}); write "
            f"{COMPUTE_WIDE}, or auto."
        ) from error


def _choose(own: str, shapes: Mapping[Shape, float], device: str) -> ComputeChoice:
    seconds = _timed([own, COMPUTE_WIDE], shapes, device)
    if own not in seconds:
        return ComputeChoice(COMPUTE_WIDE, f"{device} does not compute in {own}")
    ratio = seconds[own] / seconds[COMPUTE_WIDE]
    if 1 / ratio < WORTH:
        return ComputeChoice(COMPUTE_WIDE, f"{own} takes {ratio:.1f} times as long on this processor ({device})")
    return ComputeChoice(own, f"{COMPUTE_WIDE} takes {1 / ratio:.1f} times as long on this processor ({device})")


def _shapes(headers: Headers) -> dict[Shape, float]:
    """The shapes that hold the most scalars, with the number of matrices of each shape.

    An embedding is included, although its rows are only looked up, because most language models multiply by the same
    matrix in their head.
    """
    count: Counter[Shape] = Counter()
    for info in headers.values():
        if len(info.shape) == 2 and min(info.shape) > 1:
            count[info.shape[0], info.shape[1]] += 1
    largest = sorted(count, key=lambda shape: -count[shape] * math.prod(shape))[:SHAPES]
    return {shape: float(count[shape]) for shape in largest} or dict(TYPICAL)


def _timed(dtypes: Sequence[str], shapes: Mapping[Shape, float], device: str) -> dict[str, float]:
    """Seconds that one row takes through all matrices, by dtype. A dtype that the device cannot compute in is left out.

    The dtypes are measured in turn, so that a machine which is slow for a moment slows all of them.
    """
    operands: dict[tuple[str, Shape], _Operands] = {}
    for dtype in dtypes:
        with contextlib.suppress(RuntimeError, NotImplementedError):  # the device has no such arithmetic
            made = {(dtype, shape): _operands(dtype, _cut(shape), device) for shape in shapes}
            for each in made.values():
                each.multiply()
            operands |= made
    seconds = dict.fromkeys(operands, math.inf)
    until = time.perf_counter() + PATIENCE
    for turn in range(TIMING_ROUNDS):
        for key, each in operands.items():
            seconds[key] = min(seconds[key], each.multiply() * math.prod(key[1]) / math.prod(each.matrix.shape))
        if turn and time.perf_counter() > until:
            break
    return {
        dtype: sum(count * seconds[dtype, shape] for shape, count in shapes.items())
        for dtype in dict.fromkeys(dtype for dtype, _ in operands)
    }


def _cut(shape: Shape) -> Shape:
    """The shape of a part of a matrix (outputs, inputs), large enough to show how fast the matrix is multiplied."""
    return max(1, min(shape[0], SCALARS // shape[1])), min(shape[1], SCALARS)


@dataclass(frozen=True)
class _Operands:
    """The operands of a timed product: rows (rows, inputs) and a matrix (outputs, inputs)."""

    rows: Tensor
    matrix: Tensor

    def multiply(self) -> float:
        """Multiply, and return the seconds that it took for each row."""
        began = self._now()
        linear(self.rows, self.matrix)
        return (self._now() - began) / len(self.rows)

    def _now(self) -> float:
        if self.rows.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def _operands(dtype: str, shape: Shape, device: str) -> _Operands:
    rows = max(1, min(ROWS, OPERATIONS // (2 * math.prod(shape))))
    kind: torch.dtype = getattr(torch, dtype)
    sizes = (rows, shape[1]), shape
    return _Operands(*(torch.full(size, 0.5, dtype=kind, device=device) for size in sizes))
