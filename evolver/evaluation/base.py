"""What every kind of evaluation offers, and how one is chosen."""

from __future__ import annotations

from typing import Protocol

from evolver.config import Config
from evolver.evaluation.items import Items
from evolver.evaluation.live import LiveModel
from evolver.evaluation.scoring import Scale
from evolver.records import Split


class Tasks(Protocol):
    """Tasks as configured: checked without a model, then turned into a scorer once there is one."""

    items: Items

    def scale(self, split: Split) -> Scale: ...
    def scorer(self, model: LiveModel, split: Split) -> Scorer: ...


class Scorer(Protocol):
    """Scores the live model on the items of one split; prompts and tokens are built once."""

    def score(self, start: int, stop: int) -> list[float]:
        """Per-item scores of the items ``start`` … ``stop - 1`` of the split's order."""
        ...


def load_tasks(config: Config) -> Tasks:
    """The tasks of a configuration.

    Raises BadInput for an unknown task or metric, an empty set, or sets that overlap.
    """
    if config.model.kind == "classifier":
        from evolver.evaluation.classification import ClassificationTasks

        return ClassificationTasks(config)
    from evolver.evaluation.language import LanguageTasks

    return LanguageTasks(config)
