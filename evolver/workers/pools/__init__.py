"""The registry of pools of workers. Each file in this package adds a pool; one that needs Ray is in ``cluster/pools``.

A configuration names a pool with ``pool.kind``. The name is that of the file, and the file registers the pool under it.
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
    """Register a function under ``name``. It is called as ``make(plan, split, tasks)`` and makes a pool for a split."""

    def register(make: PoolMaker) -> PoolMaker:
        POOLS[name] = make
        return make

    return register
