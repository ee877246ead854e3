"""The models that a program of layers takes its layers from, and the recipe that a program makes of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evolver.records import Choice, Knob
from evolver.records.recipe import Layers, Merge, Recipe
from evolver.search.base import Space

# The source that is no expert, but the merge whose coefficients are searched along with the program.
MERGE = "merge"
# The method by which several experts give one layer, and the setting of it that says how strongly (GPTailor).
BLEND, SCALE = "task_arithmetic", "lambda"


@dataclass(frozen=True)
class Sources:
    """Models of equal depth.

    Attributes:
        names: of the models, in the order in which a user lists them; the first one is the outer model by default.
        models: base and experts by name.
        base: what a layer is taken from where no source is chosen.
        depth: their number of layers.
        merge: the search space of the source ``merge``; None: it is no source.
        blend: makes a merge of some models by task arithmetic, with a scale.
    """

    names: tuple[str, ...]
    models: Mapping[str, Recipe]
    base: Recipe
    depth: int
    merge: Space | None
    blend: Callable[[Sequence[Recipe], float], Recipe]

    @property
    def knobs(self) -> tuple[Knob | Choice, ...]:
        """The coefficients of the merge."""
        return self.merge.knobs if self.merge else ()

    def at(self, values: Mapping[str, Any]) -> dict[str, Recipe]:
        """The sources by name at one point of the space."""
        found = dict(self.models)
        if self.merge:
            found[MERGE] = self.merge.decode({knob.name: values[knob.name] for knob in self.knobs})
        return {name: found[name] for name in self.names}

    def equal(self, mass: float) -> dict[str, Any]:
        """The coefficients at which the merge weighs all experts equally."""
        return self.merge.encode_equal(mass) if self.merge else {}

    def name(self, model: Recipe) -> str | None:
        """The name of the source that a model is; None where it is none."""
        same = (name for name, recipe in self.models.items() if name in self.names and recipe.id == model.id)
        return next(same, MERGE if self.merge and self.merge.encode(model) is not None else None)

    def coefficients(self, models: Sequence[Recipe]) -> dict[str, Any] | None:
        """The coefficients of the one merge among some models, equal ones where there is none; None for several."""
        merges = {m.id: m for m in models if self.name(m) == MERGE}
        if len(merges) > 1:
            return None
        point = self.merge.encode(next(iter(merges.values()))) if self.merge and merges else None
        return point or self.equal(1.0)


class Unbranched:
    """What the spaces of all programs share: a point chooses among no methods, and a grid has an axis for each knob."""

    @property
    def knobs(self) -> tuple[Knob | Choice, ...]:
        """See ``Space``."""
        raise NotImplementedError  # every space below says its own

    @property
    def branches(self) -> Mapping[str, Space]:
        """See ``Space``."""
        return {}

    def within(self, branch: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Space``: there is no branch."""
        return dict(values)

    def axes(self, levels: Callable[[str], int]) -> tuple[tuple[dict[str, Any], ...], ...]:
        """See ``Space``: every word, and of a number so many values at equal distances from end to end."""
        return tuple(_axis(knob, levels(re.split(r"[@[]", knob.name)[0])) for knob in self.knobs)


def _axis(knob: Knob | Choice, levels: int) -> tuple[dict[str, Any], ...]:
    if isinstance(knob, Choice):
        return tuple({knob.name: option} for option in knob.options)
    return tuple({knob.name: knob.at(i / (levels - 1) if levels > 1 else 0.5)} for i in range(levels))


def put_together(layers: Sequence[tuple[Recipe, int]], ends: Recipe) -> Recipe:
    """The recipe of a model.

    Args:
        layers: for each layer, the model that it is taken from and its number there.
        ends: the model of everything that is in no layer: embeddings, last norm and head.
    """
    inputs = {model.id: model for model, _ in ((ends, 0), *layers)}
    place = {model: number for number, model in enumerate(inputs)}
    program = tuple((place[model.id], layer) for model, layer in layers)
    return Layers(tuple(inputs.values()), program, (place[ends.id],) * 2)


def whole_or_program(layers: Sequence[tuple[Recipe, int]], ends: Recipe, depth: int) -> Recipe:
    """The same recipe, but the model itself where the program takes all of its layers in their order. A model that was
    scored before, such as an expert, is then not scored again.
    """
    if [(model.id, layer) for model, layer in layers] == [(ends.id, layer) for layer in range(depth)]:
        return ends
    return put_together(layers, ends)


def taken_apart(recipe: Recipe, depth: int) -> tuple[list[tuple[Recipe, int]], Recipe] | None:
    """The inverse of ``whole_or_program``: the layers and the ends; None where the ends come from two models."""
    if not isinstance(recipe, Layers):
        return [(recipe, layer) for layer in range(depth)], recipe
    first, last = recipe.ends
    if first != last:
        return None
    return [(recipe.inputs[number], layer) for number, layer in recipe.program], recipe.inputs[first]


def blended(model: Recipe) -> tuple[tuple[Recipe, ...], float] | None:
    """The inputs and the scale of a merge that ``Sources.blend`` has made; None for another model."""
    if not isinstance(model, Merge) or model.method != BLEND:
        return None
    scale = model.settings("", None).get(SCALE)
    return (model.inputs, scale) if isinstance(scale, float) and not model.statistics else None
