"""Racing: a sequential test of whether a candidate is better than the incumbent, which may be read after every item.

The question is about the whole, finite dev set: is the candidate's score on all its N items above the incumbent's? Item
i adds ``share_i * a_i`` to the score. Here a_i in [0, 1] is the candidate's answer, and share_i is the weight of the
item's task divided by the number of the task's items. The incumbent's answers b_i are known for all items, those of the
candidate only for the items scored so far. There are two verdicts, "better" and "not better". For each of them the test
has a null hypothesis under which the verdict would be wrong.

The test bets against each null hypothesis, starting with a capital of 1. This is the method of Waudby-Smith & Ramdas
2024, "Estimating means of bounded random variables by betting", section 5 (the capital process for sampling without
replacement). The conditional mean of the remaining items comes from their "Confidence sequences for sampling without
replacement", 2020. The null hypothesis against "better" is D = Σ share_i * (a_i - b_i) <= 0. Under it, the items that
remain at step t can add to the candidate's score at most

    need_t = Σ_all share_i * b_i - Σ_met share_i * a_i

The order of the items is random, so the next item is any of the remaining ones with the same probability. The test
takes a linear forecast ``level + slope * b_i`` of a_i and a bet λ_t >= 0, both computed from the items scored so far.
The gain of the next item i is

    x_t = share_i * (a_i - level - slope * b_i) - m_t,
    m_t = (need_t - Σ_left share_j * (level + slope * b_j)) / (items left)

Under the null hypothesis its conditional mean is at most 0, so that of the factor 1 + λ_t * x_t is at most 1. A cap on
λ_t keeps every factor from being negative. The capital Π (1 + λ_t * x_t) is therefore a nonnegative supermartingale,
and the probability that it ever reaches 1 / alpha is at most alpha (Ville's inequality). The same is true of the mean
of several capitals. The other null hypothesis, D >= 0, is the first one for 1 - a and 1 - b. The test may use the
incumbent's answers to the remaining items, because they enter only through sums over all of these items, which do not
tell which item comes next.

The forecast makes the test powerful. It is a control variate, as in the regression estimator of survey sampling: x_t
varies only by the part of a_i that b_i does not predict. If the two models differ on a share q of the items, one half
of them in each direction, the variance is q * (1 - q), while that of the plain differences is q.

Assumptions: the order is uniformly random and independent of the answers of both models. So every race has an order of
its own (``evolver.records.order``), drawn by a hash of the run's seed and the candidate's number: nothing that happened
before, such as which incumbent has won earlier races, depends on it. The error rate of each race holds whatever came
before it, and at most a share alpha of the better candidates is expected to be rejected. With ``evaluation.subset:
fixed``, all races go along the run's one order. Then the rate is promised only for races between models on whose choice
that order had no influence, and an incumbent that was chosen by its first items breaks it
(results/benchmarks/selection.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from evolver.evaluation.scores.metrics import Numbers
from evolver.evaluation.scores.scoring import Scale

Verdict = Literal["better", "not better"]

# The differences δ that the test bets on, in standard errors of a full evaluation. A bet on δ gains fastest if the true
# difference is δ, and still well if it is half or twice as large. Below 1 no test can save items; above 10 any bet is
# fast.
DRIFTS = (2.0, 5.0)
# The largest part of the capital that a bet may lose.
MOST = 0.75
# The first forecasts rest on PSEUDO invented items with b = 0 and as many with b = 1; a agrees with b on AGREE of them.
PSEUDO, AGREE = 8.0, 0.9


@dataclass(frozen=True)
class Race:
    """A race of a candidate against an incumbent; see the module's text for the test.

    Args:
        scale: how items make up the score.
        rival: the incumbent's answers to all items, in the run's order, each in [0, 1].
        alpha: the highest probability with which the verdict may be wrong, whatever the two models are.

    Raises ValueError for a metric that is not judged item by item with values in [0, 1], for answers of the rival that
    are missing or outside [0, 1], and for an alpha that is not between 0 and 1.
    """

    scale: Scale
    rival: Sequence[float]
    alpha: float

    def __post_init__(self) -> None:
        if self.scale.unjudged:
            raise ValueError("only metrics that are judged item by item, from 0 to 1, can be raced")
        if len(self.rival) != len(self.scale.tasks):
            raise ValueError(f"{len(self.rival)} of {len(self.scale.tasks)} items of the rival")
        if not 0.0 < self.alpha < 1.0:
            raise ValueError(f"an error rate lies between 0 and 1, and {self.alpha} does not")
        _within(self.rival)

    def look(self, items: Sequence[float]) -> Verdict | None:
        """The verdict after the first items; None while it is undecided. Equal scores are "not better".

        The verdict depends only on the items, not on how many of them came at a time, as the test is read after every
        item. A verdict that no further answer can change takes precedence, so that the verdict after all items is
        always right.

        Args:
            items: the candidate's answers to the first items of the run's order, each in [0, 1].

        Raises ValueError for an answer outside [0, 1], and for more answers than there are items.
        """
        if len(items) > len(self.scale.tasks):
            raise ValueError(f"{len(items)} items of {len(self.scale.tasks)}")
        _within(items)
        return self.certain(items) or self._likely(np.asarray(items, dtype=np.float64))

    def certain(self, items: Sequence[float]) -> Verdict | None:
        """The verdict if no further answer can change it, else None: exact early stopping in both directions."""
        if self.scale.bound(items) <= self._bar:
            return "not better"
        worst = [*items, *(0.0 for _ in range(len(self.scale.tasks) - len(items)))]
        return "better" if self.scale.score(worst) > self._bar else None

    def _likely(self, items: Numbers) -> Verdict | None:
        """The verdict of the capital that was the first to reach 1 / alpha; None if none has."""
        enough = -math.log(self.alpha)
        better = _first(log_capital(items, self._rival, self.scale.item_shares) >= enough)
        worse = _first(log_capital(1.0 - items, 1.0 - self._rival, self.scale.item_shares) >= enough)
        if better == worse:  # neither capital has reached it, or, very unlikely, both did at the same item
            return None
        return "better" if better < worse else "not better"

    @cached_property
    def _bar(self) -> float:
        return self.scale.score(self.rival)

    @cached_property
    def _rival(self) -> Numbers:
        return np.asarray(self.rival, dtype=np.float64)


def log_capital(items: Numbers, rival: Numbers, share: Numbers, drifts: Sequence[float] = DRIFTS) -> Numbers:
    """The logarithm of the capital after each item, (n): the mean over ``drifts`` of Π (1 + λ_t * x_t).

    The bets say that the candidate's score is above the rival's; the module's text defines x_t. The bet on a difference
    of δ is λ_t = δ / V_t, where V_t is the forecast variance of the sum over the remaining items. This is the mean of a
    gain over its variance, the best bet in the limit of small gains (aGRAPA, section B.3 of the 2024 paper), because
    the mean of a gain is δ / items left. In the limit of many items, the capital is that of Wald's sequential
    probability ratio test of δ against 0, so nothing is lost except that the true δ is unknown.

    Args:
        items: the candidate's answers to the first items, (n).
        rival: the incumbent's answers to all items, (N).
        share: the amount that each item adds to the score, (N).
        drifts: the differences δ that are bet on, in standard errors of a full evaluation.
    """
    n = len(items)
    level, slope, variance = _forecast(items, rival[:n])
    need = (share * rival).sum() - _before(share[:n] * items)
    expected = level * _left(share, n) + slope * _left(share * rival, n)
    offset = (need - expected) / np.arange(len(share), len(share) - n, -1)
    gain = share[:n] * (items - level - slope * rival[:n]) - offset
    # The largest loss of a gain: an answer of 0 to the item with the largest share and the highest forecast. The higher
    # end of the forecast's line is at least 0, because the line goes through the mean of the answers.
    largest = np.maximum.accumulate(share[::-1])[::-1][:n]
    loss = np.maximum(largest * np.maximum(level, level + slope) + offset, 1e-12)
    spread, rest = variance * (share**2).sum(), np.maximum(variance * _left(share**2, n), 1e-300)
    capitals = []
    for drift in drifts:
        bet = np.minimum(drift * np.sqrt(spread) / rest, MOST / loss)
        bet[need <= 0] = 0.0  # the null hypothesis is certainly false, which ``Race.certain`` says
        capitals.append(np.cumsum(np.log1p(bet * gain)))
    logs: Numbers = np.logaddexp.reduce(capitals, axis=0) - math.log(len(drifts))
    return logs


def _forecast(items: Numbers, rival: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """The forecast before each item: level, slope, and variance around the line, (n) each.

    A least-squares fit of the candidate's answers to the rival's, over the items before and the invented ones.
    """
    count = np.arange(len(items)) + 2 * PSEUDO
    b, a = _before(rival) + PSEUDO, _before(items) + PSEUDO
    bb, aa = _before(rival**2) + PSEUDO, _before(items**2) + PSEUDO
    ab = _before(items * rival) + AGREE * PSEUDO
    slope = (count * ab - a * b) / (count * bb - b * b)
    level = (a - slope * b) / count
    return level, slope, np.maximum((aa - level * a - slope * ab) / count, 1e-6)


def _before(values: Numbers) -> Numbers:
    """For each value, the sum of the values before it, (n)."""
    return np.cumsum(values) - values


def _left(values: Numbers, n: int) -> Numbers:
    """For each of the first n values, the sum of it and all after it, (n)."""
    sums: Numbers = np.cumsum(values[::-1])[::-1][:n]
    return sums


def _first(reached: np.typing.NDArray[np.bool_]) -> int:
    """The first place that is true; the number of places if none is."""
    return int(reached.argmax()) if reached.any() else len(reached)


def _within(answers: Sequence[float]) -> None:
    wrong = next((x for x in answers if not 0.0 <= x <= 1.0), None)
    if wrong is not None:
        raise ValueError(f"answers lie between 0 and 1, and {wrong} does not")
