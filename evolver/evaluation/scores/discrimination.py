"""Whether the items of a task can tell models apart: a permutation test within items.

If models do not differ on a task, their answers to an item may be exchanged among them. The test compares the spread of
the models' metrics with that after many random exchanges. For two answers, right and wrong, this is Cochran's Q test.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evolver.evaluation.scores.metrics import Metric, Numbers
from evolver.evaluation.scores.resampling import HELD, SIGNIFICANCE
from evolver.evaluation.scores.scoring import Scale
from evolver.records import ItemAnswer

EXCHANGES = 1999


def undecided(models: Sequence[Sequence[ItemAnswer]], scale: Scale, seed: int) -> dict[str, float]:
    """The tasks whose items do not tell the models apart at the level of 5 %, with the p-value of each.

    Args:
        models: the answers of at least two models to all items, in the order of the scale.
        scale: how items make up the score; items that share a source document are exchanged together.
        seed: seed of the exchanges.
    """
    found = {task: spread_test(models, scale, task, seed) for task in scale.places}
    return {task: p for task, p in found.items() if p > SIGNIFICANCE}


def spread_test(models: Sequence[Sequence[ItemAnswer]], scale: Scale, task: str, seed: int) -> float:
    """The p-value of the hypothesis that the models do not differ on a task."""
    places, metric = scale.places[task], scale.metrics[task]
    table = np.asarray([[items[p] for items in models] for p in places], dtype=np.float64)  # (items, models[, counts])
    if (table == table[:, :1]).all():
        return 1.0
    right = np.asarray([scale.right[p] if scale.right else 0.0 for p in places])
    _, documents = np.unique([scale.clusters[p] for p in places] if scale.clusters else places, return_inverse=True)
    observed = float(_spread(table[None], right, metric)[0])
    rng, as_far, done = np.random.default_rng(seed), 0, 0
    step = max(1, HELD // table.size)
    while done < EXCHANGES:
        count = min(step, EXCHANGES - done)
        order = rng.random((count, documents.max() + 1, len(models))).argsort(-1)[:, documents]
        index = order[..., None] if table.ndim == 3 else order
        exchanged = np.take_along_axis(np.broadcast_to(table, (count, *table.shape)), index, axis=2)
        as_far += int((_spread(exchanged, right, metric) >= observed * (1 - 1e-9)).sum())
        done += count
    return (as_far + 1) / (EXCHANGES + 1)


def _spread(tables: NDArray[np.float64], right: Numbers, metric: Metric) -> Numbers:
    """The variance of the models' metrics, (R), in tables of answers, (R, items, models[, counts])."""
    rounds, items, models = tables.shape[:3]
    if metric.counts:
        values = metric.of(tables[..., 1:].sum(1).reshape(rounds * models, metric.counts), np.zeros(1))
    else:
        answers = np.moveaxis(tables, 2, 1).reshape(rounds * models, items)
        values = metric.of(answers, np.broadcast_to(right, answers.shape))
    spread: Numbers = values.reshape(rounds, models).var(1)
    return spread
