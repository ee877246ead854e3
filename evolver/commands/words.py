"""Words for the values, defaults and search ranges of settings, for the reference page and the command line."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

from evolver.merging.methods import Method, Of, Range, Setting, Simplex


def type_name(annotation: Any) -> str:
    """The name of a type for users, such as ``list of number``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    if arguments:
        return " or ".join(type_name(a) for a in arguments if a is not type(None))
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(annotation, "section")


def kind_of(setting: Setting) -> str:
    """The values that a setting takes, in words."""
    if setting.choices:
        return ", ".join(f"`{c}`" for c in setting.choices)
    return "one number per expert" if setting.kind is tuple else type_name(setting.kind)


def default_of(setting: Setting) -> Any:
    """The default of a setting, or ``required``."""
    if setting.required:
        return "required"
    return setting.default[0] if isinstance(setting.default, tuple) else setting.default


def searched_of(setting: Setting) -> str:
    """The values that a search may choose, in words; empty if a search cannot tune the setting."""
    if isinstance(setting.search, Simplex):
        return "weights that sum to 1"
    if isinstance(setting.search, Range):
        return f"{setting.search.low:g} – {setting.search.high:g}" + (", log" if setting.search.log else "")
    return "any of them, if listed in search.tune" if setting.options else ""


def remarks_of(method: Method) -> list[str]:
    """Sentences on what a method needs beside weights, and on what it does not promise."""
    out = []
    if method.statistics:
        asked = dict.fromkeys(method.statistics.values())
        kinds = " and ".join(f"{of.statistic}{_whose(of)}" for of in asked)
        whose = "the base" if all(of.base for of in asked) else "the experts"
        out.append(
            f"It needs statistics of {whose} on dev items ({kinds}), which a run collects before the first merge."
        )
    for name, setting in method.settings.items():
        if isinstance(setting.search, Range) and (around := setting.search.around):
            out.append(
                f"`{around}` - `{name}` and `{around}` + `{name}` have to lie between 0 and 1. If you write a `{name}` "
                "that is too large, it is refused. The default, and a number that a search chooses, is cut to what "
                "fits."
            )
    if not method.exact:
        out.append("Not exact: with another processor or number of threads, the last bits of the result may differ.")
    return out


def _whose(of: Of) -> str:
    """Of which model a statistic is, where it is not each expert's own."""
    return " of the base" if of.base else f", then that of the merge by {of.merged}" if of.merged else ""


def first_paragraph(documented: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    paragraph: Sequence[str] = (documented.__doc__ or "").strip().split("\n\n")
    return " ".join(paragraph[0].split())
