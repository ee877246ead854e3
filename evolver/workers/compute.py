"""In which dtype forward passes run: in the weights' own, or in float32 where a processor is faster in it.

Processors without arithmetic for a narrow dtype convert every operand: bfloat16 is there up to ten times slower than
float32. Both dtypes that are tried hold the weights exactly; sums are rounded differently, so that one dtype is chosen
for a run, once, and every worker computes in it.
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
from evolver.config import Config, ModelSettings, computing
from evolver.errors import BadInput
from evolver.evaluation.live import free_memory

Headers = Mapping[str, TensorInfo]
Shape = tuple[int, int]

NARROW, COMPUTE_WIDE = ("bfloat16", "float16"), "float32"
# How many shapes are timed, with matrices of so many scalars at most, and so many rows or operations a product.
SHAPES, SCALARS, ROWS, OPERATIONS = 3, 1 << 22, 256, 10**9
# How often at most, and after how many seconds no other time.
TIMING_ROUNDS, PATIENCE = 5, 0.3
# A wider dtype has to be so much faster: it takes more memory.
WORTH = 0.9
# What stands for a model where there is none to look at: a layer of a model of this size.
TYPICAL = {(2304, 768): 12.0, (3072, 768): 12.0, (768, 3072): 12.0}


@dataclass(frozen=True)
class ComputeChoice:
    """A dtype for forward passes, and why it is this one, as the end of a sentence."""

    compute: str
    why: str


def stored_dtype(settings: ModelSettings, headers: Headers) -> str:
    """The dtype that a model's weights are rounded to; of several, the one of most scalars."""
    if settings.dtype != "auto":
        return settings.dtype
    scalars: Counter[torch.dtype] = Counter()
    for info in headers.values():
        if info.dtype.is_floating_point:
            scalars[info.dtype] += math.prod(info.shape)
    found = scalars.most_common(1)
    return str(found[0][0]).removeprefix("torch.") if found else COMPUTE_WIDE


def settled(config: Config, headers: Headers) -> Config:
    """The configuration with ``model.compute`` settled, if there is nothing to choose: for a dtype that was named, and
    for weights that no narrower dtype holds. Other classes of lm-eval compute as they do.

    Raises BadInput where a dtype was named, and another class computes.
    """
    if config.evaluation.backend != "resident":
        if config.model.compute != "auto":
            raise BadInput(
                f"model.compute: {config.evaluation.backend} computes as it does; leave it out, or write its own "
                "argument under evaluation.model_args."
            )
        return config
    if config.model.compute == "auto" and stored_dtype(config.model, headers) not in NARROW:
        return computing(config, COMPUTE_WIDE)
    return config


def is_open(config: Config) -> bool:
    """Whether a dtype has to be chosen by measuring it."""
    return config.model.compute == "auto" and config.evaluation.backend == "resident"


def choose(config: Config, headers: Headers, device: str) -> ComputeChoice:
    """The faster of the weights' own dtype and float32, timed on the shapes of a model's matrices on a device.

    Takes half a second at most, and sets the threads of this process to those of a worker.

    Args:
        headers: of the base.
    """
    torch.set_num_threads(config.evaluation.threads)
    own, scalars = stored_dtype(config.model, headers), sum(math.prod(i.shape) for i in headers.values())
    if own not in NARROW:
        return ComputeChoice(COMPUTE_WIDE, f"the weights are {own}")
    if scalars * 4 > free_memory(device):
        return ComputeChoice(own, f"the weights' dtype, as there is no room here for the model in {COMPUTE_WIDE}")
    return _choose(own, _shapes(headers), device)


def choose_for_any(own: str, device: str) -> ComputeChoice:
    """The same for weights of a dtype, with the shapes of a model of usual size."""
    return _choose(own, TYPICAL, device)


def refuse_compute(compute: str, device: str) -> None:
    """Raises BadInput where a device cannot compute in a dtype."""
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
    """The matrices with the most scalars: how many there are of a shape. Rows of an embedding are looked up only, but
    an embedding is the head, too, of most models that write.
    """
    count: Counter[Shape] = Counter()
    for info in headers.values():
        if len(info.shape) == 2 and min(info.shape) > 1:
            count[info.shape[0], info.shape[1]] += 1
    largest = sorted(count, key=lambda shape: -count[shape] * math.prod(shape))[:SHAPES]
    return {shape: float(count[shape]) for shape in largest} or dict(TYPICAL)


def _timed(dtypes: Sequence[str], shapes: Mapping[Shape, float], device: str) -> dict[str, float]:
    """Seconds of one row through all matrices, by dtype; measured in turn, as machines have moods."""
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
    """As much of a matrix (outputs, inputs) as tells how fast it is multiplied."""
    return max(1, min(shape[0], SCALARS // shape[1])), min(shape[1], SCALARS)


@dataclass(frozen=True)
class _Operands:
    """Rows (rows, inputs) and a matrix (outputs, inputs)."""

    rows: Tensor
    matrix: Tensor

    def multiply(self) -> float:
        """Seconds that one product takes, for a row."""
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
