"""The check of an exported model: loaded from disk and scored again, it must give the answers in the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from evolver.config.changes import unrounded
from evolver.driver.prepare import Prepared
from evolver.evaluation.tasks import SplitScorer
from evolver.records import ItemAnswer
from evolver.records.order import OWN, item_order, reordered
from evolver.workers.worker import build_model


def score_again(
    prepared: Prepared, best: Path, recorded: Sequence[ItemAnswer], device: str, quantised: bool = False,
    order: str = OWN,
) -> dict[str, int]:  # fmt: skip
    """Load an exported folder as any user would, score it on the first dev items, and count the equal answers.

    Args:
        recorded: the answers to the first items in this order; to all, in the run's own.
        order: the name of the order in which they were scored.
        quantised: the folder's weights are rounded already, if those of the run were.
    """
    config = unrounded(prepared.config) if quantised else prepared.config
    torch.set_num_threads(config.evaluation.threads)
    live = build_model(config, prepared.opened, device, best)
    count = len(prepared.tasks.items.dev)
    places = item_order(order, count)[: len(recorded)]
    fresh = answer_again(prepared.tasks.scorer(live, "dev"), places, prepared.plan.block("dev", len(recorded)))
    live.close()
    if len(recorded) == count:
        recorded = reordered(recorded, order)
    return {"items": len(recorded), "equal": sum(a == b for a, b in zip(recorded, fresh, strict=True))}


def answer_again(scorer: SplitScorer, places: Sequence[int], block: int) -> list[ItemAnswer]:
    """The answers to items, scored so many at a time as a run does: in bfloat16 batches show in scores."""
    parts = [places[start : start + block] for start in range(0, len(places), block)]
    scored = [(part, scorer.score_at(set(part)).answers) for part in parts]
    return [answers[place] for part, answers in scored for place in part]
