"""Weights of a merge as the ratio of a mixture: 40 : 30 : 20 : 10."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from evolver.records.recipe import Merge, Place, Recipe
from evolver.report.text import escaped, layers_in_words, part_in_words

NEAR = 1e-6  # to one, of a sum of weights that are meant to sum to one


def mixture(settings: Mapping[str, Any]) -> str | None:
    """The weights of a merge in percent of their sum, if they sum to one or are normalised; else None.

    The percentages are whole numbers if these sum to 100 and none of them is 0 for a weight that is not; else they have
    one digit behind the point.
    """
    weights = settings.get("weight")
    if not isinstance(weights, tuple) or len(weights) < 2 or min(weights) < 0:
        return None
    total = math.fsum(weights)
    if total <= 0 or not (settings.get("normalize") is True or abs(total - 1) <= NEAR):
        return None
    parts = [100 * w / total for w in weights]
    whole = [round(part) for part in parts]
    fine = sum(whole) == 100 and all(n or not part for n, part in zip(whole, parts, strict=True))
    return " : ".join(f"{part:.{0 if fine else 1}f}" for part in parts)


def mixtures_of(recipe: Recipe) -> Iterator[str]:
    """Sentences on the mixtures that a model is, one for each place with weights of its own."""
    if not isinstance(recipe, Merge):
        return
    for rule in recipe.rules:
        ratio = mixture(dict(rule.values))
        if ratio is not None and len(recipe.inputs) == ratio.count(":") + 1:
            names = " : ".join(escaped(node.label) for node in recipe.inputs)
            yield f"Its mixture{_where(rule.place)} is {names} = {ratio}."


def _where(place: Place) -> str:
    where = f" in {layers_in_words(place.layers)}" if place.layers else " outside the layers" * place.outside
    where += f" for tensors with `{place.contains}`" if place.contains else ""
    return where + (f", {part_in_words(place.part)}" if place.part else "")
