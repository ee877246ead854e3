"""Weights of a merge as the ratio of a mixture: 40 : 30 : 20 : 10."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from evolver.records.recipe import Merge, Place, Recipe
from evolver.report.text import escaped

NEAR = 1e-6  # to one, of a sum of weights that are meant to sum to one


def mixture(settings: Mapping[str, Any]) -> str | None:
    """The weights of a merge in percent of their sum, if they sum to one or are normalised; else None.

    The percentages are whole and sum to 100: those that lose most by rounding down are rounded up. A weight that would
    become 0 has a digit more, as have all others then.
    """
    weights = settings.get("weight")
    if not isinstance(weights, tuple) or len(weights) < 2 or min(weights) < 0:
        return None
    total = math.fsum(weights)
    if total <= 0 or not (settings.get("normalize") is True or abs(total - 1) <= NEAR):
        return None
    for digits in (0, 1):
        parts = _rounded([w / total for w in weights], 100 * 10**digits)
        if all(part or not weight for part, weight in zip(parts, weights, strict=True)):
            break
    return " : ".join(f"{part / 10**digits:.{digits}f}" for part in parts)


def _rounded(shares: list[float], whole: int) -> list[int]:
    """Shares of a whole as integers that sum to it (the largest remainder method)."""
    parts = [math.floor(whole * share) for share in shares]
    order = sorted(range(len(shares)), key=lambda k: parts[k] - whole * shares[k])
    for k in order[: whole - sum(parts)]:
        parts[k] += 1
    return parts


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
    if place.layers:
        first, last = place.layers[0], place.layers[1] - 1
        where = f" in layer {first}" if first == last else f" in layers {first} to {last}"
    else:
        where = " outside the layers" if place.outside else ""
    return where + (f" for tensors with `{place.contains}`" if place.contains else "")
