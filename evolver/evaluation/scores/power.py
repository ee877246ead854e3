"""The power of a paired test: which differences between two models a set of items can show (Miller, 2411.00640).

The score is a weighted mean over tasks, so the difference of two models has the variance Σ w² · Var(task), and the
items of one task share its weight equally. Items that come from one source document are correlated, and the variance of
their sum is larger than the sum of their variances. The smallest difference that a two-sided test at 5 % finds with a
probability of 80 % is 2.80 standard errors.

Nothing here depends on an observed difference: power that is computed from it says no more than the p-value (Hoenig and
Heisey 2001). The standard error follows from how often two models answer items differently, the discordance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from evolver.evaluation.scores.comparison import resampled
from evolver.evaluation.scores.metrics import Numbers
from evolver.evaluation.scores.resampling import SIGNIFICANCE
from evolver.evaluation.scores.scoring import Scale
from evolver.records import ItemAnswer

POWER = 0.8
# Standard errors in the smallest difference that is found with this power: 2.80.
STANDARD_ERRORS = float(scipy.stats.norm.ppf(1 - SIGNIFICANCE / 2) + scipy.stats.norm.ppf(POWER))
# Discordances to reckon with before any model is scored.
DISCORDANCES = (0.1, 0.2, 0.3)
RESAMPLES_OF_POWER = 1000

Answers = Sequence[ItemAnswer]


@dataclass(frozen=True)
class Margin:
    """What a set of items can show.

    Attributes:
        discordance: the share of items that two models answer differently, each task by its weight in the score.
        smallest: the smallest difference of two scores that is found with a probability of 80 %.
        items: the number of items of the set.
    """

    discordance: float
    smallest: float
    items: int

    @property
    def possible(self) -> bool:
        """Whether models can differ by so much: scores of items from 0 to 1 differ by the discordance at most."""
        return self.smallest <= self.discordance

    def needed(self, difference: float) -> int:
        """How many items it takes to find a difference, with the same shares of all tasks."""
        return math.ceil(self.items * (self.smallest / difference) ** 2 - 1e-9)


def assumed_margin(scale: Scale, discordance: float) -> Margin:
    """What the items of a scale can show if two models answer this share of them differently, in every task.

    Nothing is known of how strongly the items of a document are correlated, so they count as one.

    Args:
        scale: one without ``unjudged`` tasks, for which nothing follows from a discordance.
    """
    variances = dict.fromkeys(scale.places, discordance)
    return Margin(discordance, STANDARD_ERRORS * _error(scale, variances, 1.0), len(scale.tasks))


def measured_margin(experts: Sequence[Answers], dev: Scale, report: Scale, seed: int) -> Margin:
    """What the report items can show of two models that differ on items as two experts do on the dev items.

    Of all pairs of experts, the median is taken. The variance of an item's difference is that of two models which
    differ as often as the two experts but are equally good, so the observed difference plays no part. Of a metric that
    is no mean of items, it is the variance of the difference over resamples, times the number of items.

    Args:
        experts: the answers of at least two experts to all dev items.
        dev, report: the scales of both sets.
        seed: of the resampling, which metrics need that are no means of items.
    """
    resamples = {task: _resamples(experts, dev, task, seed) for task, m in dev.metrics.items() if not m.judged}
    errors, shares = [], []
    for one, other in itertools.combinations(range(len(experts)), 2):
        ours, theirs = experts[one], experts[other]
        variances = {
            task: len(places) * float((resamples[task][one] - resamples[task][other]).var())
            if task in resamples
            else float((_differences(ours, theirs, places) ** 2).mean())
            for task, places in dev.places.items()
        }
        typical = float(np.mean(list(variances.values())))
        known = {task: variances.get(task, typical) for task in report.places}
        errors.append(_error(report, known, _correlation(ours, theirs, dev)))
        shares.append(_discordance(ours, theirs, dev))
    return Margin(float(np.median(shares)), STANDARD_ERRORS * float(np.median(errors)), len(report.tasks))


def _error(scale: Scale, variances: Mapping[str, float], correlation: float) -> float:
    """The standard error of the difference of two scores.

    Args:
        variances: of an item's difference, by task.
        correlation: of the differences on two items of one document.
    """
    parts = scale.item_shares * np.sqrt([variances[task] for task in scale.tasks])
    alone = float((parts**2).sum())
    if not scale.clusters:
        return math.sqrt(alone)
    together = float((np.bincount(scale.clusters, parts) ** 2).sum())
    return math.sqrt(alone + correlation * (together - alone))


def _resamples(models: Sequence[Answers], scale: Scale, task: str, seed: int) -> list[Numbers]:
    """A task's metric of every model on the same resamples of the task's items."""
    answers = [[items[p] for p in scale.places[task]] for items in models]
    return resampled(answers, scale.alone(task), seed, RESAMPLES_OF_POWER)


def _correlation(ours: Answers, theirs: Answers, scale: Scale) -> float:
    """The correlation of the differences on two items of one document, from 0 to 1; 1 where nothing is known of it.

    It is the one with which the documents' variance is that of Miller's standard error for clusters.
    """
    judged = [task for task, metric in scale.metrics.items() if metric.judged and task in scale.places]
    if not scale.clusters or not judged:
        return 1.0
    shares, parts, centred = scale.item_shares, np.zeros(len(scale.tasks)), np.zeros(len(scale.tasks))
    for task in judged:
        places = scale.places[task]
        each = _differences(ours, theirs, places)
        parts[places] = shares[places] * each.std()
        centred[places] = shares[places] * (each - each.mean())
    alone = float((parts**2).sum())
    together = float((np.bincount(scale.clusters, parts) ** 2).sum())
    observed = float((np.bincount(scale.clusters, centred) ** 2).sum())
    if together <= alone:
        return 1.0
    return min(1.0, max(0.0, (observed - alone) / (together - alone)))


def _differences(ours: Answers, theirs: Answers, places: Sequence[int]) -> Numbers:
    return np.asarray([ours[p] for p in places], np.float64) - np.asarray([theirs[p] for p in places], np.float64)


def _discordance(ours: Answers, theirs: Answers, scale: Scale) -> float:
    """The share of items that two models answer differently, each task by its weight."""
    differ = np.asarray([a != b for a, b in zip(ours, theirs, strict=True)], dtype=np.float64)
    return float(scale.item_shares @ differ)
