"""Which tasks tell models apart: against an enumeration, Cochran's Q, and models that differ by nothing."""

import itertools

import numpy as np
import pytest
import scipy

from evolver.evaluation.scores.discrimination import spread_test, undecided
from evolver.evaluation.scores.metrics import CLASS, JUDGED, TAGS
from evolver.evaluation.scores.scoring import Scale


def scale(count, metric=JUDGED, right=(), clusters=()):
    return Scale(("t",) * count, {"t": 1.0}, {"t": metric}, right, clusters)


def test_the_exchanges_of_two_models_are_those_of_the_paired_test():
    """Of 2^8 exchanges, the share that is at least as far out."""
    ours, theirs = [1.0, 1, 1, 1, 1, 0, 1, 1], [0.0] * 5 + [1.0, 0, 0]
    each = np.subtract(ours, theirs)
    sums = [abs(np.dot(signs, each)) for signs in itertools.product((1, -1), repeat=8)]
    expected = np.mean([s >= abs(each.sum()) - 1e-12 for s in sums])
    assert spread_test([ours, theirs], scale(8), "t", 0) == pytest.approx(expected, abs=0.02)


def test_of_right_and_wrong_answers_it_is_cochran_s_q():
    rng = np.random.default_rng(0)
    models = (rng.random((4, 300)) < np.asarray([0.5, 0.55, 0.5, 0.58])[:, None]).astype(float)
    rows, columns = models.sum(0), models.sum(1)
    q = 3 * (4 * (columns**2).sum() - columns.sum() ** 2) / (4 * rows.sum() - (rows**2).sum())
    assert spread_test(list(models), scale(300), "t", 0) == pytest.approx(scipy.stats.chi2.sf(q, 3), abs=0.03)


def test_models_that_differ_by_nothing_are_told_apart_at_the_level_only():
    found = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        found += spread_test(list(rng.integers(0, 2, (3, 40)).astype(float)), scale(40), "t", seed) <= 0.05
    assert 1 <= found <= 14


@pytest.mark.parametrize("metric", [CLASS["mcc"], CLASS["macro_f1"], TAGS["f1"]], ids=lambda m: m.name)
def test_it_works_for_metrics_of_all_items(metric):
    rng = np.random.default_rng(0)
    right = tuple(rng.integers(0, 2, 80).astype(float))
    shares = {"clear": (0.9, 0.6, 0.6), "none": (0.6, 0.6, 0.6)}
    for kind, good in shares.items():
        right_ones = [rng.random(80) < share for share in good]
        models = [np.where(own, right, 1 - np.asarray(right)) for own in right_ones]
        if metric.counts:
            models = [[(0.0, float(own), 1.0, 1.0) for own in ones] for ones in right_ones]
        p = spread_test(models, scale(80, metric, right), "t", 0)
        assert p < 0.01 if kind == "clear" else p > 0.05


def test_items_of_one_document_are_exchanged_together():
    """Twenty equal items of each of three documents are no more evidence than three items."""
    ours, theirs = [1.0] * 60, [0.0] * 60
    clusters = tuple(n // 20 for n in range(60))
    assert spread_test([ours, theirs], scale(60), "t", 0) < 0.001
    assert spread_test([ours, theirs], scale(60, clusters=clusters), "t", 0) == pytest.approx(0.25, abs=0.03)


def test_the_tasks_that_do_not_decide_are_named():
    rng = np.random.default_rng(0)
    tasks = ("clear", "same", "noise") * 100
    good, poor = (rng.random(300) < share for share in (0.9, 0.3))
    one, other = rng.integers(0, 2, (2, 300))
    kind = np.asarray(tasks)
    a = np.select([kind == "clear", kind == "same"], [good, 1], one).astype(float)
    b = np.select([kind == "clear", kind == "same"], [poor, 1], other).astype(float)
    names = dict.fromkeys(tasks)
    found = undecided([a, b], Scale(tasks, dict.fromkeys(names, 1.0), dict.fromkeys(names, JUDGED)), 0)
    assert found.keys() == {"same", "noise"}
    assert found["same"] == 1.0
