"""Metrics against scikit-learn's and SciPy's, and by hand."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as learned

from evolver.evaluation.scores.metrics import CLASS, LABELS, VALUE

ROUNDS = 5


def classes(seed, count=60, kinds=4):
    rng = np.random.default_rng(seed)
    return rng.integers(0, kinds, (2, ROUNDS, count)).astype(float)


@pytest.mark.parametrize("seed", range(3))
def test_of_one_class_each(seed):
    """Every row is a resample of its own."""
    answers, right = classes(seed)
    f1 = [learned.f1_score(r, a, average="macro") for a, r in zip(answers, right, strict=True)]
    mcc = [learned.matthews_corrcoef(r, a) for a, r in zip(answers, right, strict=True)]
    assert CLASS["macro_f1"].of(answers, right) == pytest.approx(f1)
    assert CLASS["mcc"].of(answers, right) == pytest.approx(mcc)


@pytest.mark.parametrize("seed", range(3))
def test_of_a_number_each(seed):
    answers, right = np.random.default_rng(seed).normal(size=(2, ROUNDS, 40))
    wanted = [stats.pearsonr(a, r).statistic for a, r in zip(answers, right, strict=True)]
    assert VALUE["pearson"].of(answers, right) == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(3))
def test_of_a_set_of_labels_each(seed):
    answers, right = classes(seed, kinds=16)
    bits = np.arange(4)

    def table(row):
        return (row.astype(int)[:, None] >> bits) & 1

    wanted = [learned.f1_score(table(r), table(a), average="macro") for a, r in zip(answers, right, strict=True)]
    assert LABELS["macro_f1"].of(answers, right) == pytest.approx(wanted)


def test_by_hand():
    """Right 0 0 1 2, answered 0 1 1 1: F1 of class 0 is 2·1/(1+2), of 1 2·1/(3+1), of 2 nothing."""
    answers, right = np.array([[0.0, 1, 1, 1]]), np.array([[0.0, 0, 1, 2]])
    assert CLASS["macro_f1"].of(answers, right)[0] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # hits 2 of 4, given (1, 3, 0), wanted (2, 1, 1): (2·4 - 5) / √((16 - 10)(16 - 6))
    assert CLASS["mcc"].of(answers, right)[0] == pytest.approx(3 / np.sqrt(60))


def test_where_nothing_can_be_said():
    same = np.ones((1, 5))
    assert CLASS["mcc"].of(same, same)[0] == 0.0
    assert VALUE["pearson"].of(same, np.arange(5.0)[None])[0] == 0.0
    assert LABELS["macro_f1"].of(same * 0, same * 0)[0] == 0.0
