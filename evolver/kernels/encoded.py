"""Recorded operations as the loop in ``program.c`` takes them: numbered, with registers that are used again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FLOAT32, FLOAT64, MASK = "float32", "float64", "mask"
# Scalars of a run, whose sum is made by halves: RUN in program.c.
RUN = 512
# Names as in program.c, in its order.
OPERATION_CODES = {
    name: code
    for code, name in enumerate(
        "load draw fill add sub mul div maximum minimum less less_equal equal both either not where sign abs number "
        "wide narrow wide_add wide_sub wide_mul wide_div sum sum_float sum_product largest take store".split()
    )
}


@dataclass(frozen=True)
class Operation:
    """On the results of earlier operations, by number (int), and on numbers that are written down (str, hexadecimal).

    Args:
        place: of a source, of draws or of a result.
    """

    name: str
    kind: str
    operands: tuple[int | str, ...] = ()
    place: int = 0

    @property
    def needs(self) -> list[int]:
        return [o for o in self.operands if isinstance(o, int)]


@dataclass(frozen=True)
class Code:
    """What program.c takes.

    Args:
        operations: int32 (operations, 5).
        constants: the numbers that they use.
        draws: which streams of draws they use, by their places in this row.
        floats, doubles: how many registers there are of each width.
    """

    operations: npt.NDArray[np.int32]
    constants: npt.NDArray[np.float64]
    draws: tuple[int, ...]
    floats: int
    doubles: int


class _Registers:
    def __init__(self) -> None:
        self.free: list[int] = []
        self.count = 0

    def take(self) -> int:
        if self.free:
            return self.free.pop()
        self.count += 1
        return self.count - 1


def encoded(order: Sequence[tuple[int | None, Operation]]) -> Code:
    """Operations in the order in which they are run, with their numbers; results have none."""
    last = {n: at for at, (_, operation) in enumerate(order) for n in operation.needs}
    floats, doubles = _Registers(), _Registers()
    banks = {FLOAT32: floats, MASK: floats, FLOAT64: doubles}
    kinds = {number: operation.kind for number, operation in order if number is not None}
    register: dict[int, int] = {}
    constants: dict[str, int] = {}
    draws: dict[int, int] = {}
    rows = []
    for at, (number, operation) in enumerate(order):
        given = [
            register[o] if isinstance(o, int) else ~constants.setdefault(o, len(constants)) for o in operation.operands
        ]
        for needed in set(operation.needs):
            if last[needed] == at:
                banks[kinds[needed]].free.append(register[needed])
        if number is not None:
            register[number] = banks[operation.kind].take()
        if operation.name == "load":
            given = [operation.place]
        elif operation.name == "draw":
            given = [draws.setdefault(operation.place, len(draws))]
        rows.append([OPERATION_CODES[operation.name], operation.place if number is None else register[number], *given])
    padded = np.array([row + [0] * (5 - len(row)) for row in rows], dtype=np.int32).reshape(-1, 5)
    numbers = np.array([float.fromhex(c) for c in constants])
    return Code(padded, numbers, tuple(draws), floats.count, doubles.count)
