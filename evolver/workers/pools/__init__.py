"""Pools of workers, and their registry: a file here, or in ``cluster/pools`` where it needs Ray, makes one of them.

``pool.kind`` in a configuration is the name of the file and of the pool that it registers.
"""

from __future__ import annotations

from collections.abc import Callable

from evolver.evaluation.tasks import Tasks
from evolver.pool import Pool
from evolver.records import Split
from evolver.workers.plan import Plan

PoolMaker = Callable[[Plan, Split, Tasks], Pool]
POOLS: dict[str, PoolMaker] = {}


def pool(name: str) -> Callable[[PoolMaker], PoolMaker]:
    """Register what makes a pool for the items of a split."""

    def register(make: PoolMaker) -> PoolMaker:
        POOLS[name] = make
        return make

    return register
