"""A crossover of two models at one point of their flattened parameters, written as settings of the tensors."""

from __future__ import annotations

from collections.abc import Mapping

from evolver.merging.settings.rules import rules_of
from evolver.records.recipe import EMBEDDINGS, Rule, Value, layer_of


def one_point(sizes: Mapping[str, int], ratio: float, point: float) -> tuple[Rule, ...]:
    """The rules of ``split_slerp`` that mix two models by ``ratio`` before a point, and by 1 - ``ratio`` after it.

    The parameters are flattened in the order in which a text passes them: embeddings, layers by their numbers, and the
    other tensors. Within a layer the tensors stand in the order of ``sizes``.

    Args:
        sizes: the number of scalars of every tensor.
        point: which share of all scalars lies before the point.
    """
    left = round(point * sum(sizes.values()))
    values: dict[str, Mapping[str, Value]] = {}
    for name in sorted(sizes, key=_depth):  # a stable sort
        before = min(max(left, 0), sizes[name])
        left -= sizes[name]
        if 0 < before < sizes[name]:
            values[name] = {"t": ratio, "split": before / sizes[name]}
        else:
            values[name] = {"t": ratio if before else 1.0 - ratio, "split": 1.0}
    return rules_of(values)


def _depth(name: str) -> tuple[int, int]:
    layer = layer_of(name)
    if layer is not None:
        return 1, layer
    return (0 if any(part in name for part in EMBEDDINGS) else 2), 0
