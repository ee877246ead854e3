"""The objectives of a run: those that its configuration names, or every task where its search wants several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from evolver.config import Config
from evolver.evaluation.tasks import Tasks
from evolver.records.objective import Objective
from evolver.search import SEARCHES


def objectives_of(config: Config, tasks: Tasks) -> tuple[Objective, ...]:
    """The objectives of a run; none where it has the score alone.

    The tasks of a group count by their weights. Of a task that consists of several, all count by their shares in it.
    """
    weights, parts = tasks.scale("dev").weights, tasks.parts("dev")
    if config.objectives:
        named = {name: [p for task in group for p in parts[task]] for name, group in config.objectives.items()}
    elif len(weights) > 1 and any(a.several for n in _algorithms(config.search) if (a := SEARCHES.get(str(n)))):
        named = {task: [task] for task in weights}
    else:
        named = {}
    found = []
    for name, members in named.items():
        total = math.fsum(weights[task] for task in members)
        found.append(Objective(name, {task: weights[task] / total for task in members}))
    return tuple(found)


def _algorithms(section: Mapping[str, Any]) -> Iterator[object]:
    """The names of a search and of those inside of it."""
    name = section.get("algorithm")
    yield name
    inside = section.get(SEARCHES[name].inside) if isinstance(name, str) and name in SEARCHES else None
    if isinstance(inside, dict):
        yield from _algorithms(inside)
