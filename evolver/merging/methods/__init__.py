"""The registry of merge methods: one function each, whose signature is its settings and its search space.

The first parameter says what a method works on: ``deltas`` are task vectors (E, *shape) against the base, and the
merged delta is returned; ``models`` are the weights themselves. Keyword-only parameters are settings. Annotate one
with ``Range`` or ``Simplex`` and a search can tune it. A parameter ``tensor`` is handed in, not set: the tensor's
name, for methods that draw at random.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from evolver.errors import BadInput, nearest
from evolver.records import Value


@dataclass(frozen=True)
class Range:
    """A number for all experts alike, searched between ``low`` and ``high``."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Simplex:
    """One number for each expert, searched over non-negative weights that sum to 1."""


@dataclass(frozen=True)
class Setting:
    """One setting of a method: its type, its default, and how a search may vary it (None: not searched)."""

    name: str
    parameter: str
    kind: type
    default: Any
    search: Range | Simplex | None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A merge method as the registry knows it."""

    name: str
    function: Callable[..., Tensor]
    paper: str
    on_deltas: bool
    elementwise: bool
    draws: bool
    settings: Mapping[str, Setting]

    def complete(self, given: Mapping[str, Any], experts: int, place: str) -> dict[str, Value]:
        """``given`` checked, defaults filled in, one weight an expert.

        Raises BadInput that names ``place`` and the setting.
        """
        for key in given:
            if key not in self.settings:
                raise BadInput(f"{place}: {self.name} has no setting {key!r}; {nearest(key, self.settings)}")
        return {s.name: _checked(s, given.get(s.name, s.default), experts, place) for s in self.settings.values()}

    def __call__(self, stack: Tensor, values: Mapping[str, Value], tensor: str) -> Tensor:
        """Apply to a float32 ``stack`` (E, *shape) of the tensor named ``tensor``: (*shape)."""
        arguments: dict[str, Any] = {s.parameter: values[s.name] for s in self.settings.values()}
        if self.draws:
            arguments["tensor"] = tensor
        return self.function(stack, **arguments)


METHODS: dict[str, Method] = {}


def method(paper: str, elementwise: bool = False) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a merge method under its function's name.

    Args:
        paper: where it was published.
        elementwise: every output scalar depends on the input scalars at its own place only, so that tensors may be
            cut in pieces.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        parameters = inspect.signature(function).parameters
        hints = typing.get_type_hints(function, include_extras=True)
        settings = {}
        for parameter in list(parameters.values())[1:]:
            if parameter.name != "tensor":
                setting = _setting(parameter, hints[parameter.name])
                settings[setting.name] = setting
        METHODS[function.__name__] = Method(
            function.__name__,
            function,
            paper,
            on_deltas=next(iter(parameters)) == "deltas",
            elementwise=elementwise,
            draws="tensor" in parameters,
            settings=settings,
        )
        return function

    return register


def get(name: str, place: str) -> Method:
    """The method of that name.

    Raises BadInput, naming ``place`` and the nearest known methods.
    """
    if name not in METHODS:
        raise BadInput(f"{place}: unknown merge method {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]


def _setting(parameter: inspect.Parameter, hint: Any) -> Setting:
    search, choices, kind = None, (), hint
    if typing.get_origin(hint) is typing.Annotated:
        kind, search = typing.get_args(hint)[:2]
    if typing.get_origin(kind) is Literal:
        kind, choices = str, typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        kind = tuple
    # ``lambda`` is a word of the language, so its parameter is called lambda_.
    return Setting(parameter.name.rstrip("_"), parameter.name, kind, parameter.default, search, choices)


def _checked(setting: Setting, value: Any, experts: int, place: str) -> Value:
    where = f"{place}.{setting.name}"
    number = _is_number(value)
    if setting.kind is tuple:
        weights = [value] * experts if number else value
        if not isinstance(weights, list | tuple) or not all(map(_is_number, weights)):
            raise BadInput(f"{where}: {value!r} is not usable; write a number, or a list of one number an expert.")
        weights = list(weights) * experts if len(weights) == 1 else weights
        if len(weights) != experts:
            raise BadInput(f"{where}: {len(weights)} numbers for {experts} experts; write one for each.")
        return tuple(float(w) for w in weights)
    if setting.kind is float:
        if not number:
            raise BadInput(f"{where}: {value!r} is not usable; write a number.")
        if isinstance(setting.search, Range) and setting.name == "density" and not 0 < value <= 1:
            raise BadInput(f"{where}: {value} is not usable; write a number above 0 and up to 1.")
        return float(value)
    if setting.choices and value not in setting.choices:
        raise BadInput(f"{where}: unknown choice {value!r}; {nearest(str(value), setting.choices)}")
    if not isinstance(value, setting.kind):
        raise BadInput(f"{where}: {value!r} is not usable; write a value of type {setting.kind.__name__}.")
    return typing.cast(Value, value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


from evolver.merging.methods import averages, sparse  # noqa: E402, F401  # they register themselves in METHODS
