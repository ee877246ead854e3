"""Fused kernels by torch.compile, with the bits of the eager code."""

from __future__ import annotations

import shutil
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

# A GPU's compiler would contract a product and a sum into one rounding, which the eager code does not.
AS_EAGER: dict[str, str | int | bool | Callable[..., Any]] = {"emulate_precision_casts": True}


@cache
def can_compile(device: torch.device) -> bool:
    """Whether this machine can build fused kernels: a GPU with Triton, or a C++ compiler."""
    if device.type != "cpu":
        return torch.utils._triton.has_triton()
    return any(shutil.which(c) for c in ("g++", "clang++", "c++"))


def fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled for all sizes of its tensors.

    The compiler keeps at most eight kernels for one code object and then silently goes back to eager code, so every
    use gets a code object of its own.
    """
    code = function.__code__
    copy = types.FunctionType(code.replace(co_firstlineno=code.co_firstlineno), function.__globals__, function.__name__)
    return torch.compile(copy, dynamic=True, options=AS_EAGER)
