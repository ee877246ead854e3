"""Settings that differ from tensor to tensor, in mergekit's forms, resolved into one value for every tensor.

A setting is one value; or a list of them, a gradient from the first layer to the last, in which numbers are
interpolated and flags and words are not; or a list of {filter, value}, of which the first whose filter is part of the
tensor's name counts, and whose values are of either kind. Outside the layers a gradient stands at its beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evolver.errors import BadInput, nearest
from evolver.merging.methods import Method, Setting
from evolver.merging.settings.rules import rules_of
from evolver.records.recipe import Rule, Value, layer_of

GivenSettings = Mapping[str, Any]


@dataclass(frozen=True)
class Spot:
    """A tensor as settings see it.

    Args:
        name: among the tensors of the merge.
        shared: the name that filters of settings for all experts look at.
        own: the names that filters of an expert's settings look at, by expert.
        depth: where a gradient stands, from 0 to 1.
    """

    name: str
    shared: str
    own: tuple[str, ...]
    depth: float


@dataclass(frozen=True)
class Placed:
    """The settings of one merge.

    Args:
        each: those with one number an expert, of every expert, in any form.
        shared: those for all experts, in any form.
        where: names the place in errors.
    """

    method: Method
    each: Sequence[GivenSettings]
    shared: GivenSettings
    where: str

    def rules(self, spots: Iterable[Spot]) -> tuple[Rule, ...]:
        """Rules that give every tensor its values; raises BadInput for a form or a value that is not usable."""
        for given in (self.shared, *self.each):
            for key, value in given.items():
                _check_form(value, f"{self.where}: {key}")
        return rules_of({s.name: self.values(s) for s in spots})

    def values(self, spot: Spot) -> dict[str, Value]:
        """All settings that are given anywhere, for one tensor."""
        out: dict[str, Any] = {}
        for key, setting in self.method.settings.items():
            where = f"{self.where}: {key}"
            if any(key in given for given in self.each):
                own = zip(self.each, spot.own, strict=True)
                found = [_resolved(given.get(key), name, spot.depth) for given, name in own]
                out[key] = tuple(_converted(setting, v, where, spot.name) for v in found)
            elif key in self.shared:
                found_here = _resolved(self.shared[key], spot.shared, spot.depth)
                out[key] = _converted(setting, found_here, where, spot.name)
        checked = self.method.check(out, len(self.each), self.where)
        self.method.refuse_cut(checked, len(self.each), self.where)
        return checked


def over(scopes: Iterable[GivenSettings]) -> dict[str, Any]:
    """The settings of several places, the nearest first: where one says nothing about a tensor, the next one counts."""
    out: dict[str, Any] = {}
    for scope in scopes:
        for key, value in scope.items():
            out[key] = [*_conditions(out[key]), *_conditions(value)] if key in out else value
    return out


def fixed_rules(
    method: Method,
    given: GivenSettings,
    experts: Sequence[str],
    names: Sequence[str],
    place: str,
    tuned: GivenSettings | None = None,
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
    shared = {k: v for k, v in differing.items() if method.settings[k].kind is not tuple}
    each = _by_expert({k: v for k, v in differing.items() if k not in shared}, experts, place)
    for key, value in shared.items():
        if isinstance(value, dict):
            raise BadInput(f"{place}.{key}: {key} is one value for all experts; write it without their names.")
    layers = 1 + max((layer_of(n) or 0 for n in names), default=0)
    spots = [Spot(n, n, (n,) * len(experts), depth(layer_of(n), layers)) for n in names]
    rules = Placed(method, each, shared, place).rules(spots)
    there = {**(tuned or {}), **{k: v for r in rules for k, v in r.values}}
    plain = {k: v for k, v in given.items() if k not in differing}
    complete = method.complete({**plain, **there}, len(experts), place)
    for rule in rules or [Rule.of({})]:
        written = method.check({**plain, **dict(rule.values)}, len(experts), place)
        method.refuse_cut(written, len(experts), place, (tuned or {}).keys())
    usual = Rule.of({k: v for k, v in complete.items() if k not in there})
    return tuple(r for r in (usual, *rules) if r.values)


def depth(layer: int | None, layers: int) -> float:
    """Where a gradient stands in a layer of ``layers``: from 0 to 1; 0 outside them, 1 in an only one."""
    if layer is None:
        return 0.0
    return 1.0 if layers == 1 else layer / (layers - 1)


def _by_expert(given: GivenSettings, experts: Sequence[str], place: str) -> list[dict[str, Any]]:
    each: list[dict[str, Any]] = [{} for _ in experts]
    for key, value in given.items():
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


def _conditions(given: Any) -> list[Any]:
    """A setting of any form as a list of {filter, value}."""
    if isinstance(given, dict):
        return [given]
    if isinstance(given, list) and all(isinstance(g, dict) for g in given):
        return given
    return [{"value": given}]


def _check_form(given: Any, where: str) -> None:
    for entry in _conditions(given):
        for key in entry:
            if key not in ("filter", "value"):
                raise BadInput(f"{where}: unknown key {key!r}; {nearest(key, ('filter', 'value'))}")
        value = entry.get("value")
        for one in value if isinstance(value, list) and value else [value]:
            if not isinstance(one, bool | int | float | str) or not isinstance(entry.get("filter", ""), str | None):
                wanted = "a value, a list of values, or a list of filter and value"
                raise BadInput(f"{where}: {given!r} is not usable; write {wanted}.")


def _resolved(given: Any, name: str, depth: float) -> Any:
    """The value for one tensor, or None where nothing is said about it."""
    if given is None:
        return None
    for entry in _conditions(given):
        wanted = entry.get("filter")
        if wanted in (None, "*") or wanted in name:
            value = entry["value"]
            return _at(value, depth) if isinstance(value, list) else value
    return None


def _at(gradient: Sequence[Any], depth: float) -> Any:
    position = depth * (len(gradient) - 1)
    low = int(position)
    if not all(_is_number(v) for v in gradient):
        return gradient[low]
    high, part = min(low + 1, len(gradient) - 1), position - low
    return (1 - part) * gradient[low] + part * gradient[high]


def _converted(setting: Setting, value: Any, where: str, name: str) -> Any:
    """A resolved value as the setting's kind, or the default."""
    if value is None:
        if setting.required or setting.name == "weight":
            raise BadInput(f"{where}: missing in {name}; give every model one that holds for every tensor.")
        return setting.default[0] if setting.kind is tuple else setting.default
    if setting.name == "rescale" and isinstance(value, bool):
        return "l1" if value else "none"  # mergekit's words for ours
    if setting.kind in (tuple, float):
        if not _is_number(value):
            raise BadInput(f"{where}: {value!r} is not usable; write a number, a list, or a list of filter and value.")
        return float(value)
    return int(value) if setting.kind is int and isinstance(value, float) and value.is_integer() else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
