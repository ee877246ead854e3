"""mergekit files as parts of a configuration: their text with the lines of its values, and what follows from it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evolver.config.loader import Loader, valid_yaml
from evolver.errors import BadInput, cause_of, refuse_special

# Where a value stands: the number of the document, and then keys and numbers.
ValuePath = tuple[int | str, ...]
RECIPE_KEY = "recipe"
# To these methods a base model is one more model to merge.
BASE_IS_MERGED = ("slerp", "linear", "karcher", "nearswap", "arcee_fusion")
# Keys of a mergekit file that say the same as a key of the section ``model``.
SAME_IN_MODEL = {"dtype": "dtype", "out_dtype": "dtype", "tokenizer": "tokenizer", "tokenizer_source": "tokenizer",
                 "chat_template": "chat_template"}  # fmt: skip


@dataclass(frozen=True)
class RecipeText:
    """The documents of a mergekit file, unchecked.

    Attributes:
        origin: names the file, or the key that holds the documents, in messages.
        lines: the line of every value, from 1, by its path; none where the documents stand in a configuration.
    """

    documents: tuple[Mapping[str, Any], ...]
    origin: str
    lines: Mapping[ValuePath, int] = field(default_factory=dict)

    def at(self, path: ValuePath) -> str:
        """The file, and the line where a value stands."""
        line = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)
        return self.origin if line is None else f"{self.origin}:{line}"

    @property
    def content(self) -> Any:
        """The documents as a configuration can hold them in the place of the file's path."""
        return dict(self.documents[0]) if len(self.documents) == 1 else [dict(d) for d in self.documents]


def recipe_text(given: Any, key: str) -> RecipeText:
    """A mergekit file by its path, or its documents themselves.

    Args:
        key: the key of the configuration, for messages.

    Raises BadInput for a file that cannot be read, and for what is no mapping.
    """
    if not isinstance(given, str):
        return _checked(given if isinstance(given, list) else [given], key, {})
    path = local_path(given)
    try:
        refuse_special(path)
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{key}: {given[:200]} cannot be read ({cause_of(error)}); give the path of a mergekit file."
        ) from error
    return parsed_recipe(text, given)


def local_path(given: str) -> Path:
    """A path with ``~`` and environment variables filled in."""
    return Path(os.path.expandvars(os.path.expanduser(given)))


def parsed_recipe(text: str, origin: str) -> RecipeText:
    """The documents of a text, with the lines of their values.

    Raises BadInput that names ``origin`` for what is not YAML or no mapping.
    """
    documents, lines = list[Any](), dict[ValuePath, int]()
    with valid_yaml(origin):
        loader = Loader(text)
        try:
            while loader.check_node():
                node = loader.get_node()
                assert node is not None  # there is one, as check_node says
                lines |= _lines(node, (len(documents),), set())
                documents.append(loader.construct_document(node))
        finally:
            loader.dispose()
    return _checked(documents, origin, lines)


def _checked(documents: Sequence[Any], origin: str, lines: Mapping[ValuePath, int]) -> RecipeText:
    if not documents or not all(isinstance(d, dict) for d in documents):
        raise BadInput(f"{origin}: the file is not a mapping; write one with merge_method and models.")
    return RecipeText(tuple(documents), origin, lines)


def _lines(node: yaml.Node, path: ValuePath, seen: set[int]) -> dict[ValuePath, int]:
    """The lines of a node and of all in it. What an alias repeats has the line of the alias only."""
    found = {path: node.start_mark.line + 1}
    pairs: Iterator[tuple[Any, yaml.Node]] = iter(())
    if id(node) in seen:
        return found
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        pairs = ((key.value, value) for key, value in node.value if isinstance(key, yaml.ScalarNode))
    elif isinstance(node, yaml.SequenceNode):
        pairs = iter(enumerate(node.value))
    for key, value in pairs:
        found |= _lines(value, (*path, key), seen)
    return found


def reference(model: Any) -> str:
    """``path@revision+lora`` of a model, which a mergekit file may write as a mapping."""
    if isinstance(model, dict):
        inner, lora = model.get("model", {}), model.get("lora")
        text = (
            "@".join(str(inner[k]) for k in ("path", "revision") if inner.get(k)) if isinstance(inner, dict) else inner
        )
        return f"{text}+{reference({'model': lora})}" if lora else str(text)
    return str(model)


def named(references: Sequence[str]) -> dict[str, str]:
    """Names for models, made of the last parts of their places, each once."""
    found: dict[str, str] = {}
    for place in references:
        usual = re.sub(r"[^A-Za-z0-9._-]+", "-", place.rstrip("/").rpartition("/")[2]).lstrip("._-") or "model"
        usual = f"{usual}-model" if usual in ("base", "average", "task_arithmetic", "winner") else usual
        tries = [usual, *(f"{usual}-{n}" for n in range(2, len(references) + 2))]
        found[next(name for name in tries if name not in found)] = place
    return found


def recipe_of(search: Any) -> Any:
    """The key ``recipe`` of a search, or of one inside of it; None where there is none."""
    if not isinstance(search, Mapping):
        return None
    if search.get(RECIPE_KEY) is not None:
        return search[RECIPE_KEY]
    return next((found for value in search.values() if (found := recipe_of(value)) is not None), None)


def with_content(search: Any, file: str) -> Any:
    """A search in which documents stand in the place of the path of a mergekit file.

    Raises BadInput, naming ``file``, where it cannot be read.
    """
    if not isinstance(search, Mapping):
        return search
    return {
        k: recipe_text(v, f"{file}: search.{RECIPE_KEY}").content
        if k == RECIPE_KEY and isinstance(v, str)
        else with_content(v, file)
        for k, v in search.items()
    }


def completed(raw: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    """A configuration with what follows from the mergekit file of its search: experts, base, dtype and tokens, where
    the configuration does not say them itself.

    Raises BadInput, naming ``file``, where the two contradict each other.
    """
    given = recipe_of(raw.get("search"))
    if given is None:
        return raw
    text = recipe_text(given, f"{file}: search.{RECIPE_KEY}")
    base, models = _models(text)
    model = {} if raw.get("model") is None else raw["model"]
    if not isinstance(model, Mapping):
        return raw
    said = _said_of_model(text.documents[-1])
    for key, value in said.items():
        if model.get(key, value) != value:
            raise BadInput(
                f"{file}: model.{key}: {model[key]!r} is not what {text.origin} says, {value!r}; leave the key out, or "
                "write the same in both files."
            )
    model = {"base": base, **said, **model}
    experts = {"experts": named(models)} if raw.get("experts") is None else {}
    return {**raw, "model": model, **experts}


def _said_of_model(document: Mapping[str, Any]) -> dict[str, Any]:
    return {ours: document[key] for key, ours in SAME_IN_MODEL.items() if document.get(key) is not None}


def _models(text: RecipeText) -> tuple[str, list[str]]:
    """The base, and the models that are merged, of a file that may be wrong in every other respect."""
    merges = {d.get("name"): d for d in text.documents}
    origins, models = list[str](), list[str]()
    for document in text.documents:
        base, listed = document.get("base_model"), [reference(m) for m in _listed(document)]
        alone = base is None or document.get("merge_method") in BASE_IS_MERGED
        models += [m for m in listed if m not in merges and (alone or m != reference(base))]
        models += [reference(base)] if alone and base is not None and reference(base) not in merges else []
        origins.insert(0, reference(base) if base is not None else (listed or [""])[0])
    origin = next((o for o in origins if o and o not in merges), "")
    return origin, list(dict.fromkeys(models))


def _listed(document: Mapping[str, Any]) -> list[Any]:
    modules = document.get("modules")
    parts = [document, *(_mappings(list(modules.values())) if isinstance(modules, Mapping) else [])]
    groups = [group for part in parts for group in (part.get("models"), *_sources(part))]
    return [m["model"] for group in groups for m in _mappings(group) if "model" in m]


def _sources(part: Mapping[str, Any]) -> list[Any]:
    return [piece.get("sources") for piece in _mappings(part.get("slices"))]


def _mappings(given: Any) -> list[Mapping[str, Any]]:
    return [g for g in given if isinstance(g, Mapping)] if isinstance(given, list) else []
