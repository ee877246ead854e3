"""An objective of a search that has several: a task, or a group of tasks whose metrics make up one value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Objective:
    """One objective; more is better.

    Attributes:
        name: of the objective; for a task alone, the task's.
        shares: task → its share in the value; the shares of an objective sum to 1.
    """

    name: str
    shares: Mapping[str, float]

    def of(self, tasks: Mapping[str, float]) -> float | None:
        """The value that these metrics of tasks make up; None where one is missing."""
        if any(task not in tasks for task in self.shares):
            return None
        return math.fsum(share * tasks[task] for task, share in self.shares.items())


def values_of(objectives: Sequence[Objective], tasks: Mapping[str, float]) -> tuple[float, ...] | None:
    """The value of every objective; None where one is missing."""
    found = [objective.of(tasks) for objective in objectives]
    values = tuple(value for value in found if value is not None)
    return values if len(values) == len(found) else None
