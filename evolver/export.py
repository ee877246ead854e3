"""A recipe as a Hugging Face folder that ``from_pretrained`` loads, with a card that says where it came from."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from evolver.folder import whole_folder
from evolver.merging.materialise import Materialiser
from evolver.merging.weights import INDEX, WEIGHTS
from evolver.records import Recipe, dump_recipe

SHARD_BYTES = 5 * 10**9
# What a model folder has besides weights. Everything else in the base's folder is not the model's.
COMPANIONS = (
    "generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "merges.txt", "vocab.txt", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "spiece.model",
)  # fmt: skip


def export(recipe: Recipe, materialiser: Materialiser, target: Path, card: str) -> None:
    """Write the model of ``recipe`` to ``target``; an interrupted export leaves nothing under that name."""
    base = materialiser.base
    with whole_folder(target) as folder:
        _write_weights(materialiser.stream(recipe), base.size, folder)
        for name in COMPANIONS:
            if (base.path / name).exists():
                shutil.copyfile(base.path / name, folder / name)
        (folder / "config.json").write_text(json.dumps(_configuration(materialiser), indent=2))
        (folder / "recipe.json").write_text(dump_recipe(recipe))
        (folder / "README.md").write_text(card)


def _configuration(materialiser: Materialiser) -> dict[str, Any]:
    config = dict(materialiser.base.config)
    config.pop("_name_or_path", None)
    config.pop("_model_name_or_path", None)
    if materialiser.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(materialiser.dtype).removeprefix("torch.")
    return config


def _write_weights(tensors: Iterable[tuple[str, Tensor]], size: int, folder: Path) -> None:
    if size <= SHARD_BYTES:
        save_file({n: t.contiguous().cpu() for n, t in tensors}, folder / WEIGHTS, metadata={"format": "pt"})
        return
    shards = list(_save_shards(tensors, folder))
    weight_map = {}
    for number, (path, names) in enumerate(shards, 1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True))


def _save_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> Iterator[tuple[Path, list[str]]]:
    shard: dict[str, Tensor] = {}
    count = 0

    def save() -> tuple[Path, list[str]]:
        path = folder / f"shard-{count}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        return path, list(shard)

    for name, tensor in tensors:
        if shard and sum(map(_bytes, shard.values())) + _bytes(tensor) > SHARD_BYTES:
            yield save()
            shard, count = {}, count + 1
        shard[name] = tensor.contiguous().cpu()
    yield save()


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.element_size() * math.prod(tensor.shape)
