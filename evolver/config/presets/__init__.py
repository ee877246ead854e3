"""Published searches by name: ``search: {preset: merge3}`` stands for the keys of a configuration that a paper states.

A preset is one YAML file in this folder. It holds the keys that the preset sets and the texts of its section in
docs/presets.md. What the user writes counts before what a preset sets:

- a mapping is joined with the preset's, key by key, but one that names another ``algorithm`` or ``method`` inside of
  the section takes its place, because its settings are others;
- ``budget`` and every list take the place of the preset's;
- ``null`` takes a key of the preset away, so that the key's default counts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from evolver.errors import BadInput, nearest

PRESET_KEY = "preset"
NAMING = ("algorithm", "method")


@dataclass(frozen=True)
class Preset:
    """A published search.

    Attributes:
        name: what ``search.preset`` says.
        title: what the paper calls it.
        paper: authors, year, title and place.
        summary: what the search does, in a sentence or two.
        formula: its formulas, one in a line.
        published: sentences on what is as in the paper.
        differs: sentences on what is not, and why.
        sets: the keys of the configuration that it sets, by section.
    """

    name: str
    title: str
    paper: str
    summary: str
    formula: str
    published: tuple[str, ...]
    differs: tuple[str, ...]
    sets: Mapping[str, Any]

    @property
    def keys(self) -> dict[str, Any]:
        """What it sets, by dotted key."""
        return dict(_flat(self.sets))

    @property
    def lines(self) -> list[str]:
        """What it sets, a line for each key."""
        return [f"{key}: {written(value)}" for key, value in self.keys.items()]


@cache
def presets() -> Mapping[str, Preset]:
    """All presets by name, in the order of their names."""
    files = (f for f in resources.files(__package__).iterdir() if f.name.endswith(".yaml"))
    texts = {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in files}
    return {name: _read(name, texts[name]) for name in sorted(texts)}


def expanded(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A configuration, unchecked, with what its preset sets in place of the key ``search.preset``.

    A search inside of another one may be a preset, too, if the preset sets nothing but the search.

    Args:
        origin: the file that error messages name.

    Raises BadInput for an unknown preset, and for one inside of a search that concerns the whole run.
    """
    search = raw.get("search")
    if not isinstance(search, Mapping):
        return dict(raw)
    inner = {key: _inside(value, f"search.{key}", origin) for key, value in search.items()}
    if PRESET_KEY not in search:
        _refuse_name_of_preset(search, origin)
        return {**raw, "search": inner}
    found = _named(inner.pop(PRESET_KEY), f"{origin}: search.{PRESET_KEY}")
    sets, own = copy.deepcopy(dict(found.sets)), {**raw, "search": inner}
    joined = {key: value if key == "budget" else _joined(sets.get(key), value, 0) for key, value in own.items()}
    return {**sets, **{key: value for key, value in joined.items() if value is not None or key not in sets}}


def preset_lines(raw: Mapping[str, Any], origin: str) -> list[str]:
    """What the preset of a configuration has set in it, one sentence for the preset and one line for each key.

    Keys whose values are the user's own are left out.

    Raises BadInput as ``expanded`` does.
    """
    search = raw.get("search")
    if not isinstance(search, Mapping) or PRESET_KEY not in search:
        return []
    found = _named(search[PRESET_KEY], f"{origin}: search.{PRESET_KEY}")
    after, own = dict(_flat(expanded(raw, origin))), dict(_flat(raw))
    kept = [key for key, value in found.keys.items() if key not in own and key in after and after[key] == value]
    return [
        f"search.preset: {found.name} is {found.title} ({found.paper}); it sets",
        *(f"  {key}: {written(after[key])}" for key in kept),
    ]


def blamed(error: str, raw: Mapping[str, Any], origin: str) -> str:
    """An error that begins with a key of the configuration; if a preset has set this key, the sentence also says so."""
    key = error.partition(":")[0]
    if not error.endswith(".") or not any(line.startswith(f"  {key}:") for line in preset_lines(raw, origin)):
        return error
    return f"{error[:-1]} (the preset {raw['search'][PRESET_KEY]} sets {key})."


def written(value: Any) -> str:
    """A value as YAML writes it on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _read(name: str, text: str) -> Preset:
    found = yaml.safe_load(text)
    return Preset(name, **{**found, "published": tuple(found["published"]), "differs": tuple(found["differs"])})


def _named(name: Any, key: str) -> Preset:
    known = presets()
    if not isinstance(name, str) or name not in known:
        raise BadInput(f"{key}: there is no preset {name!r}; {nearest(name, known)}")
    return known[name]


def _refuse_name_of_preset(search: Mapping[str, Any], origin: str) -> None:
    """Raises BadInput where a preset is named as an algorithm, and is none of the searches that the code registers."""
    name = search.get("algorithm")
    if isinstance(name, str) and (found := presets().get(name)) and found.sets["search"]["algorithm"] != name:
        raise BadInput(f"{origin}: search.algorithm: {name} is a preset; write preset: {name} in place of it.")


def _inside(value: Any, key: str, origin: str) -> Any:
    """A value of the section ``search`` in which presets are replaced by what they set."""
    if not isinstance(value, Mapping):
        return value
    inner = {name: _inside(v, f"{key}.{name}", origin) for name, v in value.items()}
    if PRESET_KEY not in value:
        return inner
    found = _named(inner.pop(PRESET_KEY), f"{origin}: {key}.{PRESET_KEY}")
    more = [name for name in found.sets if name not in ("search", "budget")]
    if more:
        raise BadInput(
            f"{origin}: {key}.{PRESET_KEY}: {found.name} also sets {' and '.join(more)} of the whole run, so it cannot "
            f"be one of several searches; write algorithm: {found.sets['search']['algorithm']} with settings of your "
            "own."
        )
    joined: dict[str, Any] = _joined(copy.deepcopy(dict(found.sets["search"])), inner, 0)
    return joined


def _joined(ours: Any, own: Any, depth: int) -> Any:
    """A value of the user's and that of a preset.

    Args:
        depth: how many mappings of the configuration it lies in; 0 for a section itself.
    """
    if not (isinstance(ours, Mapping) and isinstance(own, Mapping)):
        return own
    if depth and any(name in own and own[name] != ours.get(name) for name in NAMING):
        return own
    kept = {key: value for key, value in ours.items() if key not in own}
    theirs = {k: _joined(ours.get(k), v, depth + 1) for k, v in own.items() if v is not None or k not in ours}
    return {**kept, **theirs}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
