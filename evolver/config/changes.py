"""Configurations that are changed or compared: which keys differ, and copies in which one thing is different."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from evolver.config import Config
from evolver.config.section import NAME
from evolver.config.sentences import TEXT_FORMS
from evolver.errors import BadInput

# Keys that may change between two calls of a run. A change of any other key is refused.
FREE_KEYS = ("run", "pool", "budget", "finalists", "worthwhile", "loggers")

# Sections of a run's identity on which the answers of models depend. What was scored with other ones does not count.
SCORE_SECTIONS = ("seed", "model", "experts", "heads", "versions")
# Keys of the section ``evaluation``, and of its tasks, on which no answer depends: they say how answers are made into
# scores, or which answers are asked for. Where a finished search is used again, they may change.
FREE_EVALUATION_KEYS = ("early_stopping", "estimate", "racing", "report_draw", "subset")
FREE_TASK_KEYS = ("weight",)


def without_select(config: Config) -> Config:
    """A copy of the configuration that draws no select items."""
    tasks = [entry.model_copy(update={"select": 0}) for entry in config.evaluation.tasks]
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"tasks": tasks})})


def renamed(config: Config, run: str) -> Config:
    """A copy of the configuration with another run name.

    Raises BadInput for a name that a run's folder cannot have.
    """
    if not re.match(NAME, run):
        raise BadInput(f"--run: {run!r} cannot be the name of a run; write {TEXT_FORMS[NAME]}.")
    return config.model_copy(update={"run": run})


def computing(config: Config, compute: str) -> Config:
    """A copy of the configuration with ``model.compute`` set to this dtype."""
    return config.model_copy(update={"model": config.model.model_copy(update={"compute": compute})})


def unrounded(config: Config) -> Config:
    """A copy of the configuration that scores models as they are, without a quantisation."""
    changes = {"quantise": None, "quantise_search": True}
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=changes)})


def keeping_base_chat(config: Config) -> Config:
    """A copy of the configuration whose models keep the base's chat template, or its lack of one."""
    return config.model_copy(update={"model": config.model.model_copy(update={"chat_template": "base"})})


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Compare two nested mappings.

    Yields, for every key in which they differ, the dotted key and both values; a missing value is None.
    """
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(b, Mapping) and (isinstance(a, Mapping) or key not in old):
            yield from differences(a or {}, b, f"{prefix}{key}.")
        elif a != b and (pairs := _sections(a, b)):
            for n, (one, other) in enumerate(pairs):
                yield from differences(one, other, f"{prefix}{key}[{n}].")
        elif a != b:
            yield f"{prefix}{key}", a, b


def _sections(a: Any, b: Any) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Pairs of the members of two lists, if both lists hold mappings only and equally many; else an empty list."""
    if not (isinstance(a, list) and isinstance(b, list) and len(a) == len(b)):
        return []
    return list(zip(a, b, strict=True)) if all(isinstance(one, Mapping) for one in (*a, *b)) else []


def default_at(kind: type[BaseModel], key: str) -> Any:
    """The default of a dotted key of a section; None if the key has no default or does not exist."""
    first, _, rest = key.partition(".")
    name = first.partition("[")[0]
    if name not in kind.model_fields:
        return None
    if rest:
        inner = _inner(kind, name)
        return default_at(inner, rest) if isinstance(inner, type) and issubclass(inner, BaseModel) else None
    field = kind.model_fields[name]
    return None if field.is_required() else field.get_default(call_default_factory=True)


def _inner(kind: type[BaseModel], field: str) -> Any:
    """The type of a field, or of the members of a list."""
    annotation = kind.model_fields[field].annotation
    return getattr(annotation, "__args__", (annotation,))[0]
