"""Which settings are in force for which tensor: of a mergekit file, or of the merges that a run's search makes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evolver.commands.merge import open_merge
from evolver.errors import BadInput
from evolver.merging import methods
from evolver.records import Expert, Layers, Merge, Recipe, layer_of

SettingRow = tuple[str, str, Mapping[str, Any]]


def explain(path: str | Path) -> list[SettingRow]:
    """For every tensor of the model that a file describes: its name, the method, and the settings in force.

    Raises BadInput that names file and key.
    """
    if _is_run(path):
        from evolver.driver.prepare import planned_merge

        recipe, tuned, base = planned_merge(str(path))
        return _rows(recipe, base.names(), tuned)
    opened = open_merge(path)
    names = opened.base.names()
    nodes = {r: Expert(r, r) for r in opened.sources}
    return _rows(opened.configuration.recipe(nodes, names), names, ())


def table(rows: Sequence[SettingRow]) -> str:
    """The rows of ``explain`` as text, one tensor a line."""
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{n:{width}}  {m}  {'  '.join(f'{k}={_short(v)}' for k, v in s.items())}" for n, m, s in rows)


def _is_run(path: str | Path) -> bool:
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False  # several documents, or something that the reader of mergekit files refuses in words
    return isinstance(raw, dict) and "search" in raw


def _rows(recipe: Recipe, base: Sequence[str], tuned: Collection[str]) -> list[SettingRow]:
    return [(n, *_settings(recipe, n, tuned)) for n in recipe.names(base)]


def _settings(recipe: Recipe, name: str, tuned: Collection[str]) -> tuple[str, Mapping[str, Any]]:
    while isinstance(recipe, Layers):
        recipe, name = recipe.source(name)
    if not isinstance(recipe, Merge):
        raise BadInput(f"{name}: is taken from a model as it is, so no settings are in force.")
    method = methods.METHODS[recipe.method]
    values = method.complete(recipe.settings(name, layer_of(name)), len(recipe.inputs), recipe.method)
    return recipe.method, {k: "tuned" if k in tuned else v for k, v in values.items()}


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{v:g}" for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
