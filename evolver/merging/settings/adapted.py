"""The settings of a merger that a search varies beside the models that are merged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evolver.errors import BadInput, nearest
from evolver.merging.methods import Method, Range, Setting
from evolver.records import Knob


def adapted(
    method: Method, given: Mapping[str, Any], names: Sequence[str] | bool
) -> tuple[tuple[Knob, ...], dict[str, float]]:
    """The settings that vary, with the ranges over which a search tunes them, and the values that they start with.

    They start with what is given, or with the method's default, or in the middle of the range where there is none.

    Args:
        given: settings of the merger.
        names: of the settings that vary; True: all numbers that a search can tune.

    Raises BadInput that names ``search.adapt`` or the setting.
    """
    able = {n: s.search for n, s in method.settings.items() if isinstance(s.search, Range)}
    wanted = list(able) if names is True else list(names or ())
    if names is True and not able:
        raise BadInput(f"search.adapt: {method.name} has no number that could adapt; leave adapt out.")
    for name in wanted:
        if name not in able:
            raise BadInput(f"search.adapt: {method.name} has no number to adapt called {name!r}; {nearest(name, able)}")
    if len(set(wanted)) < len(wanted):
        raise BadInput("search.adapt: a setting is listed twice; list each setting once.")
    knobs = tuple(Knob(n, able[n].low, able[n].high, able[n].log) for n in wanted)
    return knobs, {k.name: _start(method.settings[k.name], given, k) for k in knobs}


def _start(setting: Setting, given: Mapping[str, Any], knob: Knob) -> float:
    where = f"search.merger.{knob.name}"
    if setting.required and knob.name not in given:
        return math.sqrt(knob.low * knob.high) if knob.log else 0.5 * (knob.low + knob.high)
    value = given.get(knob.name, setting.default)
    if isinstance(value, tuple):  # a default for every model
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadInput(f"{where}: {knob.name} adapts, so it starts with one number for the whole model; write one.")
    if not knob.low <= value <= knob.high:
        raise BadInput(
            f"{where}: {value:g} lies outside of the range in which it adapts; write a number from {knob.low:g} to "
            f"{knob.high:g}, or leave {knob.name} out of search.adapt."
        )
    return float(value)
