"""The check of an exported model: loaded from disk and scored again, it must give the answers in the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from evolver.config.changes import unrounded
from evolver.driver.prepare import Prepared
from evolver.evaluation.tasks import SplitScorer
from evolver.records import ItemAnswer
from evolver.workers.worker import build_model


def score_again(
    prepared: Prepared, best: Path, recorded: Sequence[ItemAnswer], device: str, quantised: bool = False
) -> dict[str, int]:  # fmt: skip
    """Load an exported folder as any user would, score it on the first dev items, and count the equal answers.

    Args:
        quantised: the folder's weights are rounded already, if those of the run were.
    """
    config = unrounded(prepared.config) if quantised else prepared.config
    torch.set_num_threads(config.evaluation.threads)
    live = build_model(config, prepared.opened, device, best)
    fresh = answer_again(prepared.tasks.scorer(live, "dev"), len(recorded), prepared.plan.block("dev", len(recorded)))
    live.close()
    return {"items": len(recorded), "equal": sum(a == b for a, b in zip(recorded, fresh, strict=True))}


def answer_again(scorer: SplitScorer, count: int, block: int) -> list[ItemAnswer]:
    """The answers to the first items, scored so many at a time as a run does: in bfloat16 batches show in scores."""
    return [v for s in range(0, count, block) for v in scorer.score(s, min(s + block, count)).items]
