"""The names of a recipe's tensors."""

from __future__ import annotations

from collections.abc import Sequence

from evolver.checkpoints.weights import LAYER, layer_of
from evolver.records import Expert, Layers, Recipe


def names_of(recipe: Recipe, base: Sequence[str]) -> list[str]:
    """The names of the model's tensors, in the order of the base's, which are given."""
    while not isinstance(recipe, Expert | Layers):  # no recursion: a lineage can be thousands of generations deep
        recipe = recipe.inputs[0]
    if isinstance(recipe, Expert):
        return list(base)
    outside = [n for n in names_of(recipe.inputs[0], base) if layer_of(n) is None]
    inside = [names_of(recipe.inputs[i], base) for i, _ in recipe.program]
    copies = enumerate(zip(inside, recipe.program, strict=True))
    return outside + [at_layer(n, to) for to, (names, (_, of)) in copies for n in names if layer_of(n) == of]


def at_layer(name: str, layer: int) -> str:
    """The name of the same tensor in another layer."""
    match = LAYER.search(name)
    return name if match is None else f"{name[: match.start(1)]}{layer}{name[match.end(1) :]}"
