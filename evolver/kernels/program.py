"""A merge method's operations on a piece, recorded, for the loop in ``program.c`` to run over a whole tensor.

A method is called once with stand-ins for its tensors, which write down what is done with them. Every operation that is
known here is done by the loop as torch does it, scalar by scalar and rounded alone, so that the bits are those of the
plain code. A method that does something else raises ``Unknown`` and runs as plain code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evolver.kernels.encoded import FLOAT32, FLOAT64, MASK, Code, Operation, encoded


class Unknown(Exception):  # not an error: the plain code is to run
    """What a method does to its tensors is no operation of the loop."""


class Program:
    """Operations that were recorded; an equal one is recorded once.

    Args:
        inputs: tensors that it reads; masks that are made beforehand are read after them.
    """

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.operations: list[Operation] = []
        self.results: list[Operation] = []  # sums and maxima
        self.masks: list[RankMask] = []
        self._known: dict[Operation, int] = {}
        self._codes: dict[tuple[Operation, ...], Code] = {}

    def add(self, name: str, kind: str, operands: Sequence[int | str] = (), place: int = 0) -> Traced:
        """What stands for the operation's result."""
        operation = Operation(name, kind, tuple(operands), place)
        if operation not in self._known:
            self._known[operation] = len(self.operations)
            self.operations.append(operation)
        return Traced(self, self._known[operation], kind)

    def kept_by_rank(self, sizes: Traced, draws: Traced, density: float, epsilon: float) -> Traced:
        """What stands for a mask that is made before the program is run."""
        if self.operations[draws.number].name != "draw":
            raise Unknown("draws that were changed")
        size = Operation("store", FLOAT32, (sizes.number,))
        order: list[tuple[int | None, Operation]] = []
        self._place(size, order, set())
        if any(o.name == "draw" or (o.name == "load" and o.place >= self.inputs) for _, o in order):
            raise Unknown("sizes that depend on chance or on another mask")
        mask = RankMask(size, self.operations[draws.number].place, density, epsilon)
        if mask not in self.masks:
            self.masks.append(mask)
        return self.add("load", MASK, (), self.inputs + self.masks.index(mask))

    def result(self, name: str, of: Traced) -> Reduced:
        """The sum of all scalars, in float64, or the largest of them."""
        operation = Operation(name, of.kind, (of.number,))
        made = self.operations[of.number]
        if name == "sum" and made.name == "wide":
            operation = Operation("sum_float", FLOAT32, made.operands)
        elif name == "sum" and made.name == "wide_mul":
            factors = [self.operations[n] for n in made.needs]
            if len(factors) == 2 and all(f.name == "wide" for f in factors):
                operation = Operation("sum_product", FLOAT32, tuple(f.needs[0] for f in factors))
        if operation not in self.results:
            self.results.append(operation)
        return Reduced(torch.tensor(self.results.index(operation)))

    def code(self, sinks: Sequence[Operation]) -> Code:
        """What the loop runs for these last operations, and all that they need."""
        key = tuple(sinks)
        if key not in self._codes:
            order: list[tuple[int | None, Operation]] = []
            placed: set[int] = set()
            for place, sink in enumerate(sinks):
                self._place(sink, order, placed)
                order.append((None, replace(sink, place=place)))
            self._codes[key] = encoded(order)
        return self._codes[key]

    def _place(self, sink: Operation, order: list[tuple[int | None, Operation]], placed: set[int]) -> None:
        """Each operation just before it is needed, so that few registers are in use at a time."""
        stack = [(n, False) for n in reversed(sink.needs)]
        while stack:
            number, ready = stack.pop()
            if number in placed:
                continue
            operation = self.operations[number]
            if ready:
                placed.add(number)
                order.append((number, operation))
            else:
                stack.append((number, True))
                stack.extend((n, False) for n in reversed(operation.needs))


@dataclass(frozen=True)
class RankMask:
    """A mask that whole rows decide about: ``operators.kept_by_rank`` of recorded sizes and a stream of draws."""

    sizes: Operation
    stream: int
    density: float
    epsilon: float


TYPES = {torch.float32: FLOAT32, torch.float64: FLOAT64}


class Traced:
    """Stands for a method's tensor of scalars: float32, float64 or a mask."""

    device, is_cpu, is_cuda = torch.device("cpu"), True, False

    def __init__(self, program: Program, number: int, kind: str) -> None:
        self.program, self.number, self.kind = program, number, kind

    @property
    def dtype(self) -> torch.dtype:
        return {FLOAT32: torch.float32, FLOAT64: torch.float64, MASK: torch.bool}[self.kind]

    def __getattr__(self, name: str) -> Any:
        raise Unknown(name)

    def _refuse(self, *_: Any) -> Any:
        raise Unknown("more than an operation on scalars")

    __bool__ = __float__ = __int__ = __len__ = __iter__ = __getitem__ = _refuse

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "").strip("_")
        known = FUNCTIONS.get(name)
        if known is None or (kwargs and name != "zeros_like"):
            raise Unknown(name)
        return known(*args)

    def _with(self, name: str, left: Any, right: Any) -> Traced:
        """An operation on two, of which at least one is recorded, in the wider of their types."""
        pair = [v for v in (left, right) if isinstance(v, Traced)]
        kind = FLOAT64 if any(v.kind == FLOAT64 for v in pair) else FLOAT32
        if kind == FLOAT64 and name not in ("add", "sub", "mul", "div"):
            raise Unknown(f"{name} in float64")
        operands = [_operand(v, kind, pair[0].program) for v in (left, right)]
        named = f"wide_{name}" if kind == FLOAT64 else name
        return pair[0].program.add(named, MASK if name in COMPARISONS else kind, operands)

    def __add__(self, other: Any) -> Traced:
        return self._with("add", self, other)

    def __radd__(self, other: Any) -> Traced:
        return self._with("add", other, self)

    def __sub__(self, other: Any) -> Traced:
        return self._with("sub", self, other)

    def __rsub__(self, other: Any) -> Traced:
        return self._with("sub", other, self)

    def __mul__(self, other: Any) -> Traced:
        return self._with("mul", self, other)

    def __rmul__(self, other: Any) -> Traced:
        return self._with("mul", other, self)

    def __truediv__(self, other: Any) -> Traced:
        return self._with("div", self, other)

    def __rtruediv__(self, other: Any) -> Traced:
        return self._with("div", other, self)

    def __neg__(self) -> Traced:
        return self._with("mul", self, -1.0)

    def __lt__(self, other: Any) -> Traced:
        return self._with("less", self, other)

    def __gt__(self, other: Any) -> Traced:
        return self._with("less", other, self)

    def __le__(self, other: Any) -> Traced:
        return self._with("less_equal", self, other)

    def __ge__(self, other: Any) -> Traced:
        return self._with("less_equal", other, self)

    def __eq__(self, other: Any) -> Traced:  # type: ignore[override]  # scalar by scalar, as a tensor's
        return self._with("equal", self, other)

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Traced) -> Traced:
        return self._masks("both", self, other)

    def __or__(self, other: Traced) -> Traced:
        return self._masks("either", self, other)

    def __invert__(self) -> Traced:
        return self._masks("not", self)

    def _masks(self, name: str, *masks: Any) -> Traced:
        if not all(isinstance(m, Traced) and m.kind == MASK for m in masks):
            raise Unknown(name)
        return self.program.add(name, MASK, [m.number for m in masks])

    def abs(self) -> Traced:
        return self._only(FLOAT32).program.add("abs", FLOAT32, [self.number])

    def sign(self) -> Traced:
        return self._only(FLOAT32).program.add("sign", FLOAT32, [self.number])

    def square(self) -> Traced:
        return self * self

    def float(self) -> Traced:
        if self.kind == FLOAT32:
            return self
        return self.program.add("number" if self.kind == MASK else "narrow", FLOAT32, [self.number])

    def int(self) -> Traced:
        # Small whole numbers, as masks are counted; floats hold them exactly.
        return self._only(MASK).float()

    def double(self) -> Traced:
        return self if self.kind == FLOAT64 else self.program.add("wide", FLOAT64, [self.float().number])

    def to(self, like: Any) -> Traced:
        dtype = like.dtype if isinstance(like, Traced | Tensor) else like
        if dtype not in TYPES:
            raise Unknown(f"to {dtype}")
        return self.float() if TYPES[dtype] == FLOAT32 else self.double()

    def clamp(self, min: Any = None, max: Any = None) -> Traced:  # noqa: A002  # torch's names
        out = self._only(FLOAT32)
        # The bound comes first: of two zeros the second operand is taken, as by torch.
        out = out if min is None else self._with("maximum", min, out)
        return out if max is None else self._with("minimum", max, out)

    def amax(self) -> Reduced:
        return self.program.result("largest", self._only(FLOAT32))

    def total(self) -> Reduced:
        """Σ of all scalars in float64, as ``operators.total``."""
        return self.program.result("sum", self.double())

    def _only(self, kind: str) -> Traced:
        if self.kind != kind:
            raise Unknown(f"an operation on {self.kind}")
        return self


@dataclass(frozen=True)
class Reduced:
    """Stands for sums over a tensor, by their places among a program's results, int64 of any shape."""

    places: Tensor

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.stack or not all(isinstance(a, Reduced) for a in args[0]):
            raise Unknown(str(function))
        return cls(torch.stack([a.places for a in args[0]], **(kwargs or {})))

    def __getitem__(self, where: Any) -> Reduced:
        return Reduced(self.places[where])

    def unflatten(self, *how: Any) -> Reduced:
        return Reduced(self.places.unflatten(*how))

    def __getattr__(self, name: str) -> Any:
        raise Unknown(name)


def _operand(value: Any, kind: str, program: Program) -> int | str:
    """The number of an operation, or a number written down as torch would round it beside tensors of that kind."""
    if isinstance(value, Traced):
        return (value.double() if kind == FLOAT64 else value._only(FLOAT32)).number
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point() or (value.dim() and TYPES.get(value.dtype) != kind):
            raise Unknown("tensors of different shapes")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unknown(f"an operation with {value!r}")
    with np.errstate(over="ignore"):  # as torch does, without a word: it becomes infinite
        return float.hex(float(np.float32(value)) if kind == FLOAT32 else float(value))


def _where(condition: Any, left: Any, right: Any) -> Traced:
    if not isinstance(condition, Traced):
        raise Unknown("a choice by a number")
    condition._only(MASK)
    pair = [_operand(v, FLOAT32, condition.program) for v in (left, right)]
    return condition.program.add("where", FLOAT32, [*pair, condition.number])


def _zeros_like(like: Traced) -> Traced:
    return like.program.add("fill", like._only(FLOAT32).kind, [float.hex(0.0)])


def _method(name: str) -> Callable[..., Any]:
    return lambda tensor, *more: getattr(tensor, name)(*more) if isinstance(tensor, Traced) else NotImplemented


def _two(name: str) -> Callable[[Any, Any], Traced]:
    def of(left: Any, right: Any) -> Traced:
        return (left if isinstance(left, Traced) else right)._with(name, left, right)

    return of


def _turned(name: str) -> Callable[[Any, Any], Traced]:
    """With the operands in the other order."""
    return lambda left, right: _two(name)(right, left)


COMPARISONS = ("less", "less_equal", "equal")
# What torch calls its functions and a tensor's methods, without underscores.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: _two(name) for name in ("add", "sub", "mul", "div", "maximum", "minimum")},
    **{name: _two("div") for name in ("truediv", "true_divide")},
    "lt": _two("less"), "le": _two("less_equal"), "eq": _two("equal"),
    "gt": _turned("less"), "ge": _turned("less_equal"),
    **{name: _method(name) for name in ("abs", "sign", "square", "amax", "clamp")},
    "where": _where, "zeros_like": _zeros_like,
}  # fmt: skip
