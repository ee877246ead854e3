"""GGUF files, converted once into ordinary Hugging Face folders."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import math
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from evolver.checkpoints.formats import model_format
from evolver.checkpoints.gguf.keys import ARCHITECTURES, FACTORS, scaling_in
from evolver.checkpoints.shards import disk_errors
from evolver.checkpoints.weights import Checkpoint
from evolver.errors import BadInput
from evolver.storage.paths import expand

# Of what a conversion makes: folders that an older one made are not taken from the cache.
READER_VERSION = 2
NEEDED_PACKAGES = ("gguf", "protobuf", "sentencepiece")
# What floats of a file are kept as; the dequantised have fewer digits than bfloat16.
EXACT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Tables computed from the configuration: a file may hold them, a model does not.
COMPUTED = "rope_"
TOKENS_KEY = "tokenizer.ggml.tokens"
FILLER = re.compile(r"\[PAD(\d+)\]")


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder with such a file and no safetensors."""
    if path.is_dir():
        return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))
    return path.suffix == ".gguf"


@model_format("gguf", is_gguf)
def open_gguf(path: Path, key: str, base: Checkpoint | None, headless: bool) -> Checkpoint:
    """The model of a GGUF file, or of the only one in a folder, converted into a Hugging Face folder once.

    Raises BadInput that names ``key``, for a folder with several files, too.
    """
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(files) > 1:
        raise BadInput(f"{key}: {path} holds several GGUF files; name one, such as {files[0]}.")
    return Checkpoint(folder_of(files[0], key), key, headless)


def folder_of(file: Path, key: str) -> Path:
    """The folder that ``file`` was converted to, which is done now if it never was; another file, another folder.

    Raises BadInput that names ``key`` for a file that cannot be read or converted.
    """
    stat = file.stat()
    identity = json.dumps([READER_VERSION, str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    target = Path(expand("$EVOLVER_CACHE")) / "gguf" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            made = Path(scratch) / "model"
            convert(file, made, key)
            if not target.is_dir():  # another process may have been faster
                os.rename(made, target)
    except OSError as error:
        if not target.is_dir():
            raise BadInput(
                f"{key}: {file} cannot be converted into {target} ({error.strerror or error}); free disk space there, "
                "or set EVOLVER_CACHE to a folder that can be written."
            ) from error
    return target


def convert(file: Path, target: Path, key: str, dtype: torch.dtype | None = None) -> None:
    """Write the model of a GGUF file, with its tokenizer if it has one, as a Hugging Face folder.

    Args:
        dtype: of the folder's floats; default: that of most of the file's.

    Raises BadInput for missing packages, for what is no whole GGUF file, and for what Transformers cannot convert
    without a loss.
    """
    check_packages(file, key)
    reader = _read(file, key)
    try:
        model, missing = _load(file, dtype or _dtype(reader))
        if TOKENS_KEY in reader.fields:
            _write_tokenizer(file, target, len(reader.fields[TOKENS_KEY].data))
        _restore_scaling(model.config, reader)
    except Exception as error:  # Transformers and its readers raise half a dozen kinds
        raise BadInput(
            f"{key}: Transformers cannot convert {file} ({' '.join(str(error).split())[:200]}); "
            "give the Hugging Face folder that it was made from."
        ) from error
    _check_complete(model, missing, reader, file, key)
    with disk_errors():
        model.save_pretrained(target)
    _clean_config(target / "config.json")


def check_packages(file: Path, key: str) -> None:
    """Whether what reads and writes such files is installed.

    Raises BadInput that names ``key`` where it is not.
    """
    for name in NEEDED_PACKAGES:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise BadInput(
                f"{key}: {file} needs the package {name}, which is not installed; run: pip install 'evolver[gguf]'"
            ) from None


def _read(file: Path, key: str) -> Any:
    """The file's header, with its tensors mapped; those that are cut off are noticed here."""
    from gguf import GGUFReader

    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise BadInput(f"{key}: {file} is not a GGUF file; give a GGUF file, or a Hugging Face model folder.")
    try:
        return GGUFReader(file)
    except Exception as error:  # it checks nothing, so anything can go wrong
        raise BadInput(f"{key}: {file} is truncated or garbled ({type(error).__name__}); copy it again.") from error


def _load(file: Path, dtype: torch.dtype) -> tuple[Any, set[str]]:
    """The model, and the names of tensors that the file does not have."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kind: Any = transformers.AutoModelForCausalLM  # what it returns depends on the arguments
    with contextlib.redirect_stderr(io.StringIO()):  # its bar for GGUF files heeds no setting
        model, loaded = kind.from_pretrained(
            file.parent, gguf_file=file.name, dtype=dtype, output_loading_info=True,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )  # fmt: skip
    # The weights are plain floats by now, but the model is still marked as quantised and would refuse to be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model, loaded["missing_keys"]


def _dtype(reader: Any) -> torch.dtype:
    """What most scalars are; norms stay float32 in files of any type."""
    scalars: Counter[str] = Counter()
    for tensor in reader.tensors:
        scalars[tensor.tensor_type.name] += int(tensor.n_elements)
    return EXACT_TYPES.get(max(scalars, key=lambda n: scalars[n], default=""), torch.bfloat16)


def _restore_scaling(config: Any, reader: Any) -> None:
    """Tell the model how its rotary embedding is scaled, which Transformers leaves in the file."""
    architecture = reader.fields["general.architecture"].contents()
    if architecture not in ARCHITECTURES.values() or getattr(config, "rope_parameters", None) is None:
        return
    start = f"{architecture}."
    keys = {n.removeprefix(start): f.contents() for n, f in reader.fields.items() if n.startswith(start)}
    factors = next((t.data for t in reader.tensors if t.name == FACTORS), None)
    config.rope_parameters = scaling_in(keys, factors) or config.rope_parameters


def _check_complete(model: Any, missing: set[str], reader: Any, file: Path, key: str) -> None:
    """Transformers fills what is missing with random numbers and passes over what it does not know."""
    if missing:
        raise BadInput(
            f"{key}: {file} lacks {min(missing)}; give the whole model, not an adapter or one of several parts."
        )
    kept = {t.data_ptr(): t.numel() for t in model.state_dict().values()}  # a tied head is no second tensor
    held = sum(math.prod(map(int, t.shape)) for t in reader.tensors if not t.name.startswith(COMPUTED))
    if sum(kept.values()) != held:
        raise BadInput(
            f"{key}: {file} holds {held} scalars, and what Transformers makes of it {sum(kept.values())}; "
            "give the Hugging Face folder that it was made from."
        )


def _write_tokenizer(file: Path, target: Path, tokens: int) -> None:
    """Write the tokenizer with the file's ``tokens`` and no others, as fine-tunes in other formats have it.

    Converters name rows of the embedding that have no token, and Transformers adds a default that has no row.
    """
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
    path = target / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["id"] < tokens]
    vocabulary = raw["model"]["vocab"]
    if isinstance(vocabulary, dict):
        raw["model"]["vocab"] = {t: i for t, i in vocabulary.items() if not _is_filler(t, i)}
    path.write_text(json.dumps(raw, ensure_ascii=False))


def _is_filler(token: str, index: int) -> bool:
    match = FILLER.fullmatch(token)
    return match is not None and int(match.group(1)) == index


def _clean_config(path: Path) -> None:
    """Drop the place that the model was read from: it means nothing elsewhere."""
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    config.pop("_model_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
