"""The score of all items from a random part of them, without bias: the difference estimator of survey sampling.

Other models have answered all N items. Their answers predict those of a new model: m_i for item i. The new model
answers n items, which are a random part of every task, and the residuals y_i - m_i of these items correct the sum of
the predictions. With one task and a prediction that does not depend on the draw,

    score = (Σ_all m_i + N/n · Σ_scored (y_i - m_i)) / N

has the right mean whatever the predictions are worth (Särndal, Swensson & Wretman 1992, "Model Assisted Survey
Sampling", section 6.3). Its variance is (1 - n/N) · s²/n with s² the variance of the residuals, so good predictions are
worth as much as scoring Var(y) / Var(y - m) times as many items.

Predictions that are fitted to the new model's own answers depend on the draw. So they are cross-fitted: the scored
items are divided into folds; for each fold, a fit to the other folds predicts. Given the other folds, the items of the
fold are a random part of the items outside of these folds, and so the estimate

    (Σ_other folds y_i + Σ_rest m_i + (size of the rest) / (size of the fold) · Σ_fold (y_i - m_i)) / N

has exactly the right mean. The estimate is the mean of these over the folds, weighted by their sizes, task by task.

The predictions are a ridge regression: the answers of the new model are the mean of those of the other models, plus a
linear combination of their principal components, plus a constant of each task. Its penalty is the one with the least
leave-one-out error, among them those of the mean alone and of no prediction at all; so predictions that are worth
nothing do no harm.

**When the mean is right.** The scored items have to be drawn independently of the new model. A run's order of items is
a random one by a hash, and the first items are a random part of all as long as nothing that depends on them has
influenced which model is asked. That holds for the baselines and for the first batch of a search. It does not hold
after a search has learnt what models scored on the first items, and proposed new models for that reason, unless these
are scored along another order: see ``evolver.records.order``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from evolver.evaluation.scores.metrics import Numbers
from evolver.evaluation.scores.scoring import Scale

FOLDS = 5
# Principal components of the other models' answers: beyond so many they are mostly noise.
COMPONENTS = 64
# Penalties that are tried: the variance of what the components cannot explain, as a share of what they vary by.
PENALTIES = (0.01, 0.05, 0.2, 1.0, 5.0)
CONFIDENCE = 0.95
# The asymptotic interval holds from so many items on.
ASYMPTOTIC_FROM = 50
# Of the interval that holds for any number of items: the largest part of the capital that a bet may lose, how many
# invented residuals the first variances rest on and their variance, and after how many items predictions are refitted.
MOST_LOST, INVENTED, INVENTED_VARIANCE, FIRST_FIT = 0.75, 8.0, 0.15, 16
GRID = 2001
ItemPlaces = NDArray[np.int64]


class Estimated(NamedTuple):
    """Estimates of the scores of B models: their values (B) and standard errors (B), and of their metrics on each of
    T tasks, (B, T).

    A value is the sum of its tasks' metrics, each by the share of the task in the score.
    """

    value: Numbers
    error: Numbers
    tasks: Numbers


@dataclass(frozen=True, eq=False)
class Predictor:
    """Predicts the answers of a model to N items from those of M other models to all of them.

    Attributes:
        known: the other models' answers, (M, N); M may be 0.
        tasks: the number of each item's task, (N).
    """

    known: Numbers
    tasks: ItemPlaces

    @cached_property
    def mean(self) -> Numbers:
        """The mean answer to each item, (N)."""
        found: Numbers = self.known.mean(0) if len(self.known) else np.zeros(len(self.tasks))
        return found

    @cached_property
    def components(self) -> Numbers:
        """The principal components of the answers, each as long as it varies, (N, r)."""
        if not len(self.known):
            return np.zeros((len(self.tasks), 0))
        # The smaller of the two products has the same eigenvalues.
        values, vectors = np.linalg.eigh(self.known @ self.known.T / len(self.known))
        kept = np.flatnonzero(values > 1e-9 * max(values[-1], 1e-300))[::-1][:COMPONENTS]
        found: Numbers = self.known.T @ vectors[:, kept] / np.sqrt(len(self.known))
        return found

    def predict(self, places: ItemPlaces, answers: Numbers) -> Numbers:
        """The predicted answers of B models to all items, (B, N), from their answers to the items at n places, (B, n).

        The constant of a task without an answer is that of the mean of the other models.
        """
        if not len(places):
            alike: Numbers = np.tile(self.mean, (len(answers), 1))
            return alike
        inside, x, offset = _Within(self.tasks, places), self.components[places], self.mean[places]
        x, y, rest = inside.centred(x.T).T, inside.centred(answers), inside.centred(answers - offset)
        values, vectors = np.linalg.eigh(x.T @ x)
        scores, told = x @ vectors, rest @ x @ vectors
        scale = max(float((self.components**2).mean(0).sum()) / max(x.shape[1], 1), 1e-12)
        fitted, errors = [], []
        for penalty in PENALTIES:
            shrink = 1 / (np.maximum(values, 0) + penalty * scale * len(places))
            weights = told * shrink
            leverage = np.minimum((scores**2 * shrink).sum(1) + inside.leverage, 0.95)
            fitted.append(weights @ vectors.T)
            errors.append((((rest - weights @ scores.T) / (1 - leverage)) ** 2).sum(1))
        alone = 1 - np.minimum(inside.leverage, 0.95)
        errors += [((rest / alone) ** 2).sum(1), ((y / alone) ** 2).sum(1)]
        best = np.argmin(errors, axis=0)
        chosen = np.stack([*fitted, *np.zeros((2, *told.shape))])[best, np.arange(len(best))]
        known = best <= len(PENALTIES)
        found = known[:, None] * self.mean + chosen @ self.components.T
        predicted: Numbers = found + inside.means(answers - found[:, places])[:, self.tasks]
        return predicted


class _Within:
    """Values of n items within their tasks."""

    def __init__(self, tasks: ItemPlaces, places: ItemPlaces) -> None:
        self.member = (tasks[places][:, None] == np.arange(tasks.max() + 1)).astype(float)
        self.count = self.member.sum(0)
        self.leverage = (self.member / np.maximum(self.count, 1)).sum(1)

    def means(self, values: Numbers) -> Numbers:
        """The mean of each task, (B, n) to (B, tasks); 0 for a task without an item."""
        found: Numbers = values @ self.member / np.maximum(self.count, 1)
        return found

    def centred(self, values: Numbers) -> Numbers:
        """The values minus the means of their tasks, (B, n)."""
        found: Numbers = values - self.means(values) @ self.member.T
        return found


def estimate(scale: Scale, known: Numbers, places: Sequence[int], answers: Numbers) -> Estimated:
    """Estimate the scores of B models on all items from their answers to some.

    The metric of every task is estimated without bias, too, as the equation holds in each of them. A task without any
    scored item gets what is predicted for it, which is not free of bias.

    Args:
        scale: how the N items make up the score; every task is judged item by item.
        known: the answers of M other models to all items, (M, N).
        places: which items were scored, (n), in a random order that does not depend on the models.
        answers: the answers of the B models to them, (B, n).
    """
    return estimate_at(predictor_of(scale, known), scale.item_shares, np.asarray(places), answers)


def predictor_of(scale: Scale, known: Numbers) -> Predictor:
    """The predictor from the answers of M models to all items of a scale, (M, N)."""
    numbers = {task: k for k, task in enumerate(scale.places)}
    return Predictor(known, np.array([numbers[task] for task in scale.tasks]))


def estimate_at(predictor: Predictor, share: Numbers, places: ItemPlaces, answers: Numbers) -> Estimated:
    """As ``estimate``, with a predictor that was made before, and the amount that each item adds to the score, (N),
    which is the same for all items of a task. The tasks are in the order of the predictor's numbers.
    """
    tasks = predictor.tasks
    sizes, seen = np.bincount(tasks), np.bincount(tasks[places], minlength=tasks.max() + 1)
    fold, folds = _folds(tasks[places], seen)
    residual = np.empty_like(answers, dtype=float)
    each = np.zeros((len(answers), len(sizes)))
    # What an item adds to the metric of each task, (N, T).
    own_share = (tasks[:, None] == np.arange(len(sizes))) / sizes
    for k in range(folds):
        own = fold == k
        others = places[~own] if folds > 1 else places[:0]
        predicted = predictor.predict(others, answers[:, ~own] if folds > 1 else answers[:, :0])
        residual[:, own] = answers[:, own] - predicted[:, places[own]]
        weight = np.bincount(tasks[places[own]], minlength=len(sizes)) / np.maximum(seen, 1)
        weight[seen == 0] = 1 / folds
        filled = np.array(predicted)
        if folds > 1:
            filled[:, others] = answers[:, ~own]
        # Within a task: the rest's size by the fold's size times the residuals, as often as the fold counts.
        left = sizes - np.bincount(tasks[others], minlength=len(sizes))
        raised = left / np.maximum(seen, 1)
        each += filled @ (own_share * weight) + residual[:, own] @ (own_share[places[own]] * raised)
    error = np.sqrt(_variance(tasks[places], sizes, seen, share, places, residual))
    return Estimated(each @ np.bincount(tasks, share), error, each)


def _folds(tasks: ItemPlaces, seen: ItemPlaces) -> tuple[ItemPlaces, int]:
    """The fold of each scored item, (n), and their number: 1, without a fit, where a task has a single scored item."""
    folds = min(FOLDS, int(seen[seen > 0].min(initial=FOLDS)))
    fold = np.empty(len(tasks), dtype=np.int64)
    for task in np.unique(tasks):
        fold[tasks == task] = np.arange(seen[task]) % folds
    return fold, folds


def _variance(
    tasks: ItemPlaces, sizes: ItemPlaces, seen: ItemPlaces, share: Numbers, places: ItemPlaces, residual: Numbers
) -> Numbers:  # fmt: skip
    """The variance of the estimates, (B): Σ over the tasks of weight² · (1 - n/N) · s²/n."""
    found = np.zeros(len(residual))
    freedom = np.maximum(seen - 1, 0)
    squares = np.stack([_squares(residual[:, tasks == t]) for t in range(len(sizes))])
    pooled = squares.sum(0) / max(freedom.sum(), 1)
    for task in np.flatnonzero(seen):
        spread = squares[task] / freedom[task] if freedom[task] else pooled
        weight = share[places[tasks == task]][0] * sizes[task]
        found += weight**2 * (1 - seen[task] / sizes[task]) * spread / seen[task]
    return found


def _squares(values: Numbers) -> Numbers:
    """The sum of squares around the mean, (B, n) to (B)."""
    if not values.shape[1]:
        return np.zeros(len(values))
    found: Numbers = ((values - values.mean(1, keepdims=True)) ** 2).sum(1)
    return found


def asymptotic_interval(found: Estimated) -> tuple[Numbers, Numbers]:
    """The asymptotic 95 % intervals, low and high, (B) each; for ``ASYMPTOTIC_FROM`` scored items or more."""
    reach = stats.norm.ppf((1 + CONFIDENCE) / 2) * found.error
    return found.value - reach, found.value + reach


def betting_interval(predictor: Predictor, share: Numbers, places: ItemPlaces, answers: Numbers) -> tuple[float, float]:
    """The 95 % interval of one model's score that holds for any number of scored items: low and high.

    It is the betting interval for sampling without replacement (Waudby-Smith & Ramdas 2024, section 5), with the
    residuals of predictions in the place of the answers, as in ``evolver.evaluation.scores.racing``. Each item is
    predicted from the items before it. A score is in the interval as long as neither a bet that the true one is higher
    nor a bet that it is lower has made 2/5 % = 40 times its capital.

    Args:
        places: which items were scored, (n), in their random order; it is a random order of all tasks together.
        answers: the model's answers to them, (n), each in [0, 1].
    """
    count, n = len(share), len(places)
    scores = np.linspace(0, 1, GRID)
    forecast = _forecasts(predictor, places, answers)
    own = share[places]
    met = np.cumsum(own * answers) - own * answers
    expected = np.array([share @ row for row in forecast.rows])[forecast.fit]
    gone = forecast.gone(share, places)
    left = np.arange(count, count - n, -1)
    # What the remaining items add on average, beyond their forecasts, if the score is s: (scores, n).
    offset = (scores[:, None] - met - (expected - gone)) / left * count
    gain = count * own * (answers - forecast.own)
    variance = (np.cumsum(gain**2) - gain**2 + INVENTED * INVENTED_VARIANCE) / (np.arange(n) + INVENTED)
    size = np.sqrt(2 * np.log(2 / (1 - CONFIDENCE)) / (n * variance))
    most = count * share.max()
    enough = np.log(2 / (1 - CONFIDENCE))
    inside = np.ones(GRID, dtype=bool)
    for sign in (1, -1):
        x = sign * (gain - offset)
        # The largest loss of a bet: an answer of 0, or of 1, where the forecast is highest, or lowest.
        loss = np.maximum(most * np.maximum(forecast.reach(sign), 0) + sign * offset, 1e-12)
        bet = np.minimum(size, MOST_LOST / loss)
        inside &= np.cumsum(np.log1p(bet * x), axis=1).max(1) < enough
    total, unseen = float(own @ answers), 1 - float(own.sum())
    inside &= (scores >= total - 1 / GRID) & (scores <= total + unseen + 1 / GRID)
    held = np.flatnonzero(inside)
    if not len(held):  # it has probability 5 % at most
        value = float(estimate_at(predictor, share, places, answers[None]).value[0])
        return value, value
    step = 1 / (GRID - 1)
    return max(0.0, float(scores[held[0]]) - step), min(1.0, float(scores[held[-1]]) + step)


@dataclass(frozen=True, eq=False)
class _Forecasts:
    """Predictions of all items that were made on the way.

    Attributes:
        rows: each prediction, (fits, N), with values from 0 to 1.
        fit: which prediction was in force at each scored item, (n).
        own: what it said of this item, (n).
    """

    rows: Numbers
    fit: ItemPlaces
    own: Numbers

    def gone(self, share: Numbers, places: ItemPlaces) -> Numbers:
        """What the prediction in force says of the items that were scored before, (n)."""
        said = np.cumsum(share[places] * self.rows[:, places], axis=1)
        before: Numbers = np.hstack([np.zeros((len(said), 1)), said[:, :-1]])[self.fit, np.arange(len(places))]
        return before

    def reach(self, sign: int) -> Numbers:
        """How far an answer can be below (1) or above (-1) its forecast, (n)."""
        found: Numbers = (self.rows.max(1) if sign > 0 else 1 - self.rows.min(1))[self.fit]
        return found


def _forecasts(predictor: Predictor, places: ItemPlaces, answers: Numbers) -> _Forecasts:
    """Predictions from 0, then ``FIRST_FIT``, and from then on twice as many items."""
    n, starts = len(places), [0]
    while (following := max(FIRST_FIT, 2 * starts[-1])) < n:
        starts.append(following)
    rows = np.stack([predictor.predict(places[:k], answers[None, :k])[0] for k in starts]).clip(0, 1)
    fit = np.searchsorted(starts, np.arange(n), side="right") - 1
    return _Forecasts(rows, fit, rows[fit, places])
