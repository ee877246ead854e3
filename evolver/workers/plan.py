"""What a worker needs to know to be built anywhere."""

from __future__ import annotations

from dataclasses import dataclass

from evolver.config import Config
from evolver.evaluation.tasks import Tasks
from evolver.records import Split, content_hash

# Whose versions scores, and statistics of models, depend on.
SCORING_PACKAGES = ("torch", "transformers", "lm-eval")


@dataclass(frozen=True)
class Plan:
    """What a worker needs to know to be built anywhere: paths and numbers, no tensors.

    ``digests`` are those of the base and of every expert, ``items`` the hash of the items of both splits; a worker
    that finds other weights or other items where it runs refuses to work. ``stops`` says that the search is of a kind
    which may have its answer before the last dev item.
    """

    config: Config
    digests: dict[str, str]
    items: dict[Split, str]
    stops: bool = True

    def block(self, split: Split, count: int) -> int:
        """How many of a split's ``count`` items are scored at a time: all of them where no answer comes earlier, as
        larger batches hold less padding. The same for all candidates of a run: in bfloat16 batches show in scores.
        """
        return self.config.evaluation.block_items if self.stops and split == "dev" else count


def items_hash(tasks: Tasks, split: Split) -> str:
    """One hash for the items of a split in their order."""
    return content_hash([[i.task, i.hash] for i in tasks.items.of(split)])
