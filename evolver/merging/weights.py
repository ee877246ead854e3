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
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evolver.config import expand
from evolver.errors import BadInput
from evolver.merging import gguf
from evolver.storage import is_remote
from evolver.storage.fetch import fetched

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
HEAD = "lm_head.weight"
# First parts of the names of what a classifier has on top of its body.
CLASSIFIERS = ("classifier", "score", "pre_classifier", "classification_head", "logits_proj")
# Scalars looked at together: their float64 copies stay in a core's cache, and torch starts no threads for them.
PIECE = 1 << 15
# A distance to the base, in norms of the base, that no fine-tune has: at equal norms an angle of 41°. Fine-tunes are
# at 0.0001 to 0.1, training on with much new data may reach a few tenths, an unrelated model has a right angle: 1.4.
FAR = 0.7
# Matrices of an adapter, and how PEFT marks a layer that it has wrapped.
MATRIX = re.compile(r"(.+)(\.lora_[AB]\.weight|\.lora_embedding_[AB])")
OF_LAYER, BASE_LAYER = ".lora_A.", ".base_layer."
# Options of PEFT that make an adapter more than B A, and beginnings of training that change the base itself.
NO_DELTA = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config",
    "alora_invocation_tokens", "layer_replication", "target_parameters", "trainable_token_indices",
)  # fmt: skip
MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Tensors that have a row for each token.
ROWS = (
    "embed_tokens.weight", "tok_embeddings.weight", "word_embeddings.weight", "embed_in.weight", "wte.weight",
    "lm_head.weight", "embed_out.weight",
)  # fmt: skip
LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Source(Protocol):
    """A model whose tensors can be had one at a time; ``key`` is where the user named it."""

    path: Path
    key: str

    def files(self) -> list[Path]: ...
    def names(self) -> list[str]: ...
    def tensor(self, name: str) -> Tensor: ...
    def digest(self) -> str: ...


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, or None for embeddings, final norm and head."""
    match = LAYER.search(name)
    return int(match.group(1)) if match else None


def is_head(name: str) -> bool:
    """Whether a tensor belongs to a classification head."""
    return name.split(".")[0] in CLASSIFIERS


class Checkpoint:
    """A Hugging Face folder with ``model.safetensors`` or shards and their index.

    Args:
        headless: see the model without its classification head.

    Raises BadInput where the folder is no checkpoint, or a file of it is truncated or not safetensors.
    """

    headless = False

    def __init__(self, path: Path, key: str, headless: bool = False) -> None:
        self.path, self.key, self.headless = path, key, headless
        self._files: dict[str, Any] = {}
        self._place: dict[str, str] = {}
        for file in _weight_files(path, key):
            handle = _open(path / file, key)
            self._files[file] = handle
            kept = [k for k in handle.keys() if not (headless and is_head(k))]  # noqa: SIM118  # it is no mapping
            self._place.update(dict.fromkeys(kept, file))

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

    @cached_property
    def scalars(self) -> int:
        """The number of scalars of all tensors."""
        return sum(math.prod(i.shape) for i in self.headers.values())

    def names(self) -> list[str]:
        return list(self.headers)

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._place[name]].get_tensor(name)
        return tensor

    def files(self) -> list[Path]:
        return [self.path / f for f in self._files]

    def digest(self) -> str:
        return _cached("digests-headless" if self.headless else "digests", self.files(), self._digest)

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
            _check_finite(tensor, name, self.path, self.key)
            sha.update(f"{name} {info.dtype} {info.shape}\n".encode())
            sha.update(_raw(tensor))
        return sha.hexdigest()[:20]


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
        self.config = _read_json(path / "adapter_config.json", key)
        self._check_kind()
        self._handle = _open(path / ADAPTER, key)
        self._shapes = {k: tuple(self._handle.get_slice(k).get_shape()) for k in sorted(self._handle.keys())}
        self._pairs, self._whole = self._find_pairs(), self._find_whole()

    def names(self) -> list[str]:
        return self.base.names()

    def tensor(self, name: str) -> Tensor:
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
        return _cached("digests-headless" if self.base.headless else "digests", self.files(), self._digest)

    def saved(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Tensors that were trained whole, by the name that they would have in the base."""
        found = {_plain_name(k): k for k in self._shapes if not MATRIX.fullmatch(k)}
        return {n: self._handle.get_tensor(k) for n, k in found.items() if wanted(n)}

    def files(self) -> list[Path]:
        return [self.path / ADAPTER, self.path / "adapter_config.json", *self.base.files()]

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
        _check_finite(tensor, key, self.path, self.key)
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(_raw(tensor))

    def _check_kind(self) -> None:
        used = [o for o in NO_DELTA if self.config.get(o)]
        start = str(self.config.get("init_lora_weights"))
        if used or start.lower().startswith(MOVES_THE_BASE):
            raise BadInput(
                f"{self.key}: the adapter {self.path} uses {[*used, start][0]}, which is no low-rank delta of the "
                "base; merge it into its base with PEFT (merge_and_unload) and give that folder."
            )

    def _find_pairs(self) -> dict[str, LowRank]:
        """The low-rank deltas by the name of the tensor that they change."""
        found: dict[str, tuple[str, str]] = {}
        for key in self._shapes:
            match = MATRIX.fullmatch(key)
            if match and not self._is_tied_twin(f"{match[1]}.weight"):
                pair = (match[1] + match[2].replace("B", "A"), match[1] + match[2].replace("A", "B"))
                if not set(pair) <= self._shapes.keys():
                    raise BadInput(f"{self.key}: the adapter {self.path} holds {key} without its pair; copy it again.")
                found[_plain_name(f"{match[1]}.weight")] = pair
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
        whole = {_plain_name(k): k for k in keys}
        if self.base.headless:
            whole = {n: k for n, k in whole.items() if not is_head(n)}
        for name, key in whole.items():
            if name not in self.base.headers:
                raise BadInput(
                    f"{self.key}: the adapter {self.path} holds {key}, which is no LoRA matrix of a layer and no "
                    f"tensor of the base {self.base.path}; merge it into its base with PEFT and give that folder."
                )
            if self.base.headers[name].shape != self._shapes[key]:
                raise self._misfit(name, self._shapes[key])
            if BASE_LAYER not in key and self._is_tied_embedding(name) and not self.config.get("ensure_weight_tying"):
                raise BadInput(
                    f"{self.key}: the adapter {self.path} trains {name} without the head, which the base ties to it; "
                    "train it anew with ensure_weight_tying."
                )
        return whole

    def _is_tied_twin(self, key: str) -> bool:
        """Whether PEFT stored for the head what it stored for the embedding that the head is tied to."""
        name = _plain_name(MATRIX.sub(r"\1.weight", key))
        return bool(self.config.get("ensure_weight_tying")) and HEAD in name and name not in self.base.headers

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

    def _scale(self, name: str, rank: int) -> float:
        module = name.removesuffix(".weight")
        alpha = _pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8))
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def open_base(location: str, key: str = "model.base", headless: bool = False) -> Checkpoint:
    """The base at ``location``: a folder, a GGUF file, or a hub id; ``headless``: it and its experts without their
    classification heads.

    Raises BadInput that names ``key``.
    """
    return Checkpoint(_locate(location, key), key, headless)


def open_expert(location: str, base: Checkpoint, key: str, same_tokens: bool = True) -> Checkpoint | LoraAdapter:
    """The expert at ``location``, checked against the base: a folder of weights or of a LoRA adapter, a GGUF file, or
    a hub id.

    Raises BadInput for another architecture, another vocabulary, or tensors that do not match.
    """
    path = _locate(location, key)
    if (path / "adapter_config.json").exists():
        return LoraAdapter(path, key, base)
    expert = Checkpoint(path, key, base.headless)
    _check_same_family(expert, base, key, same_tokens)
    return expert


def digests(sources: Mapping[str, Source]) -> dict[str, str]:
    """The digest of every source, read in parallel."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(sources, pool.map(lambda s: s.digest(), sources.values()), strict=True))


def doubts(base: Checkpoint, experts: Iterable[Source]) -> list[str]:
    """What is odd about the experts, a sentence each; nothing of it keeps them from being merged.

    Raises BadInput for values that are not finite.
    """
    sources = {str(n): s for n, s in enumerate(experts)}
    known, first, out = digests(sources), dict[str, Source](), []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        surveys = list(pool.map(lambda s: _survey(s, base), sources.values()))
    for (number, source), (distance, own_head) in zip(sources.items(), surveys, strict=True):
        which = f"{source.key} ({source.path})"
        twin = first.setdefault(known[number], source)
        if twin is not source:
            out.append(f"{which} is the same model as {twin.key} ({twin.path}), which therefore counts twice.")
        if distance == 0:
            out.append(f"{which} equals the base ({base.path}) in every floating tensor, so it adds nothing.")
        if distance > FAR:
            out.append(
                f"{which} is {distance:.2f} norms of the base away from the base ({base.path}), where fine-tunes are "
                "at 0.1 or less and unrelated models at 1.4; check that it was trained from this base."
            )
        if own_head:
            out.append(
                f"{which} has a head of its own, which is left out: the base ({base.path}) ties its to the embedding."
            )
    return out


def _survey(expert: Source, base: Checkpoint) -> tuple[float, bool]:
    """‖θ - θ₀‖ / ‖θ₀‖ over all floating tensors, and whether there is a head that the base does not have."""

    def compute() -> str:
        return json.dumps([_distance(expert, base), _has_own_head(expert, base)])

    distance, own_head = json.loads(
        _cached("surveys-headless" if base.headless else "surveys", [*base.files(), *expert.files()], compute)
    )
    return distance, own_head


def _distance(expert: Source, base: Checkpoint) -> float:
    difference = norm = 0.0
    for name in (n for n, i in base.headers.items() if i.dtype.is_floating_point):
        pairs = zip(*(t.reshape(-1).split(PIECE) for t in (expert.tensor(name), base.tensor(name))), strict=True)
        for ours, theirs in pairs:
            difference += float((ours.double() - theirs.double()).square_().sum())
            norm += float(theirs.double().square_().sum())
    if not math.isfinite(difference):
        raise BadInput(
            f"{expert.key}: {expert.path} makes weights of its base that are not finite; it cannot be merged."
        )
    return math.sqrt(difference / norm) if norm else float(difference > 0)


def _has_own_head(expert: Source, base: Checkpoint) -> bool:
    """Whether a head that the base lacks is more than the embedding under its second name."""
    for name in (n for n in expert.names() if n.endswith(HEAD) and n not in base.headers):
        head = expert.tensor(name)
        outside = [n for n, i in base.headers.items() if layer_of(n) is None and i.shape == head.shape]
        return not any(torch.equal(head, expert.tensor(n)) for n in outside)
    return False


def _check_same_family(expert: Checkpoint, base: Checkpoint, key: str, same_tokens: bool) -> None:
    kinds = [c.config.get("model_type") for c in (expert, base)]
    if kinds[0] != kinds[1]:
        raise BadInput(
            f"{key}: {expert.path} is a {kinds[0]} model and the base {base.path} a {kinds[1]} model; "
            "only fine-tunes of the base can be merged."
        )
    vocabularies = [c.vocabulary() if same_tokens else None for c in (expert, base)]
    if vocabularies[0] is not None and vocabularies[1] is not None and vocabularies[0] != vocabularies[1]:
        raise BadInput(
            f"{key}: the vocabulary of {expert.path} ({len(vocabularies[0])} tokens) differs from that of the base "
            f"({len(vocabularies[1])} tokens); give a fine-tune that kept the base's tokenizer, or say "
            "tokenizer_source in a mergekit file."
        )
    _check_same_tensors(expert, base, key, same_tokens)


def _check_same_tensors(expert: Checkpoint, base: Checkpoint, key: str, same_tokens: bool) -> None:
    extra = set(expert.headers) - set(base.headers)
    if base.config.get("tie_word_embeddings", True):
        extra = {n for n in extra if not n.endswith(HEAD)}  # the embedding under its second name
    missing = set(base.headers) - set(expert.headers)
    for names, says in ((missing, "lacks"), (extra, "has, unlike the base,")):
        if names:
            raise BadInput(f"{key}: {expert.path} {says} the tensor {min(names)}; only fine-tunes of the base merge.")
    for name, info in base.headers.items():
        free = 0 if same_tokens or not name.endswith(ROWS) else 1  # the rows of tokens may differ in number
        if expert.headers[name].shape[free:] != info.shape[free:]:
            raise BadInput(
                f"{key}: {name} has shape {expert.headers[name].shape} in {expert.path} and {info.shape} in the base; "
                "only fine-tunes of the base merge."
            )


def _check_finite(tensor: Tensor, name: str, path: Path, key: str) -> None:
    """Looked at in pieces, so that memory stays small."""
    if not all(bool(piece.isfinite().all()) for piece in tensor.reshape(-1).split(PIECE)):
        raise BadInput(f"{key}: tensor {name} of {path} holds NaN or infinite values; it cannot be merged.")


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, not copied."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _locate(location: str, key: str) -> Path:
    if is_remote(location := expand(location)):
        return _plain_folder(fetched(location, key), key)
    path = Path(location.removeprefix("file://"))
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
        from huggingface_hub import snapshot_download  # slow, and models are folders mostly

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
    except RuntimeError as error:  # torch maps the file, and a system may refuse more than its memory at a time
        raise BadInput(
            f"{key}: {file} cannot be mapped ({str(error).rpartition(': ')[2]}); save the model in smaller shards, or "
            "use a machine with more memory."
        ) from None


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


def _plain_name(key: str) -> str:
    """The base's name of a tensor of an adapter."""
    return key.removeprefix("base_model.model.").replace(BASE_LAYER, ".")


def _cached(kind: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """What costs a read of the weights is remembered for files that have not changed since."""
    stats = [(str(f.resolve()), s.st_size, s.st_mtime_ns) for f in files for s in (f.stat(),)]
    cache = Path(expand("$EVOLVER_CACHE")) / kind / hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:32]
    try:
        return cache.read_text()
    except OSError:
        found = compute()
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False) as temporary:
            temporary.write(found)
        os.replace(temporary.name, cache)
    except OSError:
        pass  # a read-only home costs time, not correctness
    return found
