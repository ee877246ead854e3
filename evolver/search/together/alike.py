"""Recipes that differ so little that scoring both would tell nothing new."""

from __future__ import annotations

import json
from typing import Any

from evolver.records.canonical import content_hash
from evolver.records.recipe import Recipe, dump_recipe

# Two models whose settings agree to so many decimals are as good as equal: a coefficient that is off by 0.0005 of a
# task vector moves less than a tenth of a percent of it.
ALIKE_DECIMALS = 3


def alike(recipe: Recipe) -> str:
    """The same text for recipes of the same steps whose numbers agree to ``ALIKE_DECIMALS`` decimals."""
    return content_hash(_rounded(json.loads(dump_recipe(recipe))))


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, ALIKE_DECIMALS) + 0.0 if isinstance(value, float) else value
