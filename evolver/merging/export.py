"""A recipe as a Hugging Face folder that ``from_pretrained`` loads, with a card that says where it came from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from evolver.checkpoints import shards
from evolver.checkpoints.beside import Beside, beside
from evolver.checkpoints.heads import Head
from evolver.checkpoints.quantised import without_quantisation
from evolver.checkpoints.weights import Checkpoint, is_finite
from evolver.errors import BadInput
from evolver.evaluation.depth import with_layers
from evolver.merging.companions import COMPANIONS, Companions
from evolver.merging.materialise import Materialiser
from evolver.records.depth import layer_origins
from evolver.records.recipe import Recipe, dump_recipe


def export(
    recipe: Recipe, materialiser: Materialiser, folder: Path, texts: Mapping[str, str],
    shard_bytes: int = shards.SHARD_BYTES, companions: Companions | None = None,
) -> None:  # fmt: skip
    """Write the model of ``recipe`` into an empty folder, or one that it makes.

    Raises BadInput for a model with values that are not finite in its dtype, and for one that is zero everywhere.

    Args:
        texts: further files by name: its README, its configuration for other tools.
        shard_bytes: how large a file of weights may become.
        companions: the model's tokenizer and settings of generation; None: the base's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    infos = {n: materialiser.info(recipe, n) for n in materialiser.names(recipe)}
    shards.write_shards(usable(materialiser.stream(recipe)), infos, folder, shard_bytes)
    (folder / "config.json").write_text(json.dumps(merged_config(recipe, materialiser), indent=2))
    (companions or Companions(materialiser.base.path)).write(folder)
    (folder / "recipe.json").write_text(dump_recipe(recipe))
    for name, text in texts.items():
        (folder / name).write_text(text)


def beside_of(base: Checkpoint, modules: Collection[str] | None = None) -> Beside:
    """What else lies in the folder of the base, beside what an export writes or copies anyway.

    Args:
        modules: folders that are written by others; None: as the base's modules are not kept, their settings are lost.
    """
    own = ("config.json", *(file.name for file in base.files()), *(modules or ()))
    return beside(base.path, {*COMPANIONS, *own}, modules is not None)


def usable(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, if they make up a model that can be used.

    Raises BadInput, while they come, for values that are not finite, and at the end where all are zero.
    """
    zero = True
    for name, tensor in tensors:
        if not is_finite(tensor):
            bad = int((~tensor.isfinite()).sum())
            raise BadInput(
                f"{bad} of the {tensor.numel()} values of the merged tensor {name} are not finite in "
                f"{str(tensor.dtype).removeprefix('torch.')}; write smaller weights, or a dtype with a larger range."
            )
        zero = zero and not bool(tensor.any())
        yield name, tensor
    if zero:
        raise BadInput("all values of the merged model are zero; write weights that are not all zero.")


def write_heads(folder: Path, heads: Mapping[str, tuple[Path, Head]]) -> None:
    """Write a classifier for each head into a folder of its own: the merged body, by hard link, and the head.

    Args:
        folder: of the merged model.
        heads: the folder of each head's expert, and the head's tensors, by name.
    """
    bodies = sorted(folder.glob("model*.safetensors"))
    rows = json.loads((folder / "config.json").read_text()).get("vocab_size")
    for name, (expert, head) in heads.items():
        own = folder / name
        own.mkdir()
        where = {"head.safetensors": list(head)}
        for body in bodies:
            os.link(body, own / f"body-{body.name}")
            where[f"body-{body.name}"] = list(shards.read_header(body))
        shards.write_file(own / "head.safetensors", head)
        shards.write_index(own, where, sum(f.stat().st_size for f in own.glob("*.safetensors")))
        for file in folder.iterdir():
            if file.name in COMPANIONS:
                shutil.copyfile(file, own / file.name)
        config = without_quantisation(json.loads((expert / "config.json").read_text()))  # its body is another one
        if "vocab_size" in config:
            config["vocab_size"] = rows
        config |= _labels_of_head(config, list(head.values())[-1].shape[0])
        (own / "config.json").write_text(json.dumps(config, indent=2))


def _labels_of_head(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Labels for the rows of a head, where config.json, which may be of a model below an adapter, has others."""
    if len(config.get("id2label") or ("LABEL_0", "LABEL_1")) == rows:
        return {}
    labels = [f"LABEL_{n}" for n in range(rows)]
    return {"id2label": {str(n): la for n, la in enumerate(labels)}, "label2id": {la: n for n, la in enumerate(labels)}}


def merged_config(recipe: Recipe, materialiser: Materialiser) -> dict[str, Any]:
    """The base's configuration, with the model's dtype and layers."""
    config = dict(materialiser.base.config)
    config.pop("_name_or_path", None)
    config.pop("_model_name_or_path", None)
    if materialiser.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(materialiser.dtype).removeprefix("torch.")
    layers = [origin.base for origin in layer_origins(recipe, materialiser.base.layers)]
    return config if layers == list(range(materialiser.base.layers)) else with_layers(config, layers)
