"""LoRA adapters, read as deltas on their base."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evolver.checkpoints.adapter_settings import check_rank, check_settings, check_targets, pattern_value
from evolver.checkpoints.formats import model_format
from evolver.checkpoints.weights import HEAD, Checkpoint, cached, check_finite, is_head, open_tensors, raw, read_json
from evolver.errors import BadInput
from evolver.records.recipe import layer_of

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Matrices of an adapter, and how PEFT marks a layer that it has wrapped.
MATRIX = re.compile(r"(.+)(\.lora_[AB]\.weight|\.lora_embedding_[AB])")
END_OF_MATRIX = re.compile(r"\.lora_(A\.weight|embedding_A)$")
OF_LAYER, BASE_LAYER = ".lora_A.", ".base_layer."
# Options of PEFT that make an adapter more than B A, and beginnings of training that change the base itself.
NO_DELTA = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config",
    "alora_invocation_tokens", "layer_replication", "target_parameters", "trainable_token_indices",
)  # fmt: skip
MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LowRank:
    """A delta B A: the keys of its matrices, its rank, and whether the base holds the transpose."""

    a: str
    b: str
    rank: int
    transposed: bool


class LoraAdapter:
    """A PEFT folder, read as base + scale · B A (Hu et al. 2022, equation 3), with rank-stabilised scaling.

    Tensors that were trained whole (``modules_to_save``, biases, embeddings) take the place of the base's. Raises
    BadInput for adapters that are more than that (such as DoRA), naming the reason.
    """

    def __init__(self, path: Path, key: str, base: Checkpoint) -> None:
        self.path, self.key, self.base = path, key, base
        self.config = read_json(path / CONFIG, key)
        check_settings(self.config, path / CONFIG, key)
        self._check_kind()
        self._handle = open_tensors(path / ADAPTER, key)
        self._shapes = {k: tuple(self._handle.get_slice(k).get_shape()) for k in sorted(self._handle.keys())}
        self._pairs, self._whole = self._find_pairs(), self._find_whole()
        self._check_pairs()

    def names(self) -> list[str]:
        return self.base.names()

    def tensor(self, name: str) -> Tensor:
        if name not in self._pairs and name not in self._whole:
            name = self.base.tied.get(name, name)
        origin = self.base.tensor(name)
        start = self._handle.get_tensor(self._whole[name]) if name in self._whole else origin
        if name not in self._pairs:
            kept: Tensor = start.to(origin.dtype)
            return kept
        pair = self._pairs[name]
        a, b = (self._handle.get_tensor(k).float() for k in (pair.a, pair.b))
        delta = self._scale(name, pair.rank) * (b @ a)
        merged: Tensor = (start.float() + (delta.T if pair.transposed else delta)).to(origin.dtype)
        return merged

    def digest(self) -> str:
        return cached("digests-headless" if self.base.headless else "digests", self.files(), self._digest)

    def saved(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Tensors that were trained whole, by the name that they would have in the base."""
        found = {self._name(k): k for k in self._shapes if not MATRIX.fullmatch(k)}
        return {n: self._handle.get_tensor(k) for n, k in found.items() if wanted(n)}

    def files(self) -> list[Path]:
        return [self.path / ADAPTER, self.path / CONFIG, *self.base.files()]

    def _digest(self) -> str:
        sha = hashlib.sha256(self.base.digest().encode())
        for name, pair in sorted(self._pairs.items()):
            sha.update(f"{name} {self._scale(name, pair.rank)!r} {pair.transposed}\n".encode())
            self._add(pair.a, sha)
            self._add(pair.b, sha)
        for name, key in sorted(self._whole.items()):
            sha.update(f"{name} whole\n".encode())
            self._add(key, sha)
        return sha.hexdigest()[:20]

    def _add(self, key: str, sha: Any) -> None:
        tensor = self._handle.get_tensor(key)
        check_finite(tensor, key, self.path, self.key)
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(raw(tensor))

    def _check_kind(self) -> None:
        used = [o for o in NO_DELTA if self.config.get(o)]
        start = str(self.config.get("init_lora_weights"))
        if used or start.lower().startswith(MOVES_THE_BASE):
            raise BadInput(
                f"{self.key}: the adapter {self.path} uses {[*used, start][0]}, which is not a low-rank change of the "
                "base; merge it into its base with PEFT (merge_and_unload) and give that folder."
            )

    def _check_pairs(self) -> None:
        """Check the matrices against the adapter's configuration."""
        modules = {self._layer(name): pair.rank for name, pair in self._pairs.items()}
        for module, rank in modules.items():
            check_rank(self.config, module, rank, self.path / CONFIG, self.key)
        check_targets(self.config, modules, self.path / CONFIG, self.key)

    def _name(self, key: str) -> str:
        """The base's name of a tensor of the adapter, which names it as the model's class does."""
        name = _plain_name(key)
        return name if name in self.base.headers else self.base.named(name)

    def _find_pairs(self) -> dict[str, LowRank]:
        """The low-rank deltas by the name of the tensor that they change."""
        found: dict[str, tuple[str, str]] = {}
        for key in self._shapes:
            match = MATRIX.fullmatch(key)
            if match and not self._is_tied_twin(f"{match[1]}.weight"):
                pair = (match[1] + match[2].replace("B", "A"), match[1] + match[2].replace("A", "B"))
                if not set(pair) <= self._shapes.keys():
                    raise BadInput(
                        f"{self.key}: the adapter {self.path} holds {key} without the other matrix of its pair; copy "
                        "the adapter again."
                    )
                found[self._name(f"{match[1]}.weight")] = pair
        if not found:
            raise BadInput(f"{self.key}: the adapter {self.path} holds no LoRA matrices.")
        ways = {n: self._orientations(n, a, b) for n, (a, b) in found.items()}
        # PEFT writes down the orientation of the layer that it met last, so one that shows by its shape says more.
        square = bool(self.config.get("fan_in_fan_out")) or any(
            w == {True} and OF_LAYER in found[n][0] for n, w in ways.items()
        )
        return {
            n: LowRank(a, b, self._shapes[a][0], square if len(ways[n]) == 2 else True in ways[n])
            for n, (a, b) in found.items()
        }

    def _orientations(self, name: str, a: str, b: str) -> set[bool]:
        """Which of B A (False) and its transpose (True) has the shape of the base's tensor."""
        first, second = self._shapes[a], self._shapes[b]
        delta = (*second[:1], *first[1:])
        if name not in self.base.headers or second[1:] != first[:1]:
            raise self._misfit(name, delta)
        possible = (False, True) if OF_LAYER in a else (True,)  # the matrices of embeddings are always transposed
        ways = {way for way in possible if self.base.headers[name].shape == (delta[::-1] if way else delta)}
        if not ways:
            raise self._misfit(name, delta)
        return ways

    def _find_whole(self) -> dict[str, str]:
        """The keys of tensors that take the place of the base's, by their names."""
        keys = [k for k in self._shapes if not MATRIX.fullmatch(k) and not self._is_tied_twin(k)]
        whole = {self._name(k): k for k in keys}
        if self.base.headless:
            whole = {n: k for n, k in whole.items() if not is_head(n)}
        for name, key in whole.items():
            if name not in self.base.headers:
                raise BadInput(
                    f"{self.key}: the adapter {self.path} holds {key}, which is neither a LoRA matrix of a layer nor "
                    f"a tensor of the base {self.base.path}; merge it into its base with PEFT and give that folder."
                )
            if self.base.headers[name].shape != self._shapes[key]:
                raise self._misfit(name, self._shapes[key])
            if BASE_LAYER not in key and self._is_tied_embedding(name) and not self._stays_tied:
                raise BadInput(
                    f"{self.key}: the adapter {self.path} trains {name} without the head, although the base uses one "
                    "tensor for both; train the adapter again with ensure_weight_tying."
                )
        return whole

    def _is_tied_twin(self, key: str) -> bool:
        """Whether what is stored for the head is what is stored for the embedding that the base ties it to."""
        name = self._name(MATRIX.sub(r"\1.weight", key))
        return HEAD in name and name not in self.base.headers and self._stays_tied

    @cached_property
    def _stays_tied(self) -> bool:
        """Whether the embedding and the head are one tensor still: PEFT tied them, or both came whole and are equal."""
        if self.config.get("ensure_weight_tying"):
            return True
        whole = {self._name(k): k for k in self._shapes if not MATRIX.fullmatch(k)}
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

    def _layer(self, name: str) -> str:
        """The layer of a tensor as the model's class calls it, and so the adapter's settings."""
        return END_OF_MATRIX.sub("", _plain_name(self._pairs[name].a))

    def _scale(self, name: str, rank: int) -> float:
        alpha = pattern_value(self.config.get("alpha_pattern"), self._layer(name), self.config.get("lora_alpha", 8))
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


@model_format("lora", lambda path: (path / CONFIG).exists(), delta=True)
def open_adapter(path: Path, key: str, base: Checkpoint, headless: bool) -> LoraAdapter:
    """The adapter in a folder; the base says whether there are heads.

    Raises BadInput, see ``LoraAdapter``.
    """
    return LoraAdapter(path, key, base)


def _plain_name(key: str) -> str:
    """The name that a tensor of an adapter has in the model's class."""
    return key.removeprefix("base_model.model.").replace(BASE_LAYER, ".")
