"""Places whose coefficients are learned by themselves: the model, its layers, its tensors, or parts of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from evolver.records.recipe import Place, layer_of, part_rows


@dataclass(frozen=True)
class LearntPlace:
    """The place of a tensor, or of some of its rows.

    Attributes:
        name: of the tensor.
        size: the number of its scalars.
    """

    place: Place
    name: str
    size: int

    @property
    def layer(self) -> int | None:
        """The layer that it belongs to; None: it is outside of the layers."""
        return layer_of(self.name)


def layer_places(depth: int) -> tuple[Place, ...]:
    """What is outside of the layers, and then every layer; the model as a whole, if no layers are told apart."""
    inside = [Place(layers=(layer, layer + 1)) for layer in range(depth)]
    return (Place(outside=True), *inside) if inside else (Place(),)


def owner_of(places: Sequence[Place], name: str) -> int:
    """The number of the place whose coefficients a tensor has: of those that cover it the last one."""
    layer = layer_of(name)
    return max(number for number, place in enumerate(places) if place.covers(name, layer))


def tensor_places(shapes: Mapping[str, Sequence[int]], counts: Mapping[str, int] | None = None) -> list[LearntPlace]:
    """A place for each tensor; or for each part of it that has rows.

    Of two rules that cover a tensor the last one holds, so where a name holds another one, its place comes later.

    Args:
        counts: into how many parts the rows of a tensor are divided; without it, none is. A tensor has no more parts
            than rows.
    """
    found = []
    for name in sorted(shapes, key=len):  # a stable sort
        layer, rows = layer_of(name), shapes[name][0] if shapes[name] else 1
        place = Place(layers=None if layer is None else (layer, layer + 1), outside=layer is None, contains=name)
        count = min((counts or {}).get(name, 1), rows)
        parts = [(number, count) for number in range(count)] if count > 1 else [None]
        for part in parts:
            own = part_rows(part, rows)
            size = math.prod(shapes[name]) * (own.stop - own.start) // max(1, rows)
            found.append(LearntPlace(replace(place, part=part), name, size))
    return found
