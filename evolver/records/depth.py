"""Which layers a recipe's model consists of: where each of them comes from, and which of them are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evolver.records.recipe import Layers, Recipe, at_layer, layer_of


@dataclass(frozen=True)
class LayerOrigin:
    """Where a layer of a model comes from. Two layers of equal origin have the same weights.

    Attributes:
        model: the id of the recipe that it is a layer of, which is no ``Layers`` itself.
        layer: its number there.
        base: its number in the models that everything is made of; it says of which kind the layer is, such as one with
            a sliding window.
    """

    model: str
    layer: int
    base: int


def layer_origins(recipe: Recipe, depth: int) -> tuple[LayerOrigin, ...]:
    """The origin of every layer of a recipe's model, in the order of the layers.

    Args:
        depth: the number of layers of base and experts.
    """
    count = _depth(recipe, depth)
    return tuple(LayerOrigin(*_owner(recipe, layer), _in_base(recipe, layer)) for layer in range(count))


def origin_of(recipe: Recipe, name: str) -> tuple[str, str]:
    """The id of the recipe below all ``Layers`` that a tensor of a model comes from, and the tensor's name there."""
    while isinstance(recipe, Layers):
        recipe, name = recipe.source(name)
    return recipe.id, name


def name_in_base(name: str, origins: Sequence[LayerOrigin]) -> str:
    """The name that the base's tensor of the same kind has."""
    layer = layer_of(name)
    return name if layer is None else at_layer(name, origins[layer].base)


def _depth(recipe: Recipe, depth: int) -> int:
    while not isinstance(recipe, Layers) and recipe.inputs:
        recipe = recipe.inputs[0]
    return len(recipe.program) if isinstance(recipe, Layers) else depth


def _owner(recipe: Recipe, layer: int) -> tuple[str, int]:
    while isinstance(recipe, Layers):
        number, layer = recipe.program[layer]
        recipe = recipe.inputs[number]
    return recipe.id, layer


def _in_base(recipe: Recipe, layer: int) -> int:
    while recipe.inputs:
        number = 0
        if isinstance(recipe, Layers):
            number, layer = recipe.program[layer]
        recipe = recipe.inputs[number]
    return layer
