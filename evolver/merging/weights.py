"""Checkpoints, opened lazily: safetensors folders by memory map, LoRA adapters as deltas on the base.

Only headers are read until a tensor is asked for. A checkpoint is identified by the digest of its tensors (names,
shapes, dtypes, bytes), not by its path or by how it is cut into files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evolver.config import expand
from evolver.errors import BadInput
from evolver.merging import gguf

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Source(Protocol):
    """A model whose tensors can be had one at a time."""

    path: Path

    def names(self) -> list[str]: ...
    def tensor(self, name: str) -> Tensor: ...
    def digest(self) -> str: ...


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, or None for embeddings, final norm and head."""
    match = LAYER.search(name)
    return int(match.group(1)) if match else None


class Checkpoint:
    """A Hugging Face folder with ``model.safetensors`` or shards and their index.

    Raises BadInput where the folder is no checkpoint, or a file of it is truncated or not safetensors.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._files: dict[str, Any] = {}
        self._place: dict[str, str] = {}
        for file in _weight_files(path, key):
            handle = _open(path / file, key)
            self._files[file] = handle
            self._place.update(dict.fromkeys(handle.keys(), file))

    @cached_property
    def headers(self) -> dict[str, TensorInfo]:
        return {n: self._info(n) for n in sorted(self._place)}

    @cached_property
    def config(self) -> dict[str, Any]:
        return _read_json(self.path / "config.json", self.key)

    @cached_property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(i.dtype.itemsize * math.prod(i.shape) for i in self.headers.values())

    def names(self) -> list[str]:
        return list(self.headers)

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._place[name]].get_tensor(name)
        return tensor

    def digest(self) -> str:
        return _cached_digest([self.path / f for f in self._files], self._digest)

    def layers(self) -> int:
        """The number of layers."""
        return 1 + max((layer_of(n) or 0 for n in self.headers), default=0)

    def vocabulary(self) -> dict[str, int] | None:
        """Token → id, or None where the folder holds no fast tokenizer."""
        file = self.path / "tokenizer.json"
        if not file.exists():
            return None
        raw = _read_json(file, self.key)
        vocab = raw.get("model", {}).get("vocab", {})
        tokens = dict(vocab) if isinstance(vocab, dict) else {t[0]: i for i, t in enumerate(vocab)}
        tokens.update({t["content"]: t["id"] for t in raw.get("added_tokens", [])})
        return tokens

    def _info(self, name: str) -> TensorInfo:
        piece = self._files[self._place[name]].get_slice(name)
        dtype = piece.get_dtype()
        if dtype not in DTYPES:
            raise BadInput(f"{self.key}: tensor {name} of {self.path} has dtype {dtype}; dequantise the model first.")
        return TensorInfo(tuple(piece.get_shape()), DTYPES[dtype])

    def _digest(self) -> str:
        sha = hashlib.sha256()
        for name, info in self.headers.items():
            tensor = self.tensor(name)
            if info.dtype.is_floating_point and not _is_finite(tensor):
                raise BadInput(
                    f"{self.key}: tensor {name} of {self.path} holds NaN or infinite values; it cannot be merged."
                )
            sha.update(f"{name} {info.dtype} {info.shape}\n".encode())
            sha.update(_raw(tensor))
        return sha.hexdigest()[:20]


class LoraAdapter:
    """A PEFT folder, read as base + scale · B A (Hu et al. 2022, equation 3), with rank-stabilised scaling.

    Raises BadInput for adapters that are more than low-rank deltas of linear layers (DoRA, trained biases or whole
    modules), naming the reason.
    """

    def __init__(self, path: Path, key: str, base: Checkpoint) -> None:
        self.path, self.key, self.base = path, key, base
        self.config = _read_json(path / "adapter_config.json", key)
        self._handle = _open(path / ADAPTER, key)
        self._pairs = self._find_pairs()

    def names(self) -> list[str]:
        return self.base.names()

    def tensor(self, name: str) -> Tensor:
        origin = self.base.tensor(name)
        if name not in self._pairs:
            return origin
        a, b = (self._handle.get_tensor(k).float() for k in self._pairs[name])
        delta = self._scale(name, a.shape[0]) * (b @ a)
        delta = delta.T if self.config.get("fan_in_fan_out") else delta
        merged: Tensor = (origin.float() + delta).to(origin.dtype)
        return merged

    def digest(self) -> str:
        return _cached_digest(
            [self.path / ADAPTER, self.path / "adapter_config.json"], self._digest, self.base.digest()
        )

    def _digest(self) -> str:
        sha = hashlib.sha256(self.base.digest().encode())
        for name in sorted(self._pairs):
            a, b = (self._handle.get_tensor(k) for k in self._pairs[name])
            sha.update(f"{name} {self._scale(name, a.shape[0])!r} {self.config.get('fan_in_fan_out')}\n".encode())
            for t in (a, b):
                sha.update(f"{t.dtype} {tuple(t.shape)}\n".encode())
                sha.update(_raw(t))
        return sha.hexdigest()[:20]

    def _find_pairs(self) -> dict[str, tuple[str, str]]:
        for option in ("use_dora", "modules_to_save", "lora_bias"):
            if self.config.get(option):
                raise BadInput(
                    f"{self.key}: the adapter {self.path} uses {option}, which is no low-rank delta; "
                    "merge it into its base with PEFT (merge_and_unload) and give that folder."
                )
        if self.config.get("bias", "none") != "none":
            raise BadInput(
                f"{self.key}: the adapter {self.path} trains biases; merge it into its base with PEFT first."
            )
        pairs, headers = {}, self.base.headers
        keys = set(self._handle.keys())
        for key in sorted(keys):
            module, found, _ = key.partition(".lora_A.")
            if not found and ".lora_B." not in key:
                raise BadInput(f"{self.key}: the adapter {self.path} holds {key}, which is no LoRA matrix of a layer.")
            b = key.replace(".lora_A.", ".lora_B.")
            if not {b, b.replace(".lora_B.", ".lora_A.")} <= keys:
                raise BadInput(f"{self.key}: the adapter {self.path} holds {key} without its pair; copy it again.")
            if found:
                name = module.removeprefix("base_model.model.") + ".weight"
                shape = (self._handle.get_slice(b).get_shape()[0], self._handle.get_slice(key).get_shape()[1])
                if self.config.get("fan_in_fan_out"):
                    shape = shape[::-1]
                if name not in headers or headers[name].shape != shape:
                    raise BadInput(
                        f"{self.key}: the adapter {self.path} changes {name} of shape {shape}, which the base "
                        f"{self.base.path} does not have; give the base that it was trained on."
                    )
                pairs[name] = (key, b)
        if not pairs:
            raise BadInput(f"{self.key}: the adapter {self.path} holds no LoRA matrices.")
        return pairs

    def _scale(self, name: str, rank: int) -> float:
        module = name.removesuffix(".weight")
        alpha = _pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8))
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def open_base(location: str, key: str = "model.base") -> Checkpoint:
    """The base at ``location``: a folder, a GGUF file, or a hub id.

    Raises BadInput that names ``key``.
    """
    return Checkpoint(_locate(location, key), key)


def open_expert(location: str, base: Checkpoint, key: str) -> Checkpoint | LoraAdapter:
    """The expert at ``location``, checked against the base: a folder of weights or of a LoRA adapter, a GGUF file, or
    a hub id.

    Raises BadInput for another architecture, another vocabulary, or tensors that do not match.
    """
    path = _locate(location, key)
    if (path / "adapter_config.json").exists():
        return LoraAdapter(path, key, base)
    expert = Checkpoint(path, key)
    _check_same_family(expert, base, key)
    return expert


def digests(sources: Mapping[str, Source]) -> dict[str, str]:
    """The digest of every source, read in parallel."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(sources, pool.map(lambda s: s.digest(), sources.values()), strict=True))


def _check_same_family(expert: Checkpoint, base: Checkpoint, key: str) -> None:
    kinds = [c.config.get("model_type") for c in (expert, base)]
    if kinds[0] != kinds[1]:
        raise BadInput(
            f"{key}: {expert.path} is a {kinds[0]} model and the base {base.path} a {kinds[1]} model; "
            "only fine-tunes of the base can be merged."
        )
    vocabularies = [c.vocabulary() for c in (expert, base)]
    if vocabularies[0] is not None and vocabularies[1] is not None and vocabularies[0] != vocabularies[1]:
        raise BadInput(
            f"{key}: the vocabulary of {expert.path} ({len(vocabularies[0])} tokens) differs from that of the base "
            f"({len(vocabularies[1])} tokens); give a fine-tune that kept the base's tokenizer."
        )
    _check_same_tensors(expert, base, key)


def _check_same_tensors(expert: Checkpoint, base: Checkpoint, key: str) -> None:
    extra = set(expert.headers) - set(base.headers)
    if base.config.get("tie_word_embeddings", True):
        extra = {n for n in extra if not n.endswith("lm_head.weight")}  # the embedding under its second name
    missing = set(base.headers) - set(expert.headers)
    for names, says in ((missing, "lacks"), (extra, "has, unlike the base,")):
        if names:
            raise BadInput(f"{key}: {expert.path} {says} the tensor {min(names)}; only fine-tunes of the base merge.")
    for name, info in base.headers.items():
        if expert.headers[name].shape != info.shape:
            raise BadInput(
                f"{key}: {name} has shape {expert.headers[name].shape} in {expert.path} and {info.shape} in the base; "
                "only fine-tunes of the base merge."
            )


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite: looked at in pieces, so that memory stays small."""
    return all(bool(piece.isfinite().all()) for piece in tensor.reshape(-1).split(1 << 20))


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, not copied."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _locate(location: str, key: str) -> Path:
    path = Path(expand(location))
    if path.is_dir():
        return _plain_folder(path, key)
    if path.suffix == ".gguf" and path.exists():
        return gguf.folder_of(path, key)
    if path.exists():
        raise BadInput(f"{key}: {location} is a file; give the folder that holds the model, or a GGUF file.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", location):
        raise BadInput(f"{key}: there is no folder {path}; give the folder of a model, or a hub id such as org/name.")
    name, _, revision = location.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=["*.safetensors*", "*.json", "*.txt", "*.model", "*.jinja"]))  # fmt: skip  # noqa: E501
    except Exception as error:  # the hub's client raises a dozen kinds, from three libraries
        raise BadInput(
            f"{key}: there is no folder {location}, and the hub did not give it "
            f"({type(error).__name__}); give the folder of a model, or check the name and the network."
        ) from error


def _plain_folder(path: Path, key: str) -> Path:
    """The folder itself, or what its only GGUF file was converted to where it holds no safetensors."""
    files = sorted(path.glob("*.gguf"))
    if not files or any(path.glob("*.safetensors")):
        return path
    if len(files) > 1:
        raise BadInput(f"{key}: {path} holds several GGUF files; name one, such as {files[0]}.")
    return gguf.folder_of(files[0], key)


def _weight_files(path: Path, key: str) -> list[str]:
    if not (path / "config.json").exists():
        raise BadInput(f"{key}: {path} is not a checkpoint (no config.json); give a Hugging Face model folder.")
    if (path / INDEX).exists():
        index = _read_json(path / INDEX, key)
        return sorted(set(index.get("weight_map", {}).values()))
    if (path / WEIGHTS).exists():
        return [WEIGHTS]
    pickled = next((p.name for p in path.glob("*.bin")), None)
    if pickled:
        raise BadInput(f"{key}: {path / pickled} is a pickle, which can run code; save the model as safetensors.")
    raise BadInput(f"{key}: {path} holds no {WEIGHTS}; give a Hugging Face model folder.")


def _open(file: Path, key: str) -> Any:
    try:
        return safe_open(str(file), framework="pt").__enter__()
    except FileNotFoundError:
        raise BadInput(f"{key}: {file} is missing; the folder is incomplete, copy it again.") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{key}: {file} is truncated or not safetensors ({error}); copy it again.") from None


def _read_json(file: Path, key: str) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{key}: {file} cannot be read ({error}); copy the model again.") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{key}: {file} is not the JSON object that belongs there; copy the model again.")
    return raw


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: a pattern is for every module whose dotted name ends in it."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _cached_digest(files: list[Path], compute: Any, salt: str = "") -> str:
    """A digest costs one read of the weights, so it is remembered for files that have not changed since."""
    stats = [(str(f.resolve()), s.st_size, s.st_mtime_ns) for f in files for s in (f.stat(),)]
    key = hashlib.sha256(json.dumps([stats, salt]).encode()).hexdigest()[:32]
    cache = Path(expand("$EVOLVER_CACHE")) / "digests" / key
    try:
        return cache.read_text()
    except OSError:
        digest: str = compute()
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False) as temporary:
            temporary.write(digest)
        os.replace(temporary.name, cache)
    except OSError:
        pass  # a read-only home costs time, not correctness
    return digest
