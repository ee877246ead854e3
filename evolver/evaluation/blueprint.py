"""The model that a folder describes, built without weights, so that what is wrong with the description is found early.

Transformers reads ``config.json`` when a model is loaded, which is after a run has begun. A blueprint is the same model
on the device ``meta``, whose tensors have shapes and no values: building it takes no memory and little time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evolver.config.model import ModelSettings
from evolver.errors import BadInput, nearest
from evolver.evaluation.fused import slices_of
from evolver.evaluation.live import labelled, model_class, open_tokenizer, places_of

# Values of evaluation.backend with which a class of lm-eval loads candidates by Transformers.
HF = ("hf", "hf-auto", "huggingface")
# No model has as many layers or experts. Transformers would make them one by one, for hours.
MOST_PARTS = 10_000
PART_COUNTS = re.compile(r"(n|num)_.*(layer|expert)")
# How Transformers says that a value of config.json has another type than the key wants.
WRONG_TYPE = re.compile(r"Field '(\w+)' expected (\w+), got \w+ \(value: (.*?)\)")
WRONG_TYPES = re.compile(r"Field '(\w+)' with value (.*?) doesn't match any type")
TYPE_WORDS = {"int": "an integer", "float": "a number", "str": "text", "bool": "true or false", "dict": "a mapping"}


class ModelFolder:
    """What is read of a model's folder beside its weights, whatever class loads them.

    Args:
        folder: Hugging Face folder of the model.
        beside: the folder whose tokenizer and config.json it has; default: ``folder``. It may be gone once this object
            is made.
    """

    def __init__(self, folder: Path, beside: Path | None = None) -> None:
        self.folder, self._beside = folder, beside or folder
        if self._beside != folder:
            _ = self.tokenizer

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises BadInput where it has none that can be read.
        """
        return open_tokenizer(self._beside)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation as the tokenizer's chat template writes it down. Raises what the template raises."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


class Blueprint(ModelFolder):
    """A Transformers model without weights.

    Args:
        settings: the section ``model`` of the configuration.
        folder: Hugging Face folder of the model.
        shapes: shape of every tensor that the folder holds, by name.
        heads: names of tensors of classification heads, which come from elsewhere.
        labels: the labels of a classifier's head, where they differ from those of the folder.
        beside: see ``ModelFolder``.

    Raises BadInput that names ``model.base`` and ``config.json`` where Transformers can build no such model, and where
    the model has other tensors, or tensors of other shapes, than the folder holds.
    """

    def __init__(
        self, settings: ModelSettings, folder: Path, shapes: Mapping[str, tuple[int, ...]],
        heads: Collection[str] = (), labels: Sequence[str] = (), beside: Path | None = None,
    ) -> None:  # fmt: skip
        super().__init__(folder, beside)
        self.device = torch.device("meta")
        self.module = _built(settings, folder, self._beside, labels)
        self._generation = _read_generation_settings(folder)
        self._check_tensors(shapes, heads)

    @property
    def begins_answers(self) -> bool:
        """Whether the folder says with which token an encoder–decoder begins the answers that it generates."""
        settings = [self.module.config, self._generation]
        keys = ("decoder_start_token_id", "bos_token_id")
        return any(getattr(s, key, None) is not None for s in settings for key in keys)

    def _check_tensors(self, shapes: Mapping[str, tuple[int, ...]], heads: Collection[str]) -> None:
        state = self.module.state_dict(keep_vars=True)
        slices = slices_of(self.module, shapes, self.folder)
        places = places_of(self.module, (n for n in shapes if n not in slices), self.folder)
        for name, place in places.items():
            if name not in heads and tuple(state[place].shape) != shapes[name]:
                raise BadInput(
                    f"model.base: {self.folder} holds {name} of shape {shapes[name]}, and by its config.json the shape "
                    f"is {tuple(state[place].shape)}; copy config.json from the model that the weights belong to."
                )
        ignored = [re.compile(p) for p in self.module._keys_to_ignore_on_load_missing or ()]
        there = {id(state[place]) for place in (*places.values(), *(p.parameter for p in slices.values()))}
        for name, tensor in state.items():
            known = id(tensor) in there or name in heads or any(p.search(name) for p in ignored)
            if not known and name not in (getattr(self.module, "all_tied_weights_keys", None) or {}):
                raise BadInput(
                    f"model.base: {self.folder} lacks {name}, which a model of its config.json needs; give a base of "
                    "the kind that model.kind names, with its own config.json."
                )


def _built(settings: ModelSettings, folder: Path, beside: Path, labels: Sequence[str]) -> Any:
    """The module on the device ``meta``; ``beside`` holds the config.json that is used, ``folder`` the user's own."""
    import transformers

    if (reason := _impossible(json.loads((folder / "config.json").read_text()))) is not None:
        raise _unusable(folder, reason)
    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(beside, **labelled(labels, False))
        with torch.device("meta"):
            return model_class(settings.kind).from_config(config, dtype=torch.float32).eval()
    except BadInput:
        raise
    except Exception as error:  # every architecture reads its configuration in its own way
        raise _unusable(folder, reason_of(error)) from error


def _read_generation_settings(folder: Path) -> Any | None:
    """The settings of generation in a folder; None where there are none. A file that is no JSON is passed over, as
    Transformers does.

    Raises BadInput for settings that Transformers cannot read.
    """
    import transformers

    if not (folder / "generation_config.json").exists():
        return None
    try:
        return transformers.GenerationConfig.from_pretrained(folder)
    except OSError:
        return None
    except Exception as error:  # it takes any JSON for a mapping
        raise BadInput(
            f"model.base: {folder / 'generation_config.json'} cannot be read ({reason_of(error)}); copy the file "
            "again, or remove it."
        ) from error


def without_weights(folder: Path, config: Mapping[str, Any], loader: Any = None) -> Any | None:
    """A model of a folder without its weights, for its names; None where Transformers has no such class or cannot build
    it, which is said where models are loaded.

    Args:
        config: content of the folder's ``config.json``.
        loader: one of Transformers' automatic classes; None: the class that ``config.json`` names.
    """
    if config.get("model_type") is None or _impossible(config) is not None:
        return None
    import transformers

    named = str(next(iter(config.get("architectures") or []), None))
    if loader is None and not hasattr(transformers, named):
        return None
    transformers.utils.logging.set_verbosity_error()
    try:
        settings = transformers.AutoConfig.from_pretrained(folder)
        build = getattr(transformers, named)._from_config if loader is None else loader.from_config
        with torch.device("meta"):
            return build(settings, dtype=torch.float32)
    except Exception:  # every architecture reads its configuration in its own way
        return None


def _impossible(config: Any) -> str | None:
    """What no model can be built from, in words: a value that is no number, or a number of layers that none has."""
    for key, value in _values(config):
        if isinstance(value, float) and math.isnan(value):
            return f"{key} is no number"
        if PART_COUNTS.match(key) and isinstance(value, int) and value > MOST_PARTS:
            return f"{key} is {value}"
    return None


def _values(raw: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings and lists, with the nearest key above it."""
    if isinstance(raw, dict):
        for name, value in raw.items():
            yield from _values(value, str(name))
    elif isinstance(raw, list):
        for value in raw:
            yield from _values(value, key)
    else:
        yield key, raw


def _unusable(folder: Path, reason: str) -> BadInput:
    return BadInput(
        f"model.base: Transformers can build no model as {folder / 'config.json'} describes it ({reason}); mend the "
        "file, or copy it from the model that the weights belong to."
    )


def reason_of(error: Exception) -> str:
    """What a library says of a value, in one line and without the names of its classes."""
    text = " ".join(str(error).split())
    if found := WRONG_TYPES.search(text):
        return f"{found[1]} is {found[2][:60]}, which is of a wrong type"
    if found := WRONG_TYPE.search(text):
        return f"{found[1]} is {found[3][:60]}, and {TYPE_WORDS.get(found[2], found[2])} belongs there"
    match error:
        case ZeroDivisionError():
            return "one of its sizes is 0"
        case KeyError():
            return f"{text} is not known"
        case AttributeError() | TypeError():
            return f"a value is of a wrong type: {text[:160]}"
    return re.sub(r"^.*\b\w+(Error|Exception): ", "", text)[:200] or "no reason is given"


def check_architecture(config: Mapping[str, Any], folder: Path) -> None:
    """Raises BadInput where ``config.json`` names no architecture that Transformers knows."""
    from transformers import CONFIG_MAPPING  # slow

    name = config.get("model_type")
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        raise BadInput(
            f"model.base: {folder / 'config.json'} names the model_type {name!r}, which Transformers does not know; "
            + (nearest(name, CONFIG_MAPPING) if isinstance(name, str) else "copy the file again.")
        )
