"""The plan of a run, from which a worker can be built on any machine."""

from __future__ import annotations

from dataclasses import dataclass

from evolver.config import Config
from evolver.evaluation.tasks import Tasks
from evolver.records import Split
from evolver.records.canonical import content_hash

# Whose versions scores, and statistics of models, depend on.
SCORING_PACKAGES = ("torch", "transformers", "lm-eval")

# The names, beside those of models, of the digests of a chat template and of tokens that take the place of the base's.
CHAT, TOKENS = "chat template", "tokens"
# Before the name of a model whose own form, with its own labels, is another one than the form that is merged.
AS_IT_IS = "as it is: "


@dataclass(frozen=True)
class Plan:
    """Everything that a worker needs to know: paths and numbers, but no tensors.

    A worker that finds other weights or other items on its machine refuses to work.

    Attributes:
        config: the configuration of the run.
        digests: digest of the weights of the base and of every expert, by name; of those that also have a form of
            their own, of this one; and of a chat template and tokens.
        items: hash of the items of each split.
        stops: whether the search is of a kind that may stop an evaluation before the last dev item.
    """

    config: Config
    digests: dict[str, str]
    items: dict[Split, str]
    stops: bool = True

    def own_digest(self, name: str) -> str:
        """The digest of a model as it is."""
        return self.digests.get(f"{AS_IT_IS}{name}", self.digests[name])

    def block(self, split: Split, count: int) -> int:
        """How many of a split's ``count`` items are scored at a time.

        Where no evaluation stops early, all items are scored at a time, because larger batches need less padding. The
        number is the same for all candidates of a run, because in bfloat16 a score can depend on its batch.
        """
        return self.config.evaluation.block_items if self.stops and split == "dev" else count


def items_hash(tasks: Tasks, split: Split) -> str:
    """One hash over all items of a split in their order."""
    return content_hash([[i.task, i.hash] for i in tasks.items.of(split)])
