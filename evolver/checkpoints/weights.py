"""Checkpoints, opened lazily: safetensors folders by memory map.

Only headers are read until a tensor is asked for. A checkpoint is identified by the digest of its tensors (names,
shapes, dtypes, bytes), not by its path or by how it is cut into files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evolver.checkpoints.names import is_computed, plain_names, wrapper_patterns
from evolver.checkpoints.quantised import ScaledTensors, how_quantised, refuse_quantised, without_quantisation
from evolver.errors import BadInput, cause_of, refuse_special
from evolver.kernels import native
from evolver.records.recipe import layer_of
from evolver.storage.paths import expand

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
TOKENIZER_FILE = "tokenizer.json"
HEAD = "lm_head.weight"
# First parts of the names of what a classifier has on top of its body.
CLASSIFIERS = ("classifier", "score", "pre_classifier", "classification_head", "logits_proj")
# Scalars looked at together: their float64 copies stay in a core's cache, and torch starts no threads for them.
DIGEST_BYTES = 1 << 15
# Tensors that have a row for each token.
TOKEN_MATRICES = (
    "embed_tokens.weight", "tok_embeddings.weight", "word_embeddings.weight", "embed_in.weight", "wte.weight",
    "shared.weight", "lm_head.weight", "embed_out.weight",
)  # fmt: skip
# And one that has a column for each, which BART and its descendants add to what their head says.
TOKEN_BIAS = "final_logits_bias"


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Derived:
    """A tensor that is made of tensors of the files: a part of one, or several put together.

    Attributes:
        info: its shape and dtype.
        stored: the names in the files of those that it is made of.
        make: makes it of them, in this order.
    """

    info: TensorInfo
    stored: tuple[str, ...]
    make: Callable[[Sequence[Tensor]], Tensor]


def token_axis(name: str) -> int | None:
    """The dimension of a tensor that has a place for each token; None where none has."""
    if name.endswith(TOKEN_BIAS):
        return 1
    return 0 if name.endswith(TOKEN_MATRICES) else None


def resized(name: str, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The shape of a tensor in a model with ``size`` places for tokens."""
    axis = token_axis(name)
    return shape if axis is None or len(shape) <= axis else (*shape[:axis], size, *shape[axis + 1 :])


class Source(Protocol):
    """A model whose tensors can be had one at a time; ``key`` is where the user named it."""

    path: Path
    key: str

    def files(self) -> list[Path]: ...
    def names(self) -> list[str]: ...
    def tensor(self, name: str) -> Tensor: ...
    def digest(self) -> str: ...


def is_head(name: str) -> bool:
    """Whether a tensor belongs to a classification head."""
    return name.split(".")[0] in CLASSIFIERS


class Checkpoint:
    """A Hugging Face folder with ``model.safetensors`` or shards and their index.

    Tensors have the names that Transformers gives them as far as these show by themselves; ``agreement`` asks the
    model's class for the others. Tables that a model computes by itself, such as masks, are left out.

    Args:
        headless: see the model without its classification head.

    Attributes:
        tied: with the values of which tensor another one is read that the files do not hold, by its name.
        ignored: tensors of the files that the model's class has no place for, as far as it was asked.
        named: the name of the tensor that the model's class calls so, or the same where it is not known.
        apart: the names in the files, by their own names, of tensors that are kept with the head.
        location: as the user named it, where this is known.
        quantisation: how its weights are quantised, as config.json says; None: they are plain numbers.
        lent: the tensors that another model holds in its place, by name.
        derived: the tensors that are made of those in the files, by name.

    Raises BadInput where the folder is no checkpoint, or a file of it is truncated or not safetensors.
    """

    headless = False
    tied: Mapping[str, str] = MappingProxyType({})
    ignored: tuple[str, ...] = ()
    apart: Mapping[str, str] = MappingProxyType({})
    location = ""
    named: Callable[[str], str] = staticmethod(str)
    lent: Mapping[str, Checkpoint] = MappingProxyType({})
    derived: Mapping[str, Derived] = MappingProxyType({})

    def __init__(self, path: Path, key: str, headless: bool = False) -> None:
        self.path, self.key, self.headless = path, key, headless
        self._files: dict[str, Any] = {}
        self._place: dict[str, str] = {}
        raw_config = read_json(path / "config.json", key) if (path / "config.json").exists() else {}
        refuse_quantised(raw_config, path, key)
        for file in _weight_files(path, key):
            handle = open_tensors(path / file, key)
            self._files[file] = handle
            self._place.update(dict.fromkeys(handle.keys(), file))
        self.quantisation = how_quantised(raw_config)
        self._scaled = ScaledTensors(raw_config, self._place, self._sizes, path, key)
        plain = plain_names(self._place)
        self._place = {n: f for n, f in self._place.items() if not (headless and is_head(plain[n]))}
        # The name in the files of every tensor by the name under which it is seen.
        own = [n for n in self._place if not is_computed(plain[n], partial(self._sizes, n))]
        self._stored = self._scaled.in_parts({plain[n]: n for n in own})

    @cached_property
    def headers(self) -> dict[str, TensorInfo]:
        own = {n: self._info(stored) for n, stored in self._stored.items()}
        made = {n: derived.info for n, derived in self.derived.items()}
        lent = {n: lender.headers[n] for n, lender in self.lent.items()}
        return dict(sorted({**own, **made, **lent}.items()))

    @property
    def stored(self) -> Mapping[str, str]:
        """The name in the files of every tensor by its own name."""
        return self._stored

    @property
    def scales(self) -> Mapping[str, str]:
        """The name in the files of every quantised weight by that of its scales."""
        return self._scaled.scales

    @property
    def uneven(self) -> bool:
        """Whether the blocks of a quantised weight do not divide it, so that Transformers does not read it."""
        return self._scaled.uneven

    def in_files(self) -> list[str]:
        """The names of all tensors in the files, sorted."""
        return sorted(self._place)

    @property
    def wrappers(self) -> dict[str, str]:
        """The patterns, and what takes their place, with which Transformers reads names that have wrappers."""
        return wrapper_patterns(self._place)

    def read_as(self, names: Mapping[str, str]) -> None:
        """See tensors under other names; those that are not listed are left out.

        Args:
            names: the present name by the new one.
        """
        self._stored = {new: self._stored[old] for new, old in names.items() if old in self._stored}
        self.tied = {n: source for n, source in self.tied.items() if n in names}
        self.lent = {n: lender for n, lender in self.lent.items() if n in names}
        self.derived = {n: derived for n, derived in self.derived.items() if n in names}
        self._forget()

    def tie(self, name: str, source: str) -> None:
        """See a tensor that the files do not hold with the values of another one."""
        self._stored[name], self.tied = self._stored[source], {**self.tied, name: source}
        self._forget()

    def lend(self, lender: Checkpoint, names: Iterable[str]) -> None:
        """See tensors of another model as this one's, where it has none of that name."""
        self.lent = {n: lender for n in sorted(names) if n not in self._stored}
        self._forget()

    def derive(self, made: Mapping[str, Derived]) -> None:
        """See tensors that are made of those in the files, in whose place they stand."""
        used = {stored for derived in made.values() for stored in derived.stored}
        self.derived = {**self.derived, **made}
        self._stored = {name: stored for name, stored in self._stored.items() if stored not in used}
        self._forget()

    def set_apart(self, names: Iterable[str]) -> None:
        """Keep tensors with the head, so that they are not merged."""
        self.apart = {n: self._stored.pop(n) for n in sorted(names)}
        self._forget()

    def parts(self) -> dict[str, Tensor]:
        """The tensors that were set apart."""
        return {name: self._read(stored) for name, stored in self.apart.items()}

    def _forget(self) -> None:
        for derived in ("headers", "size", "scalars", "layers"):
            self.__dict__.pop(derived, None)

    @cached_property
    def config(self) -> dict[str, Any]:
        return without_quantisation(read_json(self.path / "config.json", self.key))

    @cached_property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(i.dtype.itemsize * math.prod(i.shape) for i in self.headers.values())

    @cached_property
    def scalars(self) -> int:
        """The number of scalars of all tensors."""
        return sum(self.sizes().values())

    def names(self) -> list[str]:
        return list(self.headers)

    def sizes(self) -> dict[str, int]:
        """The number of scalars of every tensor."""
        return {name: math.prod(info.shape) for name, info in self.headers.items()}

    def tensor(self, name: str) -> Tensor:
        if name in self.lent:
            return self.lent[name].tensor(name)
        if name in self.derived:
            derived = self.derived[name]
            return derived.make([self._read(stored) for stored in derived.stored])
        return self._read(self._stored[name])

    def _read(self, stored: str) -> Tensor:
        scaled = self._scaled.of(stored)
        return self._in_file(stored) if scaled is None else scaled.plain(self._in_file)

    def _in_file(self, stored: str) -> Tensor:
        tensor: Tensor = self._files[self._place[stored]].get_tensor(stored)
        return tensor

    def files(self) -> list[Path]:
        return [self.path / f for f in self._files]

    def digest(self) -> str:
        own = cached("digests-headless" if self.headless else "digests", self.files(), self._digest)
        parts = [own, *dict.fromkeys(lender.digest() for lender in self.lent.values())]
        return own if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()[:20]

    @cached_property
    def layers(self) -> int:
        """The number of layers."""
        return 1 + max((layer_of(n) or 0 for n in self.headers), default=0)

    @cached_property
    def vocabulary(self) -> dict[str, int] | None:
        """Token → id, or None where the folder holds no fast tokenizer."""
        return vocabulary_in(self.path, self.key)

    def _sizes(self, stored: str) -> tuple[int, ...]:
        return tuple(self._files[self._place[stored]].get_slice(stored).get_shape())

    def _info(self, name: str) -> TensorInfo:
        if (scaled := self._scaled.of(name)) is not None:
            return TensorInfo(scaled.shape, scaled.dtype)
        piece = self._files[self._place[name]].get_slice(name)
        dtype = piece.get_dtype()
        if dtype not in DTYPES:
            raise BadInput(f"{self.key}: tensor {name} of {self.path} has dtype {dtype}; dequantise the model first.")
        return TensorInfo(tuple(piece.get_shape()), DTYPES[dtype])

    def _digest(self) -> str:
        """Of what the files hold, under the names that it has there: it does not depend on the other models."""
        used = {*self._stored.values(), *(s for d in self.derived.values() for s in d.stored)}
        return digest_of_tensors((name, self._checked(name, name in used)) for name in sorted(self._place))[:20]

    def _checked(self, stored: str, used: bool) -> Tensor:
        tensor = self._in_file(stored)
        if used:
            plain = tensor if self._scaled.of(stored) is None else self._read(stored)
            check_finite(plain, stored, self.path, self.key)
        return tensor


def digest_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The SHA-256, in hexadecimal digits, of tensors with their names, dtypes and shapes, in the order given."""
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(raw(tensor))
    return sha.hexdigest()


def digests(sources: Mapping[str, Source]) -> dict[str, str]:
    """The digest of every source, read in parallel."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(sources, pool.map(lambda s: s.digest(), sources.values()), strict=True))


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; a tensor is looked at in pieces, so that memory stays small."""
    loops = native.library() if tensor.dtype in native.EXPONENTS and tensor.is_cpu else None
    if loops is not None:
        return native.all_finite(loops, tensor.contiguous())
    return all(bool(piece.isfinite().all()) for piece in tensor.reshape(-1).split(DIGEST_BYTES))


def check_finite(tensor: Tensor, name: str, path: Path, key: str) -> None:
    """Raises BadInput for NaN or infinite values."""
    if not is_finite(tensor):
        raise BadInput(f"{key}: tensor {name} of {path} holds NaN or infinite values; it cannot be merged.")


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, not copied."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _weight_files(path: Path, key: str) -> list[str]:
    if not (path / "config.json").exists():
        raise BadInput(f"{key}: {path} is not a checkpoint (no config.json); give a Hugging Face model folder.")
    if (path / INDEX).exists():
        return _indexed_files(path / INDEX, key)
    if (path / WEIGHTS).exists():
        return [WEIGHTS]
    if shards := sorted(p.name for p in path.glob("*.safetensors")):
        raise BadInput(
            f"{key}: {path} holds {len(shards)} files of weights ({shards[0]} …) but no {INDEX}, which says which "
            "tensor is in which file; copy the index, too, or save the model again."
        )
    pickled = next((p.name for p in path.glob("*.bin")), None)
    if pickled:
        raise BadInput(f"{key}: {path / pickled} is a pickle, which can run code; save the model as safetensors.")
    raise BadInput(f"{key}: {path} holds no {WEIGHTS}; give a Hugging Face model folder.")


def _indexed_files(index: Path, key: str) -> list[str]:
    """The files that an index names.

    Raises BadInput where it is none, or names files of other folders.
    """
    files = read_json(index, key).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise BadInput(f"{key}: {index} has no weight_map from tensors to files; copy the model again.")
    for file in files.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise BadInput(f"{key}: {index} names {file!r}, which is not in its folder; copy the model again.")
    return sorted(set(files.values()))


def open_tensors(file: Path, key: str) -> Any:
    """A safetensors file, mapped.

    Raises BadInput that names ``key`` for one that is missing, truncated, another kind of file, or too large to map.
    """
    try:
        return safe_open(str(file), framework="pt").__enter__()
    except FileNotFoundError:
        raise BadInput(f"{key}: {file} is missing; the folder is incomplete, copy it again.") from None
    except (SafetensorError, OSError, ValueError) as error:  # a name that is no text is a ValueError
        raise BadInput(f"{key}: {file} is truncated or not safetensors ({error}); copy it again.") from None
    except RuntimeError as error:  # torch maps the file, and a system may refuse more than its memory at a time
        raise BadInput(
            f"{key}: {file} cannot be mapped ({str(error).rpartition(': ')[2]}); save the model in smaller shards, or "
            "use a machine with more memory."
        ) from None


def read_json(file: Path, key: str) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Raises BadInput that names ``key`` where there is none.
    """
    try:
        refuse_special(file)
        raw = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{key}: {file} cannot be read ({cause_of(error)}); copy the model again.") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{key}: {file} is not the JSON object that belongs there; copy the model again.")
    return raw


def vocabulary_in(folder: Path, key: str) -> dict[str, int] | None:
    """The vocabulary in a model's folder, token → id, or None where it holds no fast tokenizer.

    Raises BadInput that names ``key`` where the file is none.
    """
    file = folder / TOKENIZER_FILE
    if not file.exists():
        return None
    raw = read_json(file, key)
    try:
        vocab = raw["model"]["vocab"]
        tokens = dict(vocab) if isinstance(vocab, dict) else {t[0]: i for i, t in enumerate(vocab)}
        tokens.update({t["content"]: t["id"] for t in raw.get("added_tokens") or []})
        whole = all(isinstance(t, str) and isinstance(i, int) for t, i in tokens.items())
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        whole = False
    if not whole or not tokens or isinstance(vocab, str):
        raise BadInput(f"{key}: {file} is no tokenizer with a vocabulary; copy the model again.")
    return tokens


def cached(kind: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
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
