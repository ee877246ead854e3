"""How sure a score is, and a difference of two scores: resampling over items."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from evolver.evaluation.scores.metrics import Numbers
from evolver.evaluation.scores.scoring import Scale

RESAMPLES = 9999
# Numbers that are held at once.
HELD = 1 << 22


@dataclass(frozen=True)
class Comparison:
    """One model minus another one on the same items: difference of scores, its interval, and how surprising it is."""

    difference: float
    low: float
    high: float
    p: float


def interval(items: Sequence[float], scale: Scale, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a score, over items within tasks."""
    return _middle(_resampled([items], scale, seed)[0])


def compare(ours: Sequence[float], theirs: Sequence[float], scale: Scale, seed: int) -> Comparison:
    """A paired comparison of two models' items.

    The interval is a 95 % percentile bootstrap over items within tasks, the same items for both models; p is that of a
    two-sided permutation test for paired data, which exchanges the two models' answers to an item (Fisher's
    randomisation test; of judged items, their differences change sign).
    """
    mine, other = _resampled([ours, theirs], scale, seed)
    difference = scale.score(ours) - scale.score(theirs)
    if all(m.judged for m in scale.metrics.values()):
        share = np.empty(len(scale.tasks))
        for task, places in scale.places.items():
            share[places] = _weight(scale, task) / len(places)
        each = share * (np.asarray(ours) - np.asarray(theirs))
        difference, p = math.fsum(each), _by_signs(each, seed)
    else:
        p = _by_exchange(np.asarray(ours), np.asarray(theirs), scale, seed)
    return Comparison(difference, *_middle(mine - other), p)


def _resampled(models: Sequence[Sequence[float]], scale: Scale, seed: int) -> list[Numbers]:
    """Scores of every model on resamples of the items, (RESAMPLES) each."""
    rng, totals = np.random.default_rng(seed), [np.zeros(RESAMPLES) for _ in models]
    for task, places in scale.places.items():
        of, weight = scale.metrics[task].of, _weight(scale, task)
        answers = [np.asarray(items, dtype=np.float64)[places] for items in models]
        right = np.asarray(scale.right)[places] if scale.right else np.zeros(len(places))
        for rows in _blocks(len(places)):
            drawn = rng.integers(len(places), size=(rows.stop - rows.start, len(places)))
            for total, answer in zip(totals, answers, strict=True):
                total[rows] += weight * of(answer[drawn], right[drawn])
    return totals


def _blocks(width: int) -> Iterator[slice]:
    step = max(1, HELD // width)
    return (slice(start, min(RESAMPLES, start + step)) for start in range(0, RESAMPLES, step))


def _by_signs(each: Numbers, seed: int) -> float:
    """P of the sum of the items' differences."""
    moved = each[each != 0]
    if len(moved) < 2:  # with a single item that differs, both signs are equally extreme
        return 1.0
    rng = np.random.default_rng(seed)
    test = scipy.stats.permutation_test(
        (moved,), np.sum, permutation_type="samples", n_resamples=RESAMPLES, rng=rng, vectorized=True
    )
    return float(test.pvalue)


def _by_exchange(ours: Numbers, theirs: Numbers, scale: Scale, seed: int) -> float:
    """P of the difference of the scores."""
    if np.array_equal(ours, theirs):
        return 1.0

    def difference(a: NDArray[Any], b: NDArray[Any], axis: int) -> Numbers:
        a, b = np.moveaxis(a, axis, -1), np.moveaxis(b, axis, -1)
        lead = np.broadcast_shapes(a.shape, b.shape)[:-1]
        rows = [np.broadcast_to(x, (*lead, x.shape[-1])).reshape(-1, x.shape[-1]) for x in (a, b)]
        one, other = (_scores(x, scale) for x in rows)
        return (one - other).reshape(lead)

    test = scipy.stats.permutation_test(
        (ours, theirs), difference, permutation_type="samples", n_resamples=RESAMPLES,
        rng=np.random.default_rng(seed), vectorized=True, batch=max(1, HELD // len(ours)),
    )  # fmt: skip
    return float(test.pvalue)


def _scores(answers: Numbers, scale: Scale) -> Numbers:
    """Scores of many sets of answers, (R, items) to (R)."""
    total = np.zeros(len(answers))
    for task, places in scale.places.items():
        right = np.asarray(scale.right)[places] if scale.right else np.zeros(len(places))
        total += _weight(scale, task) * scale.metrics[task].of(
            answers[:, places], np.broadcast_to(right, (len(answers), len(places)))
        )
    return total


def _weight(scale: Scale, task: str) -> float:
    return scale.weights[task] / math.fsum(scale.weights.values())


def _middle(values: Numbers) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
