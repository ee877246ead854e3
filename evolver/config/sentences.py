"""Turns errors of pydantic into sentences that name the key, what is wrong with it, and what to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from evolver.config.section import FUNCTION, NAME
from evolver.errors import nearest

# Parts of pydantic's messages, and what a user of YAML calls the same.
WORDING = {
    "a valid integer": "an integer",
    "a valid string": "text (in quotes, if it looks like a number or a date)",
    "a valid boolean": "true or false",
    "a valid list": "a list",
    "a valid ": "a ",
    "String should have": "text of",
    "List should have": "a list of",
    " after validation, not 0": "",
}
# What texts have to look like, by their regular expression.
TEXT_FORMS = {
    NAME: "letters, digits, '.', '_' and '-', with a letter or digit first",
    FUNCTION: "the file and the name of a function as FILE.py:NAME",
}


def sentence(kind: type[BaseModel], error: ErrorDetails, prefix: str) -> str:
    """One of pydantic's errors as a sentence that names the key, what is wrong, and what to write."""
    *path, last = error["loc"] or ("",)
    within = _at(kind, path)
    keys, here = within.keys + _at(within.type, [last]).keys, _at(kind, error["loc"]).type
    place = prefix + "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in keys).lstrip(".")
    place = place.replace("..", ".") or "the configuration"
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key; {nearest(last, fields_of(within.type))}"
    if error["type"] == "missing":
        description = fields_of(within.type)[str(last)].description
        return f"{place}: this key is missing; add it{f' ({description})' if description else ''}."
    if error["type"] == "value_error":
        said = error["msg"].removeprefix("Value error, ")
        return f"{place}: {said}." if keys or prefix else f"{said}."  # what concerns several sections names them itself
    return f"{place}: {error['input']!r} is not usable; write {_wanted(error, here)}."


def _wanted(error: ErrorDetails, here: Any) -> str:
    """What to write instead of a value of a wrong type or outside its range."""
    if error["type"] in ("model_type", "dict_type"):
        keys = ", ".join(fields_of(here))
        return f"a mapping with the keys {keys}" if keys else "a mapping"
    if error["type"] == "string_pattern_mismatch":
        return TEXT_FORMS[error["ctx"]["pattern"]]
    wanted = error["msg"].removeprefix("Input should be ")
    for pydantic, plain in WORDING.items():
        wanted = wanted.replace(pydantic, plain)
    return f"a number {wanted}" if wanted.startswith(("greater", "less")) else wanted


@dataclass(frozen=True)
class _Spot:
    """A place in a configuration: the keys that lead to it as a user writes them, and the type of its value."""

    keys: list[int | str]
    type: Any


def _at(kind: Any, loc: Sequence[int | str]) -> _Spot:
    """Follow the location of one of pydantic's errors.

    Where a value may have one of several types, pydantic puts the name of the type that it tried into the location
    (``data.DataSet.path``). No configuration has such a key, so it is left out.
    """
    keys: list[int | str] = []
    for part in loc:
        choices = [c for c in get_args(kind) if c is not type(None)] if get_origin(kind) in (Union, UnionType) else []
        tried = next((c for c in choices if getattr(c, "__name__", "") == part), None)
        if tried is not None:
            kind = tried
            continue
        kind = choices[0] if len(choices) == 1 else kind
        keys.append(part)
        inside = get_args(kind)
        kind = fields_of(kind)[part].annotation if part in fields_of(kind) else inside[-1] if inside else None
    return _Spot(keys, kind)


def fields_of(kind: Any) -> Mapping[Any, FieldInfo]:
    """The fields of a section by key; none for any other type."""
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
