"""Settings that differ from tensor to tensor, in mergekit's forms, resolved into the rules of a recipe.

A setting is one value; or a list of numbers, a gradient from the first layer to the last, interpolated in between; or
a list of {filter, value}, of which the first whose filter is part of the tensor's name counts, and whose values are of
either kind. Outside the layers a gradient stands at its first number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evolver.errors import BadInput, nearest
from evolver.merging.methods import Method, Setting
from evolver.merging.weights import layer_of
from evolver.records import Expert, Merge, Place, Rule

Given = Mapping[str, Any]


def fixed_rules(
    method: Method, given: Given, experts: Sequence[str], names: Sequence[str], place: str, tuned: Given | None = None
) -> tuple[Rule, ...]:
    """The settings of a run configuration as rules, checked, with defaults.

    A setting with one number an expert may be a mapping from experts to values of every form; a plain list of such a
    setting is one number for each expert.

    Args:
        names: of the base's tensors.
        tuned: examples of what a search will add.

    Raises BadInput that names ``place``.
    """
    differing = {k: v for k, v in given.items() if k in method.settings and _differs(method.settings[k], v)}
    rules = Placed(method, _by_expert(method, differing, experts, place), {}, place).rules(names, None)
    there = {**(tuned or {}), **{k: v for r in rules for k, v in r.values}}
    plain = {k: v for k, v in given.items() if k not in differing}
    complete = method.complete({**plain, **there}, len(experts), place)
    usual = Rule.of({k: v for k, v in complete.items() if k not in there})
    return tuple(r for r in (usual, *rules) if r.values)


def _by_expert(method: Method, given: Given, experts: Sequence[str], place: str) -> list[dict[str, Any]]:
    each: list[dict[str, Any]] = [{} for _ in experts]
    for key, value in given.items():
        if isinstance(value, dict) and method.settings[key].kind is not tuple:
            raise BadInput(f"{place}.{key}: {key} is one value for all experts; write it without their names.")
        values = value if isinstance(value, dict) else dict.fromkeys(experts, value)
        for name in values:
            if name not in experts:
                raise BadInput(f"{place}.{key}: there is no expert {name!r}; {nearest(name, experts)}")
        for name, mine in zip(experts, each, strict=True):
            if name in values:
                mine[key] = values[name]
    return each


def _differs(setting: Setting, value: Any) -> bool:
    if isinstance(value, dict):
        return True
    if not isinstance(value, list) or not value:
        return False
    return isinstance(value[0], dict) or setting.kind is not tuple


class Placed:
    """The settings of one merge.

    Args:
        each: of every input, by name, in any form.
        fixed: further ones, of one value.
        where: names the place in errors.
    """

    def __init__(self, method: Method, each: Sequence[Given], fixed: Given, where: str) -> None:
        self.method, self.each, self.fixed, self.where = method, each, fixed, where
        self.keys = [k for k in method.settings if any(k in e for e in each)]

    def rules(self, names: Sequence[str], span: int | None) -> list[Rule]:
        """Rules that give every tensor its values: by layer, then by filter, then by name where filters overlap."""
        layers = 1 + max((layer_of(n) or 0 for n in names), default=0) if span is None else span
        filters = list(dict.fromkeys(self._filters()))
        if not filters and not self._varies():
            return [Rule.of(self._values("", 0.0, True))]
        depths = [1.0 if layers == 1 else i / (layers - 1) for i in range(layers)]
        places = [Place(outside=True), *(Place((i, i + 1)) for i in range(layers))] if self._varies() else [Place()]
        out: list[Rule] = []
        for contains in ["", *reversed(filters)]:
            for place in places:
                t = depths[place.layers[0]] if place.layers else 0.0
                out.append(Rule.of(self._values(contains, t, False), Place(place.layers, place.outside, contains)))
        probe = Merge("simple", (), Expert("", ""), tuple(out))
        for name in names:
            layer = layer_of(name)
            values = Rule.of(self._values(name, 0.0 if layer is None else depths[layer], True)).values
            if tuple(sorted(probe.settings(name, layer).items())) != values:
                out.append(Rule(Place(contains=name), values))
        return out

    def _values(self, name: str, t: float, real: bool) -> dict[str, Any]:
        """The values for a tensor; where it is no ``real`` one but a filter's text, some may be missing."""
        out: dict[str, Any] = {}
        for key in self.keys:
            setting = self.method.settings[key]
            each = [self._value(e.get(key), name, t) for e in self.each]
            given = [v for v in each if v is not None]
            where = f"{self.where}: {key}"
            if len(given) < len(each) and (key == "weight" or setting.required):
                if real:
                    raise BadInput(f"{where}: missing for a model{f' in {name}' * bool(name)}; give every model one.")
                continue
            if not given:
                continue
            if setting.kind is tuple:
                default = setting.default[0]
                out[key] = tuple(float(_number(v if v is not None else default, where)) for v in each)
            elif len(set(map(str, given))) > 1:
                raise BadInput(f"{where}: one value for all models is wanted; move it to the top's parameters.")
            elif key == "rescale":
                out[key] = {True: "l1", False: "none"}.get(given[0], given[0])
            else:
                out[key] = _number(given[0], where) if setting.kind is float else given[0]
        out |= self.fixed
        self.method.check(out, len(self.each), self.where)
        return out

    def _value(self, given: Any, name: str, t: float) -> Any:
        if isinstance(given, list) and given and all(isinstance(g, dict) for g in given):
            for entry in given:
                wanted = entry.get("filter")
                if wanted in (None, "*") or wanted in name:
                    return self._value(entry.get("value"), name, t)
            return None
        if isinstance(given, list):
            at = t * (len(given) - 1)
            low = min(math.floor(at), len(given) - 1)
            high = min(low + 1, len(given) - 1)
            return (1 - (at - low)) * given[low] + (at - low) * given[high]
        return given

    def _given(self) -> Iterator[Any]:
        for key in self.keys:
            for given in self.each:
                yield given.get(key)

    def _filters(self) -> Iterator[str]:
        for given in self._given():
            if isinstance(given, list):
                yield from (g["filter"] for g in given if isinstance(g, dict) and g.get("filter") not in (None, "*"))

    def _varies(self) -> bool:
        """Whether something changes with depth."""
        lists = [g for g in self._given() if isinstance(g, list)]
        inner = [e.get("value") for g in lists for e in g if isinstance(e, dict)]
        return any(isinstance(v, list) for v in inner) or any(not isinstance(e, dict) for g in lists for e in g)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadInput(f"{where}: {value!r} is not usable; write a number, a list, or a list of filter and value.")
    return float(value)
