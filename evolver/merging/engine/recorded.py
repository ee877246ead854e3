"""A merge method on one tensor by the loop in C: recorded once, then run over all scalars at a time.

The plain twin of everything here is in ``pieces``; the bits are the same.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evolver.kernels import execute
from evolver.kernels.encoded import FLOAT32, Operation
from evolver.kernels.program import Program, RankMask, Reduced, Traced
from evolver.merging.engine import order
from evolver.merging.engine.step import Step
from evolver.merging.methods import operators
from evolver.merging.methods.here import NeedsAnswer, Stack

# Scores are taken out of so many scalars at a time, so that what is taken is held and not the whole tensor.
STRETCH = 1 << 22
# Records that are kept: tensors that are merged alike share one.
KEPT_RECORDS = 256


@dataclass
class Record:
    """What a method does with the scalars of any tensor: asks a question, or merges.

    Args:
        seed: of the draws that it uses.
    """

    program: Program
    asked: NeedsAnswer | None = None
    merged: Traced | None = None
    seed: int | None = None


@dataclass
class _Sources:
    """Hands stand-ins to a method that is recorded."""

    record: Record
    experts: int
    place: Tensor | None

    def depth(self) -> Tensor | None:
        return self.place

    def draws(self, seed: int) -> Any:
        self.record.seed = seed
        return [self.record.program.add("draw", FLOAT32, (), n) for n in range(self.experts)]

    def once(self, make: Callable[[], Stack]) -> Any:
        return make()


_records: OrderedDict[Any, Record | None] = OrderedDict()


def record(step: Step, known: Sequence[Tensor], numbers: Sequence[Tensor], place: Tensor | None) -> Record | None:
    """The record of a step at these numbers and answers; None where it does what the loop does not know."""
    given = [t if t is None else (str(t.dtype), tuple(t.shape), t.numpy().tobytes()) for t in (*known, *numbers, place)]
    key = (step.method.function, step.identity, step.flags.get("seed"), tuple(given))
    if key not in _records:
        _records[key] = _recorded(step, known, numbers, place)
        if len(_records) > KEPT_RECORDS:
            _records.popitem(last=False)
    return _records[key]


def _recorded(step: Step, known: Sequence[Tensor], numbers: Sequence[Tensor], place: Tensor | None) -> Record | None:
    out = Record(Program(step.experts + 1))
    tensors: list[Any] = [out.program.add("load", FLOAT32, (), n) for n in range(step.experts + 1)]
    try:
        merged = step.merged([*tensors, *known, *numbers], _Sources(out, step.experts, place))
        if not isinstance(merged, Traced):
            return None
        out.merged = merged.float()
    except NeedsAnswer as asked:
        if not all(isinstance(v, Traced | Reduced) for v in asked.value):
            return None
        out.asked = asked
    except Exception:  # Unknown, or an error of the method's own, which the plain code will show
        return None
    return out


class Recorded:
    """A record on one tensor.

    Args:
        inputs: E and the base, flat.
        words: of the streams of its draws.
        piece: scalars of a piece, by which sums are made as in plain code; whole rows.
        columns: scalars of a row.
        masks: what was made for the tensor before, and where it is kept: bits, uint8, by mask.
    """

    def __init__(
        self, loops: ctypes.CDLL, record: Record, inputs: Sequence[Tensor], words: Sequence[Sequence[int]], piece: int,
        columns: int, masks: dict[RankMask, Tensor],
    ) -> None:  # fmt: skip
        self.loops, self.record, self.words, self.piece, self.columns = loops, record, words, piece, columns
        self.size = inputs[0].numel()
        self.inputs = list(inputs)
        for missing in [m for m in record.program.masks if m not in masks]:
            masks[missing] = self._bits(missing)
        self.sources = [*inputs, *(masks[m] for m in record.program.masks)]

    def _bits(self, mask: RankMask) -> Tensor:
        first_kept = operators.first_kept(self.columns, mask.density, mask.epsilon, torch.device("cpu"))
        sizes = execute.Run(self.record.program.code([mask.sizes]), self.size, self.inputs)
        return sizes.mask_by_rank(self.loops, first_kept, self.columns, self.words[mask.stream])

    def merge(self, out: Tensor) -> None:
        """Writes the merged tensor to ``out``, flat, of any floating dtype."""
        assert self.record.merged is not None
        self._store([self.record.merged], [out], self.sources, self.size)

    def reduced(self, dtype: torch.dtype) -> Tensor:
        """The answer to a question for a sum or a maximum."""
        asked, program = self._asked(), self.record.program
        runs = self._run(program.results, self.sources, self.size, results=len(program.results)).run(self.loops)
        found = [
            float(of.max()) if r.name == "largest" else execute.sum_of_runs(self.loops, of, self.piece)
            for r, of in zip(program.results, runs, strict=True)
        ]
        (value,) = asked.value
        assert isinstance(value, Reduced)
        return torch.tensor(found, dtype=dtype)[value.places]

    def scores(self, sources: Sequence[Tensor] | None = None) -> list[Tensor]:
        """What all scalars, or those of other sources, say to a question of order: C tensors, flat."""
        there, rows = sources or self.sources, self._scores()
        size = there[0].numel()
        out = [torch.empty(size) for _ in rows]
        self._store(rows, out, there, size)
        return out

    def taken(self, edges: Tensor) -> Iterator[order.Taken]:
        """As ``order.take``, of a stretch at a time."""
        lows, highs = edges.unbind(2)
        sinks = [Operation("take", FLOAT32, (row.number,)) for row in self._scores()]
        for start in range(0, self.size, STRETCH):
            size = min(STRETCH, self.size - start)
            # Bits stand eight in a byte.
            parts = [s[start // 8 :] if s.dtype == torch.uint8 else s[start:] for s in self.sources]
            run = self._run(sinks, parts, size, first=start, edges=(lows, highs, order.hold_one_value(edges)))
            (above, inside), scores = run.take(self.loops)
            yield order.Taken(above, inside, scores)

    def _store(self, rows: Sequence[Traced], targets: Sequence[Tensor], sources: Sequence[Tensor], size: int) -> None:
        sinks = [Operation("store", FLOAT32, (row.number,)) for row in rows]
        self._run(sinks, sources, size, targets=targets).run(self.loops)

    def _run(self, sinks: Sequence[Operation], sources: Sequence[Tensor], size: int, **more: Any) -> execute.Run:
        return execute.Run(self.record.program.code(sinks), size, sources, words=self.words, **more)

    def _asked(self) -> NeedsAnswer:
        assert self.record.asked is not None
        return self.record.asked

    def _scores(self) -> list[Traced]:
        rows = self._asked().value
        assert all(isinstance(row, Traced) for row in rows)
        return rows  # type: ignore[return-value]
