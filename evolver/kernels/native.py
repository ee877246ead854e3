"""The innermost loops in C, compiled once for a machine; where there is no compiler, their plain twins do the same."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evolver.errors import BadInput
from evolver.kernels.machine import digest_of, kernel_folder, make_kernel_folder, processor_of

SOURCES = [Path(__file__).with_name(name) for name in ("native.h", "native.c", "program.c")]
# Operations are not contracted or reordered: every one is rounded alone, as torch rounds it.
FLAGS = (
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-shared",
    "-fPIC",
)
# One thread is better than none, and so is code for any processor of the kind.
BEST_FIRST = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())

# The bits of a number's exponent.
EXPONENTS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


def compiler() -> str | None:
    """The C compiler, or None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def library_file() -> Path:
    """Where the compiled loops of this machine are kept: a name for each source, processor and set of options."""
    key = f"{[digest_of(str(s)) for s in SOURCES]} {processor_of(torch.device('cpu'))} {BEST_FIRST} {FLAGS}"
    return kernel_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, or None where they cannot be compiled."""
    with_compiler, file = compiler(), library_file()
    try:
        if not file.exists():
            if with_compiler is None:
                return None
            _compile(with_compiler, file)
        loops = ctypes.CDLL(str(file))
    except (OSError, subprocess.CalledProcessError) as error:
        warnings.warn(f"The loops in C were not compiled, the plain code runs in their place: {error}", stacklevel=2)
        return None
    loops.take.restype, loops.sum_of_runs.restype = ctypes.c_int64, ctypes.c_double
    loops.select_rank.restype = ctypes.c_float
    return loops


def compile_loops() -> float:
    """Compile the loops where they are not there yet; seconds that it took.

    Raises BadInput where they cannot be compiled.
    """
    began, found, file = time.perf_counter(), compiler(), library_file()
    if file.exists():
        return 0.0
    if found is None:
        raise BadInput("CC: there is no C compiler on this machine; install gcc or clang, or name one in CC.")
    try:
        _compile(found, file)
    except OSError as error:
        raise BadInput(f"EVOLVER_CACHE: {error}; set it to a folder that can be written.") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines() or ["it says nothing"]
        raise BadInput(f"CC: {found} does not compile the loops ({said[-1]}); name another compiler in CC.") from None
    return time.perf_counter() - began


def _compile(compiler: str, file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=make_kernel_folder()) as folder:
        made, sources = Path(folder) / file.name, [str(s) for s in SOURCES if s.suffix == ".c"]
        for more in BEST_FIRST:
            command = [compiler, *more, *FLAGS, *sources, "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
        done.check_returncode()
        os.replace(made, file)


def draw_blocks(loops: ctypes.CDLL, words: Sequence[int], first: int, out: Tensor) -> None:
    """``random.fill``: draws for whole blocks from block ``first`` on, to ``out``, float32 (blocks, HALVES, LANES).

    Args:
        words: k0, k1, c2, c3 of 32 bits.
    """
    loops.draws((ctypes.c_uint32 * 4)(*words), ctypes.c_uint64(first), ctypes.c_int64(out.shape[0]), _at(out))


def take_row(loops: ctypes.CDLL, scores: Tensor, lows: Tensor, highs: Tensor, single: Tensor) -> tuple[Tensor, Tensor]:
    """``order.take`` for one row of scores, float32 (n), and K pairs of edges, float32 (K) each.

    Args:
        single: pairs of which nothing is taken, bool (K).

    Returns:
        How many scores are above each upper edge, and how many inside each pair, int64 (2, K); and what was taken.
    """
    scores, lows, highs, single = (t.contiguous() for t in (scores, lows, highs, single))
    counts, out = torch.empty(2, len(lows), dtype=torch.int64), torch.empty(scores.numel())
    size, pairs = ctypes.c_int64(scores.numel()), ctypes.c_int64(len(lows))
    taken = loops.take(_at(scores), size, _at(lows), _at(highs), _at(single), pairs, _at(counts), _at(out))
    if taken < 0:
        raise MemoryError("no memory for the counts of a piece")
    return counts, out[:taken].clone()


def kept_rows(loops: ctypes.CDLL, sizes: Tensor, draws: Tensor, first_kept: Tensor) -> Tensor:
    """``operators.kept_by_rank``: which scalars stay, bool (rows, columns).

    Args:
        sizes, draws: float32 (rows, columns), not negative.
        first_kept: from which rank on a draw keeps a scalar, int32 (65536).
    """
    sizes, draws = sizes.contiguous(), draws.contiguous()
    kept = torch.empty(sizes.shape, dtype=torch.bool)
    rows, width = (ctypes.c_int64(n) for n in sizes.shape)
    if loops.kept_by_rank(_at(sizes), _at(draws), _at(first_kept), rows, width, _at(kept)):
        raise MemoryError("no memory for one row of a tensor")
    return kept


def select_rank(loops: ctypes.CDLL, row: NDArray[np.float32], rank: int) -> float:
    """The score of a rank, 0 for the smallest, of a row of scores, which are not negative."""
    row, scratch = np.ascontiguousarray(row), np.empty(row.size, dtype=np.uint32)
    places = (ctypes.c_void_p(a.ctypes.data) for a in (row, scratch))
    found: float = loops.select_rank(next(places), ctypes.c_int64(row.size), ctypes.c_int64(rank), next(places))
    return found


def all_finite(loops: ctypes.CDLL, tensor: Tensor) -> bool:
    """Whether no number of a contiguous tensor is NaN or infinite; float32, bfloat16 or float16."""
    wide, size = tensor.dtype == torch.float32, ctypes.c_int64(tensor.numel())
    exponent = EXPONENTS[tensor.dtype]
    if wide:
        return bool(loops.all_finite32(_at(tensor), size, ctypes.c_uint32(exponent)))
    return bool(loops.all_finite16(_at(tensor), size, ctypes.c_uint16(exponent)))


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
