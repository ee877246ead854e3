"""Confidence intervals of scores, and paired tests of two models, by resampling items."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from evolver.evaluation.scores.metrics import Metric, Numbers
from evolver.evaluation.scores.resampling import DIGITS_OF_SCORES, HELD, Resampling, times_drawn
from evolver.evaluation.scores.scoring import Scale
from evolver.evaluation.scores.weighted import is_weighable, weighted_metric
from evolver.records import ItemAnswer

RESAMPLES = 9999


@dataclass(frozen=True)
class Comparison:
    """The comparison of one model with another one on the same items.

    Attributes:
        difference: score of the first model minus that of the second.
        low: lower end of the 95 % interval of the difference.
        high: upper end of this interval.
        p: p-value of the hypothesis that the models do not differ.
        ahead: share of the resamples of the items in which the first model has the higher score; resamples in which
            the scores are equal count half.
    """

    difference: float
    low: float
    high: float
    p: float
    ahead: float


def interval(items: Sequence[ItemAnswer], scale: Scale, seed: int) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a score (Efron 1979). Items are resampled within each task; items that
    share a source document are drawn together (see ``Resampling``).

    Args:
        items: the answers to all items, in the order of the scale.
        scale: how items make up the score.
        seed: seed of the resampling.
    """
    return _middle(resampled([items], scale, seed)[0])


def compare(ours: Sequence[ItemAnswer], theirs: Sequence[ItemAnswer], scale: Scale, seed: int) -> Comparison:
    """A paired comparison of two models on the same items.

    The interval is the 95 % percentile bootstrap interval of the difference. Items are resampled within each task, and
    both models get the same resamples. The p-value is that of a two-sided permutation test for paired data (Fisher's
    randomisation test), which exchanges the two models' answers to an item. Where items are judged one by one, this
    changes the sign of an item's difference. Items that share a source document are resampled and exchanged together.

    Args:
        ours: the first model's answers to all items, in the order of the scale.
        theirs: the second model's answers to the same items.
        scale: how items make up the score.
        seed: seed of the resampling.
    """
    mine, other = resampled([ours, theirs], scale, seed)
    difference = scale.score(ours) - scale.score(theirs)
    if all(m.judged for m in scale.metrics.values()):
        each = scale.item_shares * (np.asarray(ours) - np.asarray(theirs))
        moved: Numbers = np.bincount(scale.clusters, each).astype(np.float64) if scale.clusters else each
        difference, p = math.fsum(each), _by_signs(moved, seed)
    else:
        p = _by_exchange(ours, theirs, scale, seed)
    leads = np.round(mine - other, DIGITS_OF_SCORES)
    ahead = float((leads > 0).mean() + (leads == 0).mean() / 2)
    return Comparison(difference, *_middle(mine - other), p, ahead)


def resampled(
    models: Sequence[Sequence[ItemAnswer]], scale: Scale, seed: int, count: int = RESAMPLES
) -> list[Numbers]:  # fmt: skip
    """The scores of every model on the same resamples of the items, (count) for each model."""
    if scale.clusters:
        return _resampled_by_document(models, scale, seed, count)
    rng, totals = np.random.default_rng(seed), [np.zeros(count) for _ in models]
    for task, places in scale.places.items():
        metric, weight = scale.metrics[task], scale.task_share(task)
        answers = [_kept(items, metric, places) for items in models]
        right = _right(scale, places)
        for rows in _blocks(count, len(places)):
            drawn = rng.integers(len(places), size=(rows.stop - rows.start, len(places)))
            for total, answer in zip(totals, answers, strict=True):
                if metric.counts:
                    total[rows] += weight * metric.of(times_drawn(drawn) @ answer, right)
                else:
                    total[rows] += weight * metric.of(answer[drawn], right[drawn])
    return totals


def _resampled_by_document(
    models: Sequence[Sequence[ItemAnswer]], scale: Scale, seed: int, count: int
) -> list[Numbers]:  # fmt: skip
    """The same where items share documents: whole documents are drawn, so a task's number of items varies."""
    rng, resampling = np.random.default_rng(seed), Resampling(scale)
    parts: list[list[Numbers]] = [[] for _ in models]
    for rounds in resampling.blocks(count, 1):
        times = resampling.draw(rng, rounds)
        for part, items in zip(parts, models, strict=True):
            part.append(_weighted_scores(items, scale, times))
    return [np.concatenate(part) for part in parts]


def _weighted_scores(items: Sequence[ItemAnswer], scale: Scale, times: Numbers) -> Numbers:
    """The scores of one model on resamples, (R); ``times``, (R, items), says how often each item is drawn."""
    total = np.zeros(len(times))
    for task, places in scale.places.items():
        metric, right, drawn = scale.metrics[task], _right(scale, places), times[:, places]
        answers = _kept(items, metric, places)
        if is_weighable(metric):
            found = weighted_metric(metric, answers, right, drawn.__matmul__)
        else:
            rows = [np.repeat(np.arange(len(places)), row.astype(np.int64)) for row in drawn]
            found = np.asarray([float(metric.of(answers[row][None], right[row][None])[0]) for row in rows])
        total += scale.task_share(task) * found
    return total


def _kept(items: Sequence[ItemAnswer], metric: Metric, places: Sequence[int]) -> Numbers:
    """What a metric is computed from: the answers to its n items, (n), or their counts, (n, counts)."""
    found = np.asarray([items[p] for p in places], dtype=np.float64)
    return found[:, 1:] if metric.counts else found


def _right(scale: Scale, places: Sequence[int]) -> Numbers:
    return np.asarray(scale.right)[places] if scale.right else np.zeros(len(places))


def _blocks(count: int, width: int) -> Iterator[slice]:
    step = max(1, HELD // width)
    return (slice(start, min(count, start + step)) for start in range(0, count, step))


def _by_signs(each: Numbers, seed: int) -> float:
    """The p-value of the sum of the differences on items, or on documents, by changing their signs."""
    moved = each[each != 0]
    if len(moved) < 2:  # of a single difference, both signs give an equally extreme sum
        return 1.0
    rng = np.random.default_rng(seed)
    test = scipy.stats.permutation_test(
        (moved,), np.sum, permutation_type="samples", n_resamples=RESAMPLES, rng=rng, vectorized=True
    )
    return float(test.pvalue)


def _by_exchange(ours: Sequence[ItemAnswer], theirs: Sequence[ItemAnswer], scale: Scale, seed: int) -> float:
    """The p-value of the difference of the scores, by exchanging the models' answers to an item, or to all items of a
    document.
    """
    if list(ours) == list(theirs):
        return 1.0
    count = max(scale.clusters) + 1 if scale.clusters else len(ours)

    def difference(a: NDArray[Any], b: NDArray[Any], axis: int) -> Numbers:
        a, b = np.moveaxis(a, axis, -1), np.moveaxis(b, axis, -1)
        lead = np.broadcast_shapes(a.shape, b.shape)[:-1]
        rows = [np.broadcast_to(x, (*lead, count)).reshape(-1, count) < count for x in (a, b)]
        if scale.clusters:
            rows = [own[:, scale.clusters] for own in rows]
        one, other = (_scores(x, ours, theirs, scale) for x in rows)
        return (one - other).reshape(lead)

    # What is exchanged are numbers of items or documents: those from ``count`` on are the second model's.
    numbers = np.arange(2.0 * count)
    test = scipy.stats.permutation_test(
        (numbers[:count], numbers[count:]), difference, permutation_type="samples", n_resamples=RESAMPLES,
        rng=np.random.default_rng(seed), vectorized=True, batch=max(1, HELD // len(ours)),
    )  # fmt: skip
    return float(test.pvalue)


def _scores(own: NDArray[np.bool_], ours: Sequence[ItemAnswer], theirs: Sequence[ItemAnswer], scale: Scale) -> Numbers:
    """The scores of R mixtures of two models' answers, (R); ``own``, (R, items), says which are the first model's."""
    total = np.zeros(len(own))
    for task, places in scale.places.items():
        metric, right, first = scale.metrics[task], _right(scale, places), own[:, places]
        a, b = _kept(ours, metric, places), _kept(theirs, metric, places)
        if metric.counts:
            found = metric.of(first.astype(np.float64) @ (a - b) + b.sum(0), right)
        else:
            found = metric.of(np.where(first, a, b), np.broadcast_to(right, first.shape))
        total += scale.task_share(task) * found
    return total


def _middle(values: Numbers) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
