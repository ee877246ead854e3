"""The layers of a model, as its tensors and its config.json describe them, and its settings with other layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evolver.errors import BadInput
from evolver.records.recipe import LAYER

# How configurations say the number of layers; encoder–decoders have one for each half.
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
# Lists with an entry for each layer.
LISTS = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "attention_layers",
    "layers_block_type",
    "attention_window",
)
# Lists of the numbers of some layers: of all or of none, as the layers are alike.
NUMBERS = ("moe_layers", "mlp_only_layers")
# Settings by which a model's code gives a layer its part according to its place, and the values at which it does not.
BY_PLACE: Mapping[str, tuple[Any, ...]] = {"num_kv_shared_layers": (0, None)}

TensorShapes = Mapping[str, tuple[int, ...]]


def count_layers(shapes: TensorShapes, path: Path) -> int:
    """The number of layers of a model.

    Args:
        shapes: of the model's tensors, by name.
        path: of the model, for messages.

    Raises BadInput, naming ``model.base``, for a model without layers.
    """
    stacks = _stacks(shapes)
    if not stacks:
        raise BadInput(
            f"model.base: the tensors of {path} name no layers, of which programs are made; give another base."
        )
    return 1 + max(max(layers) for layers in stacks.values())


def check_alike(shapes: TensorShapes, config: Mapping[str, Any], path: Path) -> None:
    """Check that a model's layers can be left out, repeated and put into another order.

    Args:
        shapes: of the model's tensors, by name.
        config: content of its config.json.
        path: of the model, for messages.

    Raises BadInput, naming ``model.base``, for several stacks of different depths, for layers with different tensors,
    and for a config.json that does not say their number.
    """
    stacks, depth, whole = _stacks(shapes), count_layers(shapes, path), f"model.base: {path}"
    counts = {prefix: len(layers) for prefix, layers in stacks.items()}
    if len(set(counts.values())) > 1:
        said = " and ".join(f"{count} layers {prefix}N" for prefix, count in counts.items())
        raise BadInput(
            f"{whole} has {said}, and a program is one for all of them; give a base with one stack of layers."
        )
    for prefix, layers in stacks.items():
        for number, layer in layers.items():
            if odd := {*layer.items()} ^ {*layers.get(0, {}).items()}:
                raise BadInput(
                    f"{whole} has layers of different kinds: {prefix}0 and {prefix}{number} differ in {min(odd)[0]}, "
                    "so none can take the place of another one; give a base whose layers are alike."
                )
    _check_settings(config, depth, whole)


def _stacks(shapes: TensorShapes) -> dict[str, dict[int, dict[str, tuple[int, ...]]]]:
    """The shapes of each layer's tensors, by what stands before and behind the layer's number in their names."""
    stacks: dict[str, dict[int, dict[str, tuple[int, ...]]]] = defaultdict(lambda: defaultdict(dict))
    for name, shape in shapes.items():
        if (found := LAYER.search(name)) is not None:
            stacks[name[: found.start(1)]][int(found[1])][name[found.end(1) :]] = shape
    return stacks


def with_layers(config: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """A config.json for a model that has these of the layers, in this order.

    Args:
        config: content of the model's config.json. Lists that it lacks, and which Transformers would fill in by the
            places of the layers, are added, so that each layer stays what it is.
        layers: the number that each layer has in the model.
    """
    return {**config, **changed_settings(_with_lists(config), layers)}


def changed_settings(config: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """Those settings that are others with these layers; see ``with_layers``. All lists are there."""
    changed: dict[str, Any] = {key: len(layers) for key in DEPTH if isinstance(config.get(key), int)}
    for key in LISTS:
        entries = config.get(key)
        if isinstance(entries, list) and len(entries) > max(layers):
            changed[key] = [entries[layer] for layer in layers]
    changed |= {key: list(range(len(layers))) for key in NUMBERS if config.get(key)}
    if "attention_types" in config and "attention_layers" in changed:  # the same list, in the short form of GPT-Neo
        changed["attention_types"] = [[changed["attention_layers"], 1]]
    return changed


def _with_lists(config: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING  # slow

    if config.get("model_type") not in CONFIG_MAPPING:
        return dict(config)
    read = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
    return {**{key: read[key] for key in (*LISTS, *NUMBERS) if key in read}, **config}


def _check_settings(config: Mapping[str, Any], depth: int, whole: str) -> None:
    stated = [config[key] for key in DEPTH if key in config]
    if not stated or any(value != depth for value in stated):
        raise BadInput(
            f"{whole} has {depth} layers, and its config.json does not say so under {DEPTH[0]} or another key that is "
            "known here, so no model of another depth can be described; give another base."
        )
    for key, harmless in BY_PLACE.items():
        if config.get(key, harmless[0]) not in harmless:
            raise BadInput(
                f"{whole} decides by {key} of its config.json what each of its layers does, so none can take the place "
                "of another one; give a base whose layers are alike."
            )
