"""Pools that need Ray, and where a pool of any kind is found by its name."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil

from evolver.errors import BadInput, nearest
from evolver.workers import pools
from evolver.workers.pools import POOLS, PoolMaker


def pool_names() -> list[str]:
    """The kinds of pools that there are."""
    files = {m.name for m in pkgutil.iter_modules([*pools.__path__, *__path__])}
    return sorted({*files, *POOLS})


def check_pool(name: str) -> None:
    """Raises BadInput for an unknown kind, naming the nearest known ones."""
    if name not in pool_names():
        raise BadInput(f"pool.kind: unknown pool {name!r}; {nearest(name, ['auto', *pool_names()])}")


def pool_named(name: str) -> PoolMaker:
    """What makes a pool of a kind; its file is imported now, as Ray takes seconds.

    Raises BadInput for an unknown kind.
    """
    check_pool(name)
    for package in (pools.__name__, __name__):
        if name not in POOLS and importlib.util.find_spec(f"{package}.{name}"):
            importlib.import_module(f"{package}.{name}")
    return POOLS[name]
