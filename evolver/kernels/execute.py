"""A program of a merge method run over whole tensors by the loop in ``program.c``, in the threads of torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evolver.kernels import random
from evolver.kernels.encoded import RUN, Code

KIND_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.uint8: 4}


class _Job(ctypes.Structure):
    """``struct job`` in program.c."""

    _fields_ = [
        ("operations", ctypes.c_void_p), ("length", ctypes.c_int64), ("constants", ctypes.c_void_p),
        ("sources", ctypes.c_void_p), ("source_kinds", ctypes.c_void_p),
        ("targets", ctypes.c_void_p), ("target_kinds", ctypes.c_void_p),
        ("words", ctypes.c_void_p), ("draws", ctypes.c_int64), ("first", ctypes.c_int64),
        ("size", ctypes.c_int64), ("floats", ctypes.c_int64), ("doubles", ctypes.c_int64),
        ("results", ctypes.c_void_p),
        ("lows", ctypes.c_void_p), ("highs", ctypes.c_void_p), ("single", ctypes.c_void_p),
        ("rows", ctypes.c_int64), ("pairs", ctypes.c_int64), ("counts", ctypes.c_void_p), ("taken", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    ]  # fmt: skip


def handles(loops: ctypes.CDLL, dtype: torch.dtype) -> bool:
    """Whether ``run`` reads and writes tensors of that dtype."""
    return dtype in KIND_NUMBERS and (dtype != torch.float16 or bool(loops.has_float16()))


@dataclass
class Run:
    """A program on a stretch of scalars: see ``struct job``.

    Args:
        sources: tensors (n), floating, or of bits, uint8 (n / 8).
        targets: tensors (n) that are written to.
        words: of every stream of draws k0, k1, c2, c3.
        first: the place of the stretch among the scalars that are drawn for, whole blocks.
        results: how many sums and maxima the program has.
        edges: for rows of scores pairs of a lower and an upper edge, and which hold one value: (C, K), three times.
    """

    code: Code
    size: int
    sources: Sequence[Tensor]
    targets: Sequence[Tensor] = ()
    words: Sequence[Sequence[int]] = ()
    first: int = 0
    results: int = 0
    edges: tuple[Tensor, Tensor, Tensor] | None = None

    def run(self, loops: ctypes.CDLL) -> NDArray[np.float64]:
        """What the runs' sums and maxima are, (results, runs)."""
        found = np.empty((self.results, -(-self.size // RUN)))
        self._call(loops.run_program, found)
        return found

    def take(self, loops: ctypes.CDLL) -> tuple[Tensor, list[Tensor]]:
        """What ``take`` says of every row of scores: counts, int64 (2, C, K), and what was taken, C tensors."""
        assert self.edges is not None
        rows, pairs = self.edges[0].shape
        counts = np.zeros((-(-self.size // random.BLOCK), rows, 2 * pairs + 1), dtype=np.int64)
        taken = [np.empty(self.size, dtype=np.float32) for _ in range(rows)]
        self._call(loops.run_program, np.empty((0, 0)), counts, taken)
        self._call(loops.gather_taken, np.empty((0, 0)), counts, taken)
        scores = [torch.from_numpy(t[: c[-1]].copy()) for t, c in zip(taken, counts[0], strict=True)]
        return torch.from_numpy(counts[0, :, :-1].copy()).view(rows, 2, pairs).transpose(0, 1), scores

    def mask_by_rank(self, loops: ctypes.CDLL, first_kept: Tensor, columns: int, words: Sequence[int]) -> Tensor:
        """Which scalars stay by the rank in their rows of what the program makes of them; bits, uint8 (n / 8).

        Args:
            first_kept: see ``native.kept_by_rank``.
            words: of the stream of draws.
        """
        bits = torch.empty(-(-self.size // 8), dtype=torch.uint8)
        more = (first_kept.data_ptr(), ctypes.c_int64(columns), (ctypes.c_uint32 * 4)(*words), bits.data_ptr())
        row = replace(self, targets=[torch.empty(0)])  # every thread has one of its own
        row._call(
            loops.mask_by_rank, np.empty((0, 0)), more=[ctypes.c_void_p(m) if isinstance(m, int) else m for m in more]
        )
        return bits

    def _call(
        self,
        function: Any,
        results: NDArray[Any],
        counts: NDArray[Any] | None = None,
        taken: Sequence[NDArray[Any]] = (),
        more: Sequence[Any] = (),
    ) -> None:
        edges = [e.contiguous() for e in self.edges or ()]
        rows, pairs = edges[0].shape if edges else (0, 0)
        counts = np.zeros(1, dtype=np.int64) if counts is None else counts
        words = np.array([self.words[n] for n in self.code.draws], dtype=np.uint32)
        arrays = [
            np.array(n, dtype=t)
            for n, t in (
                ([s.data_ptr() for s in self.sources], np.uint64),
                ([KIND_NUMBERS[s.dtype] for s in self.sources], np.int32),
                ([t.data_ptr() for t in self.targets], np.uint64),
                ([KIND_NUMBERS[t.dtype] for t in self.targets], np.int32),
                ([t.ctypes.data for t in taken], np.uint64),
            )
        ]  # fmt: skip
        sources, source_kinds, targets, target_kinds, rows_of_taken = (a.ctypes.data for a in arrays)
        job = _Job(
            self.code.operations.ctypes.data, len(self.code.operations), self.code.constants.ctypes.data,
            sources, source_kinds, targets, target_kinds, words.ctypes.data, len(words), self.first,
            self.size, self.code.floats, self.code.doubles, results.ctypes.data,
            *[e.data_ptr() for e in edges or [_NONE] * 3], rows, pairs,
            counts.ctypes.data, rows_of_taken, torch.get_num_threads(),
        )  # fmt: skip
        if function(ctypes.byref(job), *more):
            raise MemoryError("no memory for a run of scalars")


_NONE = torch.zeros(1)


def sum_of_runs(loops: ctypes.CDLL, of_runs: NDArray[np.float64], piece: int) -> float:
    """The sum of a tensor from those of its runs, (r), as ``operators.total`` makes it of pieces of so many scalars."""
    runs = min(piece // RUN, len(of_runs)) or 1
    width = 1 << (runs - 1).bit_length()
    scratch, of_runs = np.empty(width), np.ascontiguousarray(of_runs)
    sizes = (ctypes.c_int64(n) for n in (len(of_runs), runs, width))
    found: float = loops.sum_of_runs(ctypes.c_void_p(of_runs.ctypes.data), *sizes, ctypes.c_void_p(scratch.ctypes.data))
    return found
