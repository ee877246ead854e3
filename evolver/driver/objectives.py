"""The objectives of a run: those that its configuration names, or every task where its search wants several."""

from __future__ import annotations

import math

from evolver.config import Config
from evolver.evaluation.tasks import Tasks
from evolver.records.objective import Objective

# The search that has several objectives whether or not the configuration names any.
SEVERAL = "nsga2"


def objectives_of(config: Config, tasks: Tasks) -> tuple[Objective, ...]:
    """The objectives of a run; none where it has the score alone.

    The tasks of a group count by their weights. Of a task that consists of several, all count by their shares in it.
    """
    weights, parts = tasks.scale("dev").weights, tasks.parts("dev")
    if config.objectives:
        named = {name: [p for task in group for p in parts[task]] for name, group in config.objectives.items()}
    elif SEVERAL in (config.search["algorithm"], _inner(config)) and len(weights) > 1:
        named = {task: [task] for task in weights}
    else:
        named = {}
    found = []
    for name, members in named.items():
        total = math.fsum(weights[task] for task in members)
        found.append(Objective(name, {task: weights[task] / total for task in members}))
    return tuple(found)


def _inner(config: Config) -> object:
    """The name of the search inside of the search, if there is one."""
    inside = config.search.get("of")
    return inside.get("algorithm") if isinstance(inside, dict) else None
