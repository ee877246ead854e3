"""The registry of merge methods: one function each, whose signature is its settings and its search space.

The first parameter says what a method works on: ``deltas`` are task vectors against the base, and the merged delta is
returned; ``models`` are the weights themselves. It gets a piece of one tensor of E experts: E tensors (n) or, where it
declares ``rows``, (rows, columns), always float32. Keyword-only parameters are settings. Annotate one with ``Range`` or
``Simplex`` and a search can tune it, or with ``Measured`` if the user is to write a number for each expert; a setting
that is a tuple has one number an expert. Numbers arrive as float64
tensors, () or (E,), so that a change of a number never compiles a kernel anew: do not branch on them. A parameter
``here`` is handed in, not set: what a method may ask about the tensor beyond its piece.

A method that declares ``whole`` gets whole tensors in their own shapes instead of pieces. What it asks, it asks of
every tensor, and before it computes anything large, because each question calls it anew. It may want statistics of the
models beside their weights: a parameter annotated ``Of("gram")`` is handed one tensor an expert, or None where not
every expert has one for the tensor that is merged; ``Of("activation", base=True)`` those of the base on each expert's
items; and ``Of("gram", merged="regmean")`` those of the merge of all models by that method, again on each expert's
items. A signature that says none of this is refused when the method is registered.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from evolver.errors import BadInput, nearest
from evolver.records.recipe import Value


@dataclass(frozen=True)
class Range:
    """A number, searched between ``low`` and ``high``; valid above ``above``, from ``least`` and up to ``most``.

    ``around`` names another setting, which is a probability, if this number is a distance from it. Both ends, the
    probability minus the distance and plus the distance, have to lie between 0 and 1.
    """

    low: float
    high: float
    log: bool = False
    above: float = -math.inf
    least: float = -math.inf
    most: float = math.inf
    around: str = ""

    def refuses(self, value: float) -> bool:
        """Whether the number is outside what the method is defined for."""
        return not (value > self.above and self.least <= value <= self.most)

    @property
    def valid(self) -> str:
        """What the method is defined for, in words."""
        words = [f"above {self.above:g}"] * math.isfinite(self.above) + [f"from {self.least:g}"] * math.isfinite(
            self.least
        )
        return " and ".join([*words, *[f"up to {self.most:g}"] * math.isfinite(self.most)])


@dataclass(frozen=True)
class Simplex:
    """One number for each expert, searched over non-negative weights that sum to 1."""


@dataclass(frozen=True)
class Measured:
    """One number for each expert that was measured beforehand, such as its loss, above ``above``: it has no default,
    and no search tunes it.
    """

    above: float = -math.inf


@dataclass(frozen=True)
class Of:
    """Marks a parameter that is handed a statistic of every model: of this kind, under its collector's name.

    With ``base``, it is handed one of the base for every model: on the items on which that of the model is collected.
    With ``merged``, it is handed one of a merge of all models on the same items. That merge is made by the method of
    this name at its defaults, which needs the same statistic and no other, of the models themselves.
    """

    statistic: str
    base: bool = False
    merged: str = ""


@dataclass(frozen=True)
class Setting:
    """One setting of a method: its type, its default, and how a search may vary it (None: not searched). What was
    measured lies above ``above``.
    """

    name: str
    parameter: str
    kind: type
    default: Any
    search: Range | Simplex | None
    choices: tuple[str, ...] = ()
    required: bool = False
    above: float = -math.inf

    @property
    def options(self) -> tuple[bool | str, ...]:
        """The values that a search may choose among where they are no numbers; none for a setting of another kind."""
        return (False, True) if self.kind is bool else self.choices


@dataclass(frozen=True)
class Method:
    """A merge method as the registry knows it."""

    name: str
    function: Callable[..., Tensor]
    paper: str
    on_deltas: bool
    rows: bool
    slices: Callable[[Mapping[str, Value]], bool] | None
    whole: bool
    exact: bool
    takes: int | None
    least: int
    asks: bool
    symmetric: bool
    identity: Mapping[str, Any] | None
    divides: str | None
    settings: Mapping[str, Setting]
    # What is asked for by the parameters that are handed it.
    statistics: Mapping[str, Of]

    def in_force(self, checked: Mapping[str, Value], experts: int) -> dict[str, Value]:
        """The settings of a recipe, which were checked when it was composed, with defaults for what it leaves open."""
        out: dict[str, Value] = {}
        for setting in self.settings.values():
            value = checked.get(setting.name, setting.default)
            if setting.kind is tuple:
                value = value if isinstance(value, tuple) else (float(value),)
                out[setting.name] = value * experts if len(value) == 1 else value
            else:
                out[setting.name] = float(value) if setting.kind is float else value
        return out

    def complete(self, given: Mapping[str, Any], experts: int, place: str) -> dict[str, Value]:
        """``given`` checked, defaults filled in, one weight an expert.

        Raises BadInput that names ``place`` and the setting.
        """
        for setting in self.settings.values():
            if setting.required and setting.name not in given:
                raise BadInput(f"{place}.{setting.name}: missing; {self.name} has no default for it.")
        defaults = {s.name: s.default for s in self.settings.values()}
        checked = self.check({**defaults, **given}, experts, place)
        return {name: checked[name] for name in self.settings}

    def check(self, given: Mapping[str, Any], experts: int, place: str) -> dict[str, Value]:
        """``given`` checked, one weight an expert.

        Raises BadInput that names ``place`` and the setting.
        """
        for key in given:
            if key not in self.settings:
                raise BadInput(f"{place}: {self.name} has no setting {key!r}; {nearest(key, self.settings)}")
        if self.takes not in (None, experts):
            raise BadInput(f"{place}: {self.name} takes {self.takes} models, not {experts}.")
        if experts < self.least:
            raise BadInput(f"{place}: {self.name} takes {self.least} models and more, not {experts}.")
        checked = {k: _checked(self.settings[k], v, experts, place) for k, v in given.items()}
        self._refuse_sum_of_zero(checked, place)
        return checked

    def _refuse_sum_of_zero(self, checked: Mapping[str, Value], place: str) -> None:
        weights, divides = checked.get("weight"), self.divides
        if divides is None or not checked.get(divides, self.settings[divides].default):
            return
        if isinstance(weights, tuple) and abs(math.fsum(weights)) < SMALLEST_SUM:
            raise BadInput(
                f"{place}.weight: the weights {', '.join(f'{w:g}' for w in weights)} sum to 0, and {divides} divides "
                f"by their sum; write others, or {divides}: false."
            )

    def distances(self, given: Mapping[str, Value], experts: int) -> Iterator[tuple[str, float, float, float]]:
        """Settings that are distances from a probability below 1, for each expert.

        Args:
            given: checked settings; the others have their defaults.

        Yields the name of the setting, its value, the probability, and the largest distance that fits: of a larger one,
        the method uses only so much.
        """
        for name, setting in self.settings.items():
            if isinstance(setting.search, Range) and (around := setting.search.around):
                pair = {n: given.get(n, self.settings[n].default) for n in (name, around)}
                values, centres = (_listed(value, experts) for value in pair.values())
                for value, centre in zip(values, centres, strict=True):
                    if centre < 1:
                        yield name, value, centre, min(centre, 1 - centre)

    def refuse_cut(self, given: Mapping[str, Value], experts: int, place: str, tuned: Collection[str] = ()) -> None:
        """Refuse distances that the user wrote and that the method would have to make smaller. The defaults, and what a
        search chooses, may be too large: there the documentation says that they are cut.

        Args:
            given: checked settings that the user wrote.
            tuned: settings that a search chooses.

        Raises BadInput that names ``place``, the setting and the numbers that are possible.
        """
        for name, value, centre, room in self.distances(given, experts):
            around = typing.cast(Range, self.settings[name].search).around
            if value > room + ROUNDING and name in given and around not in tuned:
                raise BadInput(
                    f"{place}.{name}: {value:g} is too large for {around} {centre:g}, because {around} - {name} and "
                    f"{around} + {name} are probabilities; write a number from 0 to {room:g}."
                )

    def handed(self, values: Mapping[str, Value], device: torch.device) -> tuple[dict[str, Tensor], dict[str, Value]]:
        """Complete ``values`` as the function takes them: numbers as tensors; flags, counts and choices as they are."""
        given = {s.parameter: values[s.name] for s in self.settings.values()}
        numbers = {k: _tensor(v, device) for k, v in given.items() if isinstance(v, float | tuple)}
        return numbers, {k: v for k, v in given.items() if k not in numbers}


METHODS: dict[str, Method] = {}
# Weights whose sum is smaller in size cancel.
SMALLEST_SUM = 1e-8
# By so much a decimal number such as 1 - 0.9 may be off.
ROUNDING = 1e-9
# What the first parameter of a method may be called, and whether it then holds task vectors.
OPERANDS = {"models": False, "deltas": True}
# What a setting may be: a number, a switch, a count.
SETTING_KINDS = (Tensor, bool, int)


def number(value: float) -> Tensor:
    """The default of a setting that is one number: float64, ()."""
    return torch.tensor(value, dtype=torch.float64)


def each(value: float) -> Tensor:
    """The default of a setting with one number an expert: float64, (1,)."""
    return torch.tensor([value], dtype=torch.float64)


def method(
    paper: str,
    rows: bool = False,
    slices: Callable[[Mapping[str, Value]], bool] | None = None,
    takes: int | None = None,
    least: int = 1,
    symmetric: bool = True,
    identity: Mapping[str, Any] | None = MappingProxyType({}),
    divides: str | None = None,
    whole: bool = False,
    exact: bool = True,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a merge method under its function's name.

    Args:
        paper: where it was published.
        rows: the method looks at whole rows; its pieces are (rows, columns), a vector being one row.
        slices: says of the settings whether the rows of a tensor of more than two dimensions are its slices along the
            first one, instead of its vectors along the last.
        takes: how many models it merges; None: any number from ``least`` on.
        symmetric: the order of the models does not matter.
        identity: settings, beside a mass of one, with which copies of one model give that model; None: there are none.
        divides: the setting that asks for a division by the sum of all weights, which must not vanish then.
        whole: the method gets whole tensors in their own shapes, no pieces.
        exact: the result is the same bit for bit on every processor and with any number of threads.

    Raises TypeError for a signature that does not say what each parameter is.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name, parameters = function.__name__, inspect.signature(function).parameters
        first, *others = parameters.values()
        hints = typing.get_type_hints(function, include_extras=True)
        _check_operand(name, first, whole, rows)
        settings: dict[str, Setting] = {}
        statistics: dict[str, Of] = {}
        for parameter in (p for p in others if p.name != "here"):
            wanted = _statistic(hints.get(parameter.name))
            if wanted is None:
                setting = _setting(name, parameter, hints.get(parameter.name))
                settings[setting.name] = setting
            else:
                statistics[parameter.name] = wanted
        if statistics and not whole:
            raise TypeError(
                f"merge method {name}: statistics are handed to methods on whole tensors only; declare whole=True."
            )
        METHODS[name] = Method(
            name, function, paper, OPERANDS[first.name], rows, slices, whole, exact, takes, least, "here" in parameters,
            symmetric, identity, divides, settings, statistics,
        )  # fmt: skip
        return function

    return register


def _check_operand(name: str, first: inspect.Parameter, whole: bool, rows: bool) -> None:
    """Raises TypeError where a signature does not say what a method works on."""
    if first.name not in OPERANDS:
        raise TypeError(
            f"merge method {name}: its first parameter is called {first.name!r}; call it models for weights, or deltas "
            "for task vectors against the base."
        )
    if whole and rows:
        raise TypeError(f"merge method {name}: whole tensors are not cut into rows; leave rows out.")


def _statistic(hint: Any) -> Of | None:
    """The statistic that a parameter asks for, if it does."""
    return next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Of)), None)


def get(name: str, place: str) -> Method:
    """The method of that name.

    Raises BadInput, naming ``place`` and the nearest known methods.
    """
    if name not in METHODS:
        raise BadInput(f"{place}: unknown merge method {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]


def _setting(name: str, parameter: inspect.Parameter, hint: Any) -> Setting:
    search, choices, kind = None, (), hint
    if typing.get_origin(hint) is typing.Annotated:
        kind, search = typing.get_args(hint)[:2]
    measured, search = (search, None) if isinstance(search, Measured) else (None, search)
    if typing.get_origin(kind) is Literal:
        kind, choices = str, typing.get_args(kind)
    if parameter.kind is not parameter.KEYWORD_ONLY or not (kind in SETTING_KINDS or choices):
        raise TypeError(
            f"merge method {name}: its parameter {parameter.name!r} is no setting; make it keyword-only, and annotate "
            'it as Tensor, bool, int or Literal, or with Of("KIND") where it is a statistic of the models.'
        )
    default = parameter.default
    if kind is Tensor:
        kind = tuple if measured or (isinstance(default, Tensor) and default.dim()) else float
        default = _plain(default)
    # ``lambda`` is a word of the language, so its parameter is called lambda_.
    required = parameter.default is inspect.Parameter.empty
    above = measured.above if measured else -math.inf
    return Setting(parameter.name.rstrip("_"), parameter.name, kind, default, search, choices, required, above)


def _plain(default: Any) -> Any:
    """A tensor's numbers as Python's: a float, or a tuple of one."""
    if not isinstance(default, Tensor):
        return default
    return tuple(default.tolist()) if default.dim() else default.item()


def _tensor(value: float | tuple[float, ...], device: torch.device) -> Tensor:
    # A number of no dimension stays where arithmetic with it costs no transfer.
    return torch.tensor(value, dtype=torch.float64, device=device if isinstance(value, tuple) else None)


def _listed(value: Value, experts: int) -> tuple[float, ...]:
    """One number for each expert."""
    values = value if isinstance(value, tuple) else (typing.cast(float, value),)
    return values * experts if len(values) == 1 else values


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
        for weight in weights:
            _check_range(setting, weight, where)
        return tuple(float(w) for w in weights)
    if setting.kind is float:
        if not number:
            raise BadInput(f"{where}: {value!r} is not usable; write a number.")
        _check_range(setting, value, where)
        return float(value)
    if setting.choices and value not in setting.choices:
        raise BadInput(f"{where}: unknown choice {value!r}; {nearest(value, setting.choices)}")
    if not isinstance(value, setting.kind):
        raise BadInput(f"{where}: {value!r} is not usable; write a value of type {setting.kind.__name__}.")
    return typing.cast(Value, value)


def _check_range(setting: Setting, value: float, where: str) -> None:
    if isinstance(setting.search, Range) and setting.search.refuses(value):
        raise BadInput(f"{where}: {value} is not usable; write a number {setting.search.valid}.")
    if not value > setting.above:
        raise BadInput(f"{where}: {value} is not usable; write a number above {setting.above:g}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


for _found in pkgutil.iter_modules(__path__):  # they register themselves in METHODS
    importlib.import_module(f"{__name__}.{_found.name}")
