"""A model as one GGUF file, as llama.cpp reads it; one tensor at a time is in memory.

What a file of an architecture holds is what llama.cpp's loaders ask for; the names come from the package ``gguf``.
"""

from __future__ import annotations

import errno
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evolver.checkpoints.gguf import keys, reader, seal
from evolver.checkpoints.gguf.keys import ARCHITECTURES, FACTORS, INSTEAD, OPTION
from evolver.checkpoints.gguf.tokenizer import add_words
from evolver.checkpoints.weights import HEAD, TOKEN_MATRICES, TensorInfo
from evolver.errors import BadInput

Array = np.ndarray[Any, Any]
# Tables and masks that old checkpoints hold beside their weights.
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
# GPT-2's matrices are (in, out), all others (out, in).
TURNED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
POSITIONS = "position_embd.weight"


@dataclass(frozen=True)
class FileContent:
    """What is written: configuration, shapes and tensors by their Hugging Face names, and the tokenizer's folder."""

    config: Mapping[str, Any]
    infos: Mapping[str, TensorInfo]
    tensors: Iterable[tuple[str, Tensor]]
    tokenizer: Path
    name: str
    description: str


@dataclass(frozen=True)
class TensorPlace:
    """A tensor in the file: its name, type and shape there; of how many heads the rows are paired anew, or 0; whether
    it is turned.
    """

    name: str
    kind: Any
    shape: tuple[int, ...]
    heads: int = 0
    turned: bool = False


@dataclass(frozen=True)
class WrittenFile:
    """A digest of every tensor of a file, by name, and what is not as its type says, a sentence each."""

    digests: Mapping[str, str]
    notes: tuple[str, ...]


def types() -> dict[str, tuple[Any, Any]]:
    """The types that the package ``gguf`` can compute, the largest first: of tensors and of files, by name. Ternary
    ones are left out, as they are for models that were trained in them.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
    from gguf.quants import quantize

    found = {}
    for kind in sorted(GGMLQuantizationType, key=lambda k: -GGML_QUANT_SIZES[k][1] / GGML_QUANT_SIZES[k][0]):
        names = {f"ALL_{kind.name}", f"MOSTLY_{kind.name}"} & set(LlamaFileType.__members__)
        if names and not kind.name.startswith("TQ"):
            try:
                quantize(np.zeros((1, 256), np.float32), kind)
            except NotImplementedError:
                continue
            found[kind.name.lower()] = (kind, LlamaFileType[names.pop()])
    return found


def check_type(kind: str, file: Path) -> None:
    """Whether a file of this type can be written at all.

    Raises BadInput for a missing package, and for a type that the package cannot compute.
    """
    reader.check_packages(file, OPTION)
    if kind not in types():
        raise BadInput(
            f"{OPTION}: the package gguf cannot compute {kind!r}; write one of {', '.join(types())}, and make others "
            "of a bf16 file with llama.cpp's llama-quantize."
        )


def write_gguf(model: FileContent, kind: str, file: Path) -> WrittenFile:
    """Write the file.

    Norms, biases and position embeddings are float32 in files of any type; a matrix whose rows cannot be cut into the
    type's blocks is float16.

    Raises BadInput for an architecture, setting, tensor or tokenizer that such files cannot hold.
    """
    from gguf import GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape, quantize

    config, (of_tensors, of_file) = keys.file_config(model.config), types()[kind]
    places = _places(model.infos, config, of_tensors)
    digests = {}
    writer = GGUFWriter(file, ARCHITECTURES[config.model_type])
    try:
        _head_of_file(writer, model, config, of_file)
        for place in places.values():
            shape = quant_shape_to_byte_shape(place.shape, place.kind)
            writer.add_tensor_info(place.name, shape, np.dtype(np.uint8), math.prod(shape), place.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for place, array in _arrays(model.tensors, places, config):
            data = np.ascontiguousarray(quantize(array, place.kind))
            writer.write_tensor_data(data)
            digests[place.name] = _digest(place.kind, place.shape, data)
    except OSError as error:
        if error.errno is not None:
            raise
        # NumPy says how much it could write, and not why that was not all.
        raise OSError(errno.ENOSPC, "only a part of it could be written", str(file)) from error
    finally:
        writer.close()
    return WrittenFile(digests, tuple(_notes(places, config, of_tensors)))


def verify(file: Path, written: WrittenFile) -> None:
    """Read every tensor of a file anew.

    Raises BadInput where one is not what was meant.
    """
    from gguf import GGUFReader

    meant = written.digests
    found = {
        t.name: _digest(t.tensor_type, tuple(map(int, reversed(t.shape))), np.ascontiguousarray(t.data))
        for t in GGUFReader(file).tensors
    }
    odd = min((n for n in meant.keys() | found.keys() if meant.get(n) != found.get(n)), default=None)
    if odd is not None:
        raise BadInput(
            f"{OPTION}: {odd} differs from what was written when it is read back; check the disk, and export again."
        )


def read_back(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Have Transformers make a Hugging Face folder of a file, in ``dtype``.

    Raises BadInput where it cannot.
    """
    try:
        reader.convert(file, folder, OPTION, dtype)
    except BadInput as error:
        reason = error.__cause__ or str(error).removeprefix(f"{OPTION}: ").partition("; ")[0].replace(f"{file} ", "it ")
        raise BadInput(
            f"{OPTION}: Transformers does not read {_described(file)}, so the file cannot be checked "
            f"({' '.join(str(reason).split())[:200]}); try another type, such as f16, or {INSTEAD}"
        ) from error


def _described(file: Path) -> str:
    """The architecture and the type of a file, in words."""
    from gguf import GGUFReader, LlamaFileType

    fields = GGUFReader(file).fields
    kind = LlamaFileType(int(fields["general.file_type"].contents())).name
    return f"the architecture {fields['general.architecture'].contents()} in the type {kind}"


def _head_of_file(writer: Any, model: FileContent, config: Any, of_file: Any) -> None:
    """All keys."""
    from gguf import GGML_QUANT_VERSION

    rows = next(i.shape[0] for n, i in model.infos.items() if n.endswith(TOKEN_MATRICES))
    writer.add_type("model")
    writer.add_name(model.name)
    writer.add_description(model.description)
    writer.add_string(seal.SEAL_KEY, seal.BLANK)
    writer.add_file_type(of_file)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(rows)
    keys.add_keys(writer, config)
    add_words(writer, model.tokenizer, rows, config)


def _places(infos: Mapping[str, TensorInfo], config: Any, kind: Any) -> dict[str, TensorPlace]:
    """Where each tensor goes, in the model's order; a tied head has no place of its own."""
    from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map

    architecture = ARCHITECTURES[config.model_type]
    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    theirs = get_tensor_name_map(number, config.num_hidden_layers)
    # Files of Llama rotate neighbouring values of a head together, where Transformers rotates its halves.
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
    places = {}
    if (factors := keys.rope_factors(config)) is not None:
        places[FACTORS] = TensorPlace(FACTORS, GGMLQuantizationType.F32, factors.shape)
    for name, info in infos.items():
        if name.endswith(BUFFERS) or (name == HEAD and config.tie_word_embeddings):
            continue
        if (their := theirs.get_name(name, try_suffixes=(".weight", ".bias"))) is None:
            raise BadInput(f"{OPTION}: {name} cannot be put into the file of a {config.model_type} model; {INSTEAD}")
        turned = config.model_type == "gpt2" and name.endswith(TURNED)
        shape = info.shape[::-1] if turned else info.shape
        paired = heads.get(name.split(".")[-2], 0) if architecture == "llama" else 0
        places[name] = TensorPlace(their, _kind(their, shape, kind), shape, paired, turned)
    return places


def _kind(their: str, shape: tuple[int, ...], kind: Any) -> Any:
    """The type of one tensor in a file of a type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1 or their == POSITIONS:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def _notes(places: Mapping[str, TensorPlace], config: Any, kind: Any) -> Iterator[str]:
    from gguf import GGML_QUANT_SIZES

    odd = sum(p.kind.name == "F16" != kind.name for p in places.values())
    if odd:
        block = GGML_QUANT_SIZES[kind][0]
        yield f"{odd} matrices are f16: their rows cannot be cut into blocks of {block}, as {kind.name.lower()} is"
    if (tokens := keys.context(config)) < config.max_position_embeddings:
        yield (
            f"the file says that the model takes {tokens} tokens, because beyond that the model's attention window "
            "slides, and llama.cpp's does not"
        )


def _arrays(
    tensors: Iterable[tuple[str, Tensor]], places: Mapping[str, TensorPlace], config: Any
) -> Iterator[tuple[TensorPlace, Array]]:
    """Every tensor of the file as float32, in the places' order."""
    if (factors := keys.rope_factors(config)) is not None:
        yield places[FACTORS], factors
    for name, tensor in tensors:
        if (place := places.get(name)) is None:
            continue
        array: Array = tensor.float().cpu().numpy()
        largest = float(np.abs(array).max(initial=0))
        if not largest <= float(np.finfo(np.float16 if place.kind.name == "F16" else np.float32).max):
            raise BadInput(
                f"{OPTION}: {name} holds {largest:g}, which is no {place.kind.name.lower()}; write bf16 or f32."
            )
        if place.heads:
            array = array.reshape(place.heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        yield place, np.ascontiguousarray(array.T if place.turned else array)


def _digest(kind: Any, shape: tuple[int, ...], data: Array) -> str:
    found = hashlib.blake2b(f"{kind.name} {shape} ".encode())
    found.update(memoryview(data.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]
    return found.hexdigest()
