"""Metrics of weighted items, from sums of a few features of each item.

A bootstrap resample is a weight for each item: how often it is drawn. Almost all metrics are functions of sums over
items, so the metrics of many models on many resamples are products of two matrices. The median is not such a function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evolver.evaluation.scores import metrics
from evolver.evaluation.scores.metrics import Metric, Numbers

# Sums a feature of the items, (…, n), over the items, each times its weight.
Total = Callable[[NDArray[Any]], Numbers]


def is_weighable(metric: Metric) -> bool:
    """Whether a metric can be computed from weighted items."""
    return metric.of not in (metrics.median_item, metrics.opposite)


def weighted_metric(metric: Metric, answers: Numbers, right: Numbers, total: Total) -> Numbers:
    """The metric of weighted items, in the shape that ``total`` gives.

    Args:
        metric: one that is weighable.
        answers: (…, n) or, for a metric of counts, (…, n, counts).
        right: the right answers, (n).
        total: sums features, and thereby says the weights.
    """
    if metric.counts:
        sums = np.stack([total(answers[..., k]) for k in range(metric.counts)], -1)
        return metric.of(sums.reshape(-1, metric.counts), np.zeros(1)).reshape(sums.shape[:-1])
    return _FORMS[metric.of](answers, right, total)


def _mean(answers: Numbers, right: Numbers, total: Total) -> Numbers:
    return total(answers) / total(np.ones(len(right)))


def _macro_f1(answers: Numbers, right: Numbers, total: Total) -> Numbers:
    f1: Any = 0.0
    occurring: Any = 0.0
    for label in np.union1d(answers, right):
        given, wanted = answers == label, right == label
        both = total(given) + total(wanted)
        f1 = f1 + metrics.divided(2 * total(given & wanted), both)
        occurring = occurring + (both > 0)
    found: Numbers = f1 / occurring
    return found


def _mcc(answers: Numbers, right: Numbers, total: Total) -> Numbers:
    count = total(np.ones(len(right)))
    agree: Any = 0.0
    given_twice: Any = 0.0
    wanted_twice: Any = 0.0
    for label in np.union1d(answers, right):
        given, wanted = total(answers == label), total(right == label)
        agree, given_twice, wanted_twice = agree + given * wanted, given_twice + given**2, wanted_twice + wanted**2
    spread = (count**2 - wanted_twice) * (count**2 - given_twice)
    return metrics.divided(total(answers == right) * count - agree, np.sqrt(spread))


def _pearson(answers: Numbers, right: Numbers, total: Total) -> Numbers:
    # Near their means, squares lose no digits.
    a, b = answers - answers.mean(-1, keepdims=True), right - right.mean()
    count, sum_a, sum_b = total(np.ones(len(right))), total(a), total(b)
    above = total(a * b) - sum_a * sum_b / count
    spread = (total(a * a) - sum_a**2 / count) * (total(b * b) - sum_b**2 / count)
    return metrics.divided(above, np.sqrt(np.maximum(spread, 0.0)))


def _labels_f1(answers: Numbers, right: Numbers, total: Total) -> Numbers:
    given, wanted = answers.astype(np.int64), right.astype(np.int64)
    f1: Any = 0.0
    occurring: Any = 0.0
    for label in range(int(max(given.max(initial=0), wanted.max(initial=0))).bit_length()):
        g, w = given >> label & 1, wanted >> label & 1
        both = total(g) + total(w)
        f1 = f1 + metrics.divided(2 * total(g & w), both)
        occurring = occurring + (both > 0)
    return metrics.divided(f1 + 0.0 * total(answers), occurring + 0.0 * total(answers))


def _binary_f1(answers: Numbers, right: Numbers, total: Total) -> Numbers:
    given, wanted = answers == 1, right == 1
    return metrics.divided(2 * total(given & wanted), total(given) + total(wanted))


def _perplexity(answers: Numbers, right: Numbers, total: Total) -> Numbers:
    found: Numbers = -np.exp(-_mean(answers, right, total))
    return found


def _weighted_perplexity(answers: Numbers, right: Numbers, total: Total) -> Numbers:
    found: Numbers = -np.exp(-total(answers) / total(right))
    return found


def _bits_per_byte(answers: Numbers, right: Numbers, total: Total) -> Numbers:
    found: Numbers = total(answers) / total(right) / np.log(2)
    return found


_FORMS: dict[Any, Callable[[Numbers, Numbers, Total], Numbers]] = {
    metrics.mean: _mean,
    metrics.macro_f1: _macro_f1,
    metrics.mcc: _mcc,
    metrics.pearson: _pearson,
    metrics.labels_f1: _labels_f1,
    metrics.binary_f1: _binary_f1,
    metrics.perplexity: _perplexity,
    metrics.weighted_perplexity: _weighted_perplexity,
    metrics.bits_per_byte: _bits_per_byte,
}
