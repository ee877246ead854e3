"""Fused kernels of a GPU: functions of tensors, compiled ahead of time, once for a machine, with the plain code's bits.

A kernel takes seconds to compile and a millisecond to load, so it is kept in the cache of this user. What is not
compiled yet runs as plain code; whoever computes cannot tell the two apart but by the time. On a CPU the loop of
``program.c`` does the same without a kernel for each method.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evolver.kernels.machine import digest_of, kernel_folder, make_kernel_folder, processor_of

TensorFunction = Callable[..., tuple[Tensor, ...]]
Kernel = Callable[[list[Tensor]], list[Tensor]]

# A GPU's compiler would contract a product and a sum into one rounding, which the plain code does not.
OPTIONS = {"emulate_precision_casts": True}
# What functions are made of, beside the file that they stand in: a kernel is made anew where one of these changed.
PACKAGE = Path(__file__).parents[1]
INGREDIENTS = (
    "kernels/compiled.py", "kernels/random.py", "merging/crossing.py", "merging/engine/step.py",
    "merging/methods/here.py", "merging/methods/operators.py",
)  # fmt: skip
# The length that kernels are compiled for; they take every other one from LEAST on.
LENGTH, LEAST = 1 << 17, 2


class Kernels:
    """The kernels of this machine.

    Args:
        build: compile what is missing; without it only what is there already is used.
    """

    def __init__(self, build: bool = True) -> None:
        self.build = build
        self._loaded: dict[str, Kernel | None] = {}

    def get(
        self, function: TensorFunction, like: Sequence[Tensor], long: Sequence[bool], identity: str
    ) -> Kernel | None:
        """``function`` as a kernel, or None where there is none (a CPU; no compiler; not compiled yet; it failed).

        Args:
            function: of tensors, returning a tuple of tensors; may write to its arguments.
            like: tensors as it will be called with.
            long: for each whether its first dimension is the length of a piece, which varies.
            identity: tells it from other functions, and from itself with other things than tensors fixed.
        """
        if like[0].device.type == "cpu":
            return None
        signature = [(t.dtype, t.device.type, tuple(t.shape[n:])) for t, n in zip(like, long, strict=True)]
        key = f"{identity} {signature}"
        if key not in self._loaded:
            self._loaded[key] = self._find(function, like, long, key)
        return self._loaded[key]

    def _find(self, function: TensorFunction, like: Sequence[Tensor], long: Sequence[bool], key: str) -> Kernel | None:
        device = like[0].device
        name = hashlib.sha256(
            f"{key} {processor_of(device)} {sorted(OPTIONS.items())} {ingredients()}".encode()
        ).hexdigest()
        file = kernel_folder() / f"{name[:32]}.pt2"
        if file.exists():
            try:
                return _load(file, device)
            except RuntimeError:  # a damaged file
                file.unlink(missing_ok=True)
        if not (self.build and can_compile(device)):
            return None
        try:
            _compile(function, like, long, file)
            return _load(file, device)
        except Exception as error:  # the compiler's own errors are of every kind; the plain code does the same
            warnings.warn(f"A kernel was not compiled, the plain code runs in its place: {error}", stacklevel=2)
            return None


@cache
def ingredients() -> str:
    """Digest of the sources that all kernels have in common."""
    return "".join(digest_of(str(PACKAGE / name)) for name in INGREDIENTS)


@cache
def can_compile(device: torch.device) -> bool:
    """Whether this machine can build kernels: for a GPU, with a C++ compiler and Triton."""
    host = any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++"))
    return device.type != "cpu" and host and torch.utils._triton.has_triton()


class _Module(torch.nn.Module):
    def __init__(self, function: TensorFunction) -> None:
        super().__init__()
        self.function = function

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return self.function(*tensors)


def _compile(function: TensorFunction, like: Sequence[Tensor], long: Sequence[bool], file: Path) -> None:
    length = torch.export.Dim("length", min=LEAST)
    example = [_sized(t) if n else t for t, n in zip(like, long, strict=True)]
    shapes = [{0: length} if n else None for n in long]
    with tempfile.TemporaryDirectory(dir=make_kernel_folder()) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's notes on its own deprecations
        program = torch.export.export(_Module(function), (example,), dynamic_shapes=(shapes,), strict=False)
        # Of the options a copy: the compiler adds its own to them, and they are part of a kernel's name.
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "kernel.pt2"), inductor_configs=dict(OPTIONS)
        )
        os.replace(made, file)


def _sized(tensor: Tensor) -> Tensor:
    return torch.zeros(
        LENGTH // max(1, tensor[:1].numel()), *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device
    )


def _load(file: Path, device: torch.device) -> Kernel:
    # The public loader imports the whole compiler first, which takes a thousand times as long as loading.
    from torch._C._aoti import AOTIModelPackageLoader

    index = -1 if device.index is None else device.index
    run: Kernel = AOTIModelPackageLoader(str(file), "model", False, 1, index).run
    return run


def identity_of(**fixed: Any) -> str:
    """What a function was specialised on, in one line."""
    return " ".join(f"{k}={v}" for k, v in sorted(fixed.items()))
