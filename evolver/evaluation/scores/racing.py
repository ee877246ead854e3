"""Racing: is a candidate better than the incumbent? A paired sequential test that may be looked at after every item.

The statement is about the whole, finite dev set: the candidate's score on all its N items is above the incumbent's.
Item i adds ``share_i * a_i`` to a score, a_i in [0, 1] being the candidate's answer and share_i its task's weight over
the number of the task's items. The incumbent's answers b_i are known for all items, the candidate's up to the last
look. Two verdicts can be wrong; each has its own null hypothesis, and at most one of the two nulls is true.

Against each null the test bets, starting with a capital of 1 (Waudby-Smith & Ramdas 2024, "Estimating means of bounded
random variables by betting", section 5: the capital process for sampling without replacement; the conditional mean of
what is left goes back to their "Confidence sequences for sampling without replacement", 2020). Under the null
D = Σ share_i * (a_i - b_i) <= 0 the candidate can add to its score, by the items that are left at step t, at most

    need_t = Σ_all share_i * b_i - Σ_met share_i * a_i

and as the order is random, the next item is any of those left with the same probability. Take a linear forecast
``level + slope * b_i`` of a_i and a bet λ_t >= 0, both made from the items met so far. Under the null the gain

    x_t = share_i * (a_i - level - slope * b_i) - m_t,
    m_t = (need_t - Σ_left share_j * (level + slope * b_j)) / (items left)

of the next item i has then a conditional mean of at most 0, and the factor 1 + λ_t * x_t one of at most 1. No factor is
negative, which a cap on λ_t sees to. So the capital Π (1 + λ_t * x_t) is a nonnegative supermartingale and ever reaches
1 / alpha with a probability of at most alpha (Ville's inequality). The mean of several capitals is such a one, too. The
other null, D >= 0, is the same one for 1 - a and 1 - b. To know the incumbent's answers to the items that are left is
no cheating: they enter by sums over a set, which do not tell which item of the set comes next.

The forecast is what makes the test strong (a control variate, as in the regression estimator of survey sampling): x_t
varies by what b_i does not say about a_i. Where the two differ on a share q of the items, half of them each way, that
is a variance of q * (1 - q) in place of the q of plain differences.

Assumptions: the order is uniformly random and independent of both models' answers. A run draws it once and meets it in
every duel, so that errors of several duels depend on one another; the rate of each holds over the draw of the order.
Where the order has had a say in which models meet, as it has when an incumbent was chosen by duels in the same order,
the rate holds only as an approximation.
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

# Differences that are bet on, in standard errors of a full evaluation. A capital that bets on δ grows fastest where the
# difference is δ, and still well at half of it or twice; below 1 no test can save items, above 10 any bet is quick.
DRIFTS = (2.0, 5.0)
# No bet may lose more than this part of a capital.
MOST = 0.75
# What the first forecasts rest on: that many pseudo-items with b = 0 and as many with b = 1, of which this part agrees.
PSEUDO, AGREE = 8.0, 0.9


@dataclass(frozen=True)
class Race:
    """The duel of a candidate with an incumbent.

    Args:
        scale: how items make up the score.
        rival: the incumbent's answers to all items, in the run's order, each in [0, 1].
        alpha: how often, at most, the verdict may be wrong, whatever the two models are.

    Raises ValueError for a metric that is not judged item by item with values in [0, 1], for answers of the rival that
    are missing or outside [0, 1], and for an alpha that is not between 0 and 1.
    """

    scale: Scale
    rival: Sequence[float]
    alpha: float

    def __post_init__(self) -> None:
        if not all(metric.judged and metric.best == 1.0 for metric in self.scale.metrics.values()):
            raise ValueError("only metrics that are judged item by item, from 0 to 1, can be raced")
        if len(self.rival) != len(self.scale.tasks):
            raise ValueError(f"{len(self.rival)} of {len(self.scale.tasks)} items of the rival")
        if not 0.0 < self.alpha < 1.0:
            raise ValueError(f"an error rate lies between 0 and 1, not at {self.alpha}")
        _within(self.rival)

    def look(self, items: Sequence[float]) -> Verdict | None:
        """The verdict after the first items, or None where it is still open.

        Depends on nothing but the items. A verdict by the test is that of the first item at which it fell, however
        many items come at a time; one that is certain goes before it, so that all items always give the right one.
        Equal scores are "not better".

        Args:
            items: the candidate's answers to the first items of the run's order, each in [0, 1].

        Raises ValueError for an answer outside [0, 1], and for more answers than there are items.
        """
        if len(items) > len(self.scale.tasks):
            raise ValueError(f"{len(items)} items of {len(self.scale.tasks)}")
        _within(items)
        return self.certain(items) or self._likely(np.asarray(items, dtype=np.float64))

    def certain(self, items: Sequence[float]) -> Verdict | None:
        """The verdict that no further answer can change, or None: exact early stopping, in both directions."""
        if self.scale.bound(items) <= self._bar:
            return "not better"
        worst = [*items, *(0.0 for _ in range(len(self.scale.tasks) - len(items)))]
        return "better" if self.scale.score(worst) > self._bar else None

    def _likely(self, items: Numbers) -> Verdict | None:
        """What the capitals say that have first reached 1 / alpha."""
        enough = -math.log(self.alpha)
        better = _first(log_capital(items, self._rival, self._shares) >= enough)
        worse = _first(log_capital(1.0 - items, 1.0 - self._rival, self._shares) >= enough)
        if better == worse:  # neither, or, against all odds, both at once
            return None
        return "better" if better < worse else "not better"

    @cached_property
    def _bar(self) -> float:
        return self.scale.score(self.rival)

    @cached_property
    def _rival(self) -> Numbers:
        return np.asarray(self.rival, dtype=np.float64)

    @cached_property
    def _shares(self) -> Numbers:
        return shares(self.scale)


def shares(scale: Scale) -> Numbers:
    """What an item adds to the score when its answer is 1, (N)."""
    found, total = np.empty(len(scale.tasks)), math.fsum(scale.weights.values())
    for task, places in scale.places.items():
        found[places] = scale.weights[task] / total / len(places)
    return found


def log_capital(items: Numbers, rival: Numbers, share: Numbers, drifts: Sequence[float] = DRIFTS) -> Numbers:
    """The logarithm of the capital after each item, (n): the mean over ``drifts`` of Π (1 + λ_t * x_t).

    Bets that the candidate's score is above the rival's; see the module's text for x_t. The bet on a difference of δ is
    λ_t = δ / V_t, V_t being the forecast variance of the sum of what is left: mean over variance of a gain, the best
    bet in the limit of small gains (as aGRAPA, section B.3 of the 2024 paper), since a gain has a mean of δ / items
    left then. In the limit of many items the capital is that of Wald's sequential probability ratio test of δ against
    0, so that knowing δ in advance could only choose ``drifts`` better.

    Args:
        items: the candidate's answers to the first items, (n).
        rival: the incumbent's answers to all, (N).
        share: what an item adds to the score, (N).
        drifts: the differences that are bet on, in standard errors of a full evaluation.
    """
    n = len(items)
    level, slope, variance = _forecast(items, rival[:n])
    need = (share * rival).sum() - _before(share[:n] * items)
    expected = level * _left(share, n) + slope * _left(share * rival, n)
    offset = (need - expected) / np.arange(len(share), len(share) - n, -1)
    gain = share[:n] * (items - level - slope * rival[:n]) - offset
    # The most that a gain can fall below 0: an answer of 0 to the item with the largest share and the best forecast.
    # One end of the forecast's line is not below 0, as the line goes through the mean of answers that are not.
    largest = np.maximum.accumulate(share[::-1])[::-1][:n]
    loss = np.maximum(largest * np.maximum(level, level + slope) + offset, 1e-12)
    spread, rest = variance * (share**2).sum(), np.maximum(variance * _left(share**2, n), 1e-300)
    capitals = []
    for drift in drifts:
        bet = np.minimum(drift * np.sqrt(spread) / rest, MOST / loss)
        bet[need <= 0] = 0.0  # the null can no longer be true: that is for the certain verdict to say
        capitals.append(np.cumsum(np.log1p(bet * gain)))
    logs: Numbers = np.logaddexp.reduce(capitals, axis=0) - math.log(len(drifts))
    return logs


def _forecast(items: Numbers, rival: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Level and slope of the candidate's answers by the rival's, and the variance around them, before each item, (n).

    Least squares over the items met and the pseudo-items.
    """
    count = np.arange(len(items)) + 2 * PSEUDO
    b, a = _before(rival) + PSEUDO, _before(items) + PSEUDO
    bb, aa = _before(rival**2) + PSEUDO, _before(items**2) + PSEUDO
    ab = _before(items * rival) + AGREE * PSEUDO
    slope = (count * ab - a * b) / (count * bb - b * b)
    level = (a - slope * b) / count
    return level, slope, np.maximum((aa - level * a - slope * ab) / count, 1e-6)


def _before(values: Numbers) -> Numbers:
    """Sums of the values before each one, (n)."""
    return np.cumsum(values) - values


def _left(values: Numbers, n: int) -> Numbers:
    """Sums of the values from each of the first n on, (n)."""
    sums: Numbers = np.cumsum(values[::-1])[::-1][:n]
    return sums


def _first(reached: np.typing.NDArray[np.bool_]) -> int:
    """The first place that was reached; their number, where none was."""
    return int(reached.argmax()) if reached.any() else len(reached)


def _within(answers: Sequence[float]) -> None:
    wrong = next((x for x in answers if not 0.0 <= x <= 1.0), None)
    if wrong is not None:
        raise ValueError(f"answers lie between 0 and 1, not at {wrong}")
