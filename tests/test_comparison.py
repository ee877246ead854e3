"""Intervals and tests of metrics that look at all items together."""

import itertools

import numpy as np
import pytest

from evolver.evaluation.scores.comparison import compare, interval
from evolver.evaluation.scores.metrics import CLASS, JUDGED, VALUE
from evolver.evaluation.scores.scoring import Scale


def scale(right, metric="macro_f1"):
    return Scale(("t",) * len(right), {"t": 1.0}, {"t": {**CLASS, **VALUE}[metric]}, tuple(right))


def p_of_all_exchanges(ours, theirs, of, of_each):
    """The p-value over all exchanges of the models' answers, so many items at a time."""
    difference, outcomes = of.score(ours) - of.score(theirs), []
    for swaps in itertools.product([False, True], repeat=len(ours) // of_each):
        own = [s for s in swaps for _ in range(of_each)]
        a = [t if s else o for o, t, s in zip(ours, theirs, own, strict=True)]
        b = [o if s else t for o, t, s in zip(ours, theirs, own, strict=True)]
        outcomes.append(of.score(a) - of.score(b))
    sides = [np.mean([o >= difference - 1e-12 for o in outcomes])]
    sides.append(np.mean([o <= difference + 1e-12 for o in outcomes]))
    return min(1.0, 2 * min(sides))


def test_the_exchange_of_answers_is_enumerated_where_it_can_be():
    """Of 2^5 exchanges, the share that is at least as far out, counted here one by one."""
    right = [0.0, 1, 1, 0, 1]
    ours, theirs, of = [0.0, 1, 1, 0, 0], [1.0, 1, 0, 0, 0], scale(right)
    found = compare(ours, theirs, of, 0)
    assert found.difference == pytest.approx(of.score(ours) - of.score(theirs))
    assert found.p == pytest.approx(p_of_all_exchanges(ours, theirs, of, of_each=1))


def test_equal_answers_are_no_evidence():
    found = compare([0.0, 1, 1], [0.0, 1, 1], scale([0.0, 1, 0]), 0)
    assert (found.difference, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_a_clear_difference_is_found_and_a_chance_one_is_not():
    rng = np.random.default_rng(0)
    right = rng.integers(0, 3, 200).astype(float)
    good = np.where(rng.random(200) < 0.8, right, rng.integers(0, 3, 200))
    poor = np.where(rng.random(200) < 0.4, right, rng.integers(0, 3, 200))
    other = np.where(rng.random(200) < 0.8, right, rng.integers(0, 3, 200))
    clear, chance = (compare(list(good), list(o), scale(list(right), "mcc"), 0) for o in (poor, other))
    assert clear.p < 0.001
    assert clear.low > 0
    assert chance.p > 0.05
    assert chance.low < 0 < chance.high


def test_an_interval_covers_the_score_and_shrinks_with_more_items():
    rng, widths = np.random.default_rng(1), []
    for count in (50, 800):
        right = rng.normal(size=count)
        answers = right + rng.normal(size=count)
        of = scale(list(right), "pearson")
        low, high = interval(list(answers), of, 0)
        assert low < of.score(list(answers)) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2.5  # four times by the square root of the size


def test_tasks_of_both_kinds_add_by_weight():
    of = Scale(("a", "b", "a", "b"), {"a": 3.0, "b": 1.0}, {"a": JUDGED, "b": CLASS["mcc"]}, (0.0, 0.0, 0.0, 1.0))
    assert of.of_tasks([1.0, 0.0, 0.0, 1.0]) == {"a": 0.5, "b": 1.0}
    assert of.score([1.0, 0.0, 0.0, 1.0]) == pytest.approx((3 * 0.5 + 1.0) / 4)
    assert of.bound([0.0]) == pytest.approx((3 * 0.5 + 1.0) / 4)  # b can still reach 1
