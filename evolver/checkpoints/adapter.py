"""What all adapters of PEFT have in common: a folder, their base, and tensors that were trained whole."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from evolver.checkpoints.weights import (
    HEAD,
    TOKEN_MATRICES,
    TOKENIZER_FILE,
    Checkpoint,
    TensorInfo,
    cached,
    check_finite,
    is_head,
    open_tensors,
    raw,
    vocabulary_in,
)
from evolver.errors import BadInput
from evolver.records.recipe import layer_of

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# How PEFT marks a layer that it has wrapped.
BASE_LAYER = ".base_layer."
# And, where it also saves a resized embedding, a module that was trained whole, and the one whose place this takes.
TRAINED, REPLACED = ".modules_to_save.", ".original_module."


class Adapter:
    """A folder of PEFT, read as a model: the base with the adapter's changes.

    Tensors that were trained whole (``modules_to_save``, biases, embeddings) take the place of the base's. A kind of
    adapter says in ``_changed_tensors``, ``_changed`` and ``_add_changes`` what it does to other tensors.

    Args:
        config: the content of the folder's ``adapter_config.json``.

    Attributes:
        part: a pattern for the names of tensors that change a layer, with the name of the layer as its first group.

    Raises BadInput for tensors that the base has no place for.
    """

    part: ClassVar[re.Pattern[str]]

    def __init__(self, path: Path, key: str, base: Checkpoint, config: dict[str, Any]) -> None:
        self.path, self.key, self.base, self.config = path, key, base, config
        self._handle = open_tensors(path / ADAPTER, key)
        keys = [k for k in sorted(self._handle.keys()) if REPLACED not in k]
        self._shapes = {k: tuple(self._handle.get_slice(k).get_shape()) for k in keys}
        self._read_changes()
        self._whole = self._find_whole()
        self._check_rows()

    def names(self) -> list[str]:
        return self.base.names()

    def tensor(self, name: str) -> Tensor:
        if name not in self._changed_tensors() and name not in self._whole:
            name = self.base.tied.get(name, name)
        origin = self.base.tensor(name)
        start = self._handle.get_tensor(self._whole[name]) if name in self._whole else origin
        if name not in self._changed_tensors():
            kept: Tensor = start.to(origin.dtype)
            return kept
        return self._changed(name, start.float()).to(origin.dtype)

    @property
    def headers(self) -> Mapping[str, TensorInfo]:
        """What the tensors are: the base's, but for those that have rows for other tokens."""
        found = self.base.headers
        own = {n: self._shapes[k] for n, k in self._whole.items() if self._shapes[k] != found[n].shape}
        own |= {twin: own[source] for twin, source in self.base.tied.items() if source in own}
        return {**found, **{n: TensorInfo(shape, found[n].dtype) for n, shape in own.items()}}

    @property
    def has_own_tokens(self) -> bool:
        """Whether it was trained with other tokens than the base's, so that its embedding has rows for them."""
        return any(self._shapes[key] != self.base.headers[name].shape for name, key in self._whole.items())

    @cached_property
    def vocabulary(self) -> dict[str, int] | None:
        """Token → id, or None where neither it nor its base has a fast tokenizer."""
        return vocabulary_in(self.path, self.key) if self.has_own_tokens else self.base.vocabulary

    def digest(self) -> str:
        return cached("digests-headless" if self.base.headless else "digests", self.files(), self._digest)

    def saved(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Tensors that were trained whole, by the name that they would have in the base."""
        found = {self._name(k): k for k in self._shapes if not self.part.fullmatch(k)}
        return {n: self._handle.get_tensor(k) for n, k in found.items() if wanted(n)}

    def files(self) -> list[Path]:
        return [self.path / ADAPTER, self.path / CONFIG, *self.base.files()]

    def _read_changes(self) -> None:
        """Find out which tensors the adapter computes. Raises BadInput for what does not belong to the base."""
        raise NotImplementedError

    def _changed_tensors(self) -> Any:
        """A container of the names of tensors that the adapter computes."""
        raise NotImplementedError

    def _changed(self, name: str, start: Tensor) -> Tensor:
        """A tensor with the adapter's change, in float32, as ``start`` is."""
        raise NotImplementedError

    def _add_changes(self, sha: Any) -> None:
        """Add all that decides about the changes to a digest."""
        raise NotImplementedError

    def _digest(self) -> str:
        sha = hashlib.sha256(self.base.digest().encode())
        self._add_changes(sha)
        for name, key in sorted(self._whole.items()):
            sha.update(f"{name} whole\n".encode())
            self._add(key, sha)
        return sha.hexdigest()[:20]

    def _add(self, key: str, sha: Any) -> None:
        tensor = self._handle.get_tensor(key)
        check_finite(tensor, key, self.path, self.key)
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(raw(tensor))

    def _name(self, key: str) -> str:
        """The base's name of a tensor of the adapter, which names it as the model's class does."""
        name = name_in_class(key)
        return name if name in self.base.headers else self.base.named(name)

    def _find_whole(self) -> dict[str, str]:
        """The keys of tensors that take the place of the base's, by their names."""
        keys = [k for k in self._shapes if not self.part.fullmatch(k) and not self._is_tied_twin(k)]
        whole = {self._name(k): k for k in keys}
        if self.base.headless:
            whole = {n: k for n, k in whole.items() if not is_head(n)}
        for name, key in whole.items():
            if name not in self.base.headers:
                raise BadInput(
                    f"{self.key}: the adapter {self.path} holds {key}, which is neither a LoRA matrix of a layer nor "
                    f"a tensor of the base {self.base.path}; merge it into its base with PEFT and give that folder."
                )
            if self.base.headers[name].shape != self._shapes[key] and not self._adds_tokens(name, self._shapes[key]):
                raise self._misfit(name, self._shapes[key])
            if BASE_LAYER not in key and self._is_tied_embedding(name) and not self._stays_tied:
                raise BadInput(
                    f"{self.key}: the adapter {self.path} trains {name} without the head, although the base uses one "
                    "tensor for both; train the adapter again with ensure_weight_tying."
                )
        return whole

    def _adds_tokens(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor was trained whole with other tokens than the base's, which are in the adapter's folder."""
        known = name.endswith(TOKEN_MATRICES) and (self.path / TOKENIZER_FILE).exists()
        if not known or shape[1:] != self.base.headers[name].shape[1:]:
            return False
        if self.base.config.get("is_encoder_decoder"):  # PEFT takes its embedding for several, which it trains apart
            raise BadInput(
                f"{self.key}: the adapter {self.path} of an encoder-decoder has {shape[0]} rows for tokens in {name}, "
                f"and the base has {self.base.headers[name].shape[0]}; merge the adapter into its base with PEFT and "
                "give that folder."
            )
        return True

    def _check_rows(self) -> None:
        """Raises BadInput where one tensor has a row for each token of the adapter, and another one for the base's."""
        rows = {n: i.shape[0] for n, i in self.headers.items() if n.endswith(TOKEN_MATRICES)}
        for name, key in self._whole.items():
            other = next((n for n in rows if name in rows and rows[n] != rows[name]), None)
            if other is not None:
                raise BadInput(
                    f"{self.key}: the adapter {self.path} has {self._shapes[key][0]} rows for tokens in {name}, and "
                    f"{other} has {rows[other]}; train both with the same tokens, or merge the adapter into its base "
                    "with PEFT and give that folder."
                )

    def _is_tied_twin(self, key: str) -> bool:
        """Whether what is stored for the head is what is stored for the embedding that the base ties it to."""
        name = self._name(self.part.sub(r"\1.weight", key))
        return HEAD in name and name not in self.base.headers and self._stays_tied

    @cached_property
    def _stays_tied(self) -> bool:
        """Whether the embedding and the head are one tensor still: PEFT tied them, or both came whole and are equal."""
        if self.config.get("ensure_weight_tying"):
            return True
        whole = {self._name(k): k for k in self._shapes if not self.part.fullmatch(k)}
        pairs = [
            (key, whole[HEAD]) for name, key in whole.items()
            if HEAD in whole and name in self.base.headers and self._is_tied_embedding(name)
        ]  # fmt: skip
        return any(torch.equal(self._handle.get_tensor(a), self._handle.get_tensor(b)) for a, b in pairs)

    def _is_tied_embedding(self, name: str) -> bool:
        config, shape = self.base.config, self.base.headers[name].shape
        is_language_model = any("LM" in a for a in config.get("architectures") or [])
        tied = is_language_model and config.get("tie_word_embeddings", True)
        return bool(tied) and layer_of(name) is None and len(shape) == 2 and shape[0] == config.get("vocab_size")

    def _misfit(self, name: str, shape: tuple[int, ...]) -> BadInput:
        return BadInput(
            f"{self.key}: the adapter {self.path} changes {name} of shape {shape}, which the base {self.base.path} "
            "does not have; give the base that it was trained on."
        )


def name_in_class(key: str) -> str:
    """The name that a tensor of an adapter has in the model's class."""
    return key.removeprefix("base_model.model.").replace(BASE_LAYER, ".").replace(TRAINED, ".")
