"""Base and experts by the places that a user names: folders, adapters, GGUF files, hub ids, object stores."""

from __future__ import annotations

import filecmp
import re
from pathlib import Path

from evolver.checkpoints.gguf import reader
from evolver.checkpoints.lora import LoraAdapter
from evolver.checkpoints.weights import HEAD, TOKEN_MATRICES, TOKENIZER_FILE, Checkpoint
from evolver.errors import BadInput, cause_of
from evolver.storage import is_remote
from evolver.storage.fetch import fetched
from evolver.storage.paths import expand


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


def _check_same_family(expert: Checkpoint, base: Checkpoint, key: str, same_tokens: bool) -> None:
    kinds = [c.config.get("model_type") for c in (expert, base)]
    if kinds[0] != kinds[1]:
        raise BadInput(
            f"{key}: {expert.path} is a {kinds[0]} model and the base {base.path} a {kinds[1]} model; "
            "only fine-tunes of the base can be merged."
        )
    if same_tokens:
        _check_same_tokens(expert, base, key)
    _check_same_tensors(expert, base, key, same_tokens)


def _check_same_tokens(expert: Checkpoint, base: Checkpoint, key: str) -> None:
    ours_at, theirs_at = (c.path / TOKENIZER_FILE for c in (expert, base))
    if not (ours_at.exists() and theirs_at.exists()):
        return
    if filecmp.cmp(ours_at, theirs_at, shallow=False):  # far sooner than parsing both
        return
    ours, theirs = expert.vocabulary, base.vocabulary
    if ours is not None and theirs is not None and ours != theirs:
        raise BadInput(
            f"{key}: the vocabulary of {expert.path} ({len(ours)} tokens) differs from that of the base "
            f"({len(theirs)} tokens); give a fine-tune that kept the base's tokenizer, or say "
            "tokenizer_source in a mergekit file."
        )


def _check_same_tensors(expert: Checkpoint, base: Checkpoint, key: str, same_tokens: bool) -> None:
    extra = set(expert.headers) - set(base.headers)
    if base.config.get("tie_word_embeddings", True):
        extra = {n for n in extra if not n.endswith(HEAD)}  # the embedding under its second name
    missing = set(base.headers) - set(expert.headers)
    for names, says in ((missing, "lacks"), (extra, "has, unlike the base,")):
        if names:
            raise BadInput(f"{key}: {expert.path} {says} the tensor {min(names)}; only fine-tunes of the base merge.")
    for name, info in base.headers.items():
        free = 0 if same_tokens or not name.endswith(TOKEN_MATRICES) else 1  # the rows of tokens may differ in number
        if expert.headers[name].shape[free:] != info.shape[free:]:
            raise BadInput(
                f"{key}: {name} has shape {expert.headers[name].shape} in {expert.path} and {info.shape} in the base; "
                "only fine-tunes of the base merge."
            )


def _locate(location: str, key: str) -> Path:
    if is_remote(location := expand(location)):
        return _plain_folder(fetched(location, key), key)
    path = Path(location.removeprefix("file://"))
    try:
        there = path.is_dir()
    except (OSError, ValueError) as error:  # longer than any name may be, or with a zero in it
        raise BadInput(f"{key}: {location[:100]!r} cannot be a path ({cause_of(error)}); give a folder.") from error
    if there:
        return _plain_folder(path, key)
    if path.suffix == ".gguf" and path.exists():
        return reader.folder_of(path, key)
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
    return reader.folder_of(files[0], key)
