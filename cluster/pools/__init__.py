"""Pools that need Ray, and the functions that find a pool of any kind by its name."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil

from evolver.errors import BadInput, nearest
from evolver.workers import pools
from evolver.workers.pools import POOLS, PoolMaker


def pool_names() -> list[str]:
    """The names of all kinds of pools, sorted: those with a file, here or in ``evolver/workers/pools``, and those that
    a program has registered.
    """
    files = {m.name for m in pkgutil.iter_modules([*pools.__path__, *__path__])}
    return sorted({*files, *POOLS})


def check_pool(name: str) -> None:
    """Check that a kind of pool exists.

    Raises BadInput for an unknown kind, naming the nearest known ones.
    """
    if name not in pool_names():
        raise BadInput(f"pool.kind: unknown pool {name!r}; {nearest(name, ['auto', *pool_names()])}")


def pool_named(name: str) -> PoolMaker:
    """The function that makes a pool of this kind. Its file is imported only now, because importing Ray takes seconds.

    Raises BadInput for an unknown kind.
    """
    check_pool(name)
    for package in (pools.__name__, __name__):
        if name not in POOLS and importlib.util.find_spec(f"{package}.{name}"):
            importlib.import_module(f"{package}.{name}")
    return POOLS[name]
