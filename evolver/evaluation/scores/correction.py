"""The bootstrap bias correction of the best of many scores (BBC-CV, Tsamardinos et al. 2018).

The best of many candidates is partly the luckiest one, so its score on the items that it was chosen by is too high. The
correction repeats the choice on resamples of the items: items are drawn with replacement within each task, the
candidate with the highest score on the drawn items is chosen, and it is scored on the items that were not drawn. The
mean of these scores is the corrected score.

The method assumes that all candidates were fixed before anything was scored. A search that learns from scores proposes
candidates which fit these very items, and no resample undoes that. In such a search the correction is a partial one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evolver.evaluation.scores.metrics import Numbers
from evolver.evaluation.scores.resampling import DIGITS_OF_SCORES, Resampling
from evolver.evaluation.scores.scoring import Scale
from evolver.evaluation.scores.weighted import is_weighable, weighted_metric
from evolver.records import ItemAnswer

# Resamples where all items are judged one by one, and for other metrics, which take longer.
ROUNDS, FEWER_ROUNDS = 1000, 250
# Of fewer documents of a task, a resample too often leaves none out.
LEAST_DOCUMENTS = 5


def obstacle(scale: Scale) -> str:
    """Why the correction cannot be computed, as a part of a sentence; empty where it can."""
    unweighable = [task for task, metric in scale.metrics.items() if not is_weighable(metric)]
    if unweighable:
        return f"the metric of {', '.join(unweighable)} is a median, which the correction does not know"
    if Resampling(scale).smallest < LEAST_DOCUMENTS:
        return f"a task has fewer than {LEAST_DOCUMENTS} items of its own"
    return ""


def rounds_of(scale: Scale) -> int:
    """The number of resamples."""
    return ROUNDS if all(m.judged for m in scale.metrics.values()) else FEWER_ROUNDS


def corrected_best(candidates: Sequence[Sequence[ItemAnswer]], scale: Scale, seed: int) -> float:
    """The corrected score of the candidate that is chosen by the highest score.

    Args:
        candidates: the answers of each candidate to all items, in the order of the scale; the earlier of two with equal
            scores is chosen.
        scale: how items make up the score; one without an ``obstacle``.
        seed: seed of the resampling.
    """
    rng, resampling = np.random.default_rng(seed), Resampling(scale)
    parts = [_Part(candidates, scale, task) for task in scale.places]
    found: list[Numbers] = []
    for count in resampling.blocks(rounds_of(scale), len(candidates)):
        drawn = resampling.draw(rng, count)
        inside = sum(part.weight * part.of_all(drawn) for part in parts)
        chosen = np.round(inside, DIGITS_OF_SCORES).argmax(1)
        left = drawn == 0
        usable = np.all([left[:, part.places].any(1) for part in parts], axis=0)
        outside = sum(part.weight * part.of_chosen(chosen[usable], left[usable]) for part in parts)
        found.append(np.asarray(outside))
    return float(np.concatenate(found).mean())


class _Part:
    """The answers of all candidates to the items of one task."""

    def __init__(self, candidates: Sequence[Sequence[ItemAnswer]], scale: Scale, task: str) -> None:
        self.places, self.metric = scale.places[task], scale.metrics[task]
        self.weight = scale.task_share(task)
        answers = np.asarray([[items[p] for p in self.places] for items in candidates], dtype=np.float64)
        self.answers: Numbers = answers[..., 1:] if self.metric.counts else answers
        self.right: Numbers = np.asarray([scale.right[p] if scale.right else 0.0 for p in self.places])

    def of_all(self, drawn: Numbers) -> Numbers:
        """The metric of every candidate in every round, (R, C); ``drawn`` says how often each item counts, (R, n)."""
        times = drawn[:, self.places]

        def total(feature: Any) -> Numbers:
            feature = np.asarray(feature, dtype=np.float64)
            sums: Numbers = times @ feature.T
            return sums if feature.ndim == 2 else sums[:, None]

        return weighted_metric(self.metric, self.answers, self.right, total)

    def of_chosen(self, chosen: Any, left: Any) -> Numbers:
        """The metric of one candidate in every round, (R), on the items that are ``left`` out, (R, n)."""
        inside = left[:, self.places]
        return weighted_metric(self.metric, self.answers[chosen], self.right, lambda f: (inside * f).sum(-1))
