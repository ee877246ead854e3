"""The orders in which items are scored.

A run has one order of its items, in which all answers are recorded. A candidate whose evaluation may end early can be
scored along another order, so that what earlier candidates answered to the first items of the run's order has no
influence on which items this one meets first. Such an order has a name; the name and the number of items decide it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

# The name of the run's own order.
OWN = ""
OfItem = TypeVar("OfItem")


@lru_cache(maxsize=256)
def item_order(name: str, count: int) -> tuple[int, ...]:
    """The places of all items in the order of this name, which looks random and is the same everywhere."""
    if name == OWN:
        return tuple(range(count))
    return tuple(sorted(range(count), key=lambda place: hashlib.sha256(f"{name}:{place}".encode()).digest()))


def reordered(values: Sequence[OfItem], name: str) -> tuple[OfItem, ...]:
    """Values of all items, given in the run's order, in the order of this name."""
    return tuple(values) if name == OWN else tuple(values[place] for place in item_order(name, len(values)))


def restored(values: Sequence[OfItem], name: str) -> tuple[OfItem, ...]:
    """The inverse of ``reordered``."""
    if name == OWN:
        return tuple(values)
    found = dict(zip(item_order(name, len(values)), values, strict=True))
    return tuple(found[place] for place in range(len(values)))
