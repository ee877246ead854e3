"""The smallest difference that a set of items can show, against simulated tests."""

import math

import numpy as np
import pytest

from evolver.evaluation.scores.comparison import compare
from evolver.evaluation.scores.metrics import CLASS, ENDLESS, JUDGED, TAGS
from evolver.evaluation.scores.power import STANDARD_ERRORS, Margin, assumed_margin, measured_margin
from evolver.evaluation.scores.scoring import Scale


def scale(sizes, weights=None, clusters=(), metric=JUDGED, right=()):
    tasks = tuple(t for t, n in sizes.items() for _ in range(n))
    return Scale(tasks, weights or dict.fromkeys(sizes, 1.0), dict.fromkeys(sizes, metric), right, clusters)


def test_the_figures_of_the_reference():
    """2.80 standard errors; n ≈ 7.85 p / δ²: of p = .12 and δ = .03 about 1,045, of p = .2 about 1,742."""
    assert pytest.approx(2.80, abs=0.002) == STANDARD_ERRORS
    for discordance, items in ((0.12, 1045), (0.2, 1742)):
        margin = assumed_margin(scale({"t": 500}), discordance)
        assert margin.needed(0.03) == pytest.approx(items, rel=0.003)
        again = assumed_margin(scale({"t": margin.needed(0.03)}), discordance)
        assert again.smallest == pytest.approx(0.03, rel=0.001)


def test_tasks_count_by_their_weights():
    """SE² = Σ w² p / n: here (3/4)² p / 100 + (1/4)² p / 400."""
    found = assumed_margin(scale({"a": 100, "b": 400}, {"a": 3.0, "b": 1.0}), 0.2).smallest
    assert found == pytest.approx(STANDARD_ERRORS * math.sqrt(0.5625 * 0.2 / 100 + 0.0625 * 0.2 / 400))


def drawn(rng, count, discordance, difference):
    """Two models' answers to items, of which they answer a share differently."""
    up, down = (discordance + difference) / 2, (discordance - difference) / 2
    kinds = rng.choice(3, count, p=[up, down, 1 - discordance])
    both = rng.integers(0, 2, count)
    return np.where(kinds == 0, 1.0, np.where(kinds == 1, 0.0, both)), np.where(
        kinds == 0, 0.0, np.where(kinds == 1, 1.0, both)
    )


def power_of(of, discordances, difference, rounds=400, repeat=1):
    """How often the paired test finds a difference in simulated answers."""
    rng, found = np.random.default_rng(1), 0
    for _ in range(rounds):
        parts = [drawn(rng, len(places) // repeat, discordances[t], difference) for t, places in of.places.items()]
        ours, theirs = (np.concatenate([np.repeat(p[k], repeat) for p in parts]) for k in (0, 1))
        each = ours - theirs
        # The z test of the paired difference, each task by its weight, each document once.
        shares = np.concatenate(
            [np.full(len(p), of.weights[t] / sum(of.weights.values()) / len(p)) for t, p in of.places.items()]
        )
        sums = np.bincount(of.clusters, shares * each) if of.clusters else shares * each
        found += abs(sums.sum()) > 1.959964 * math.sqrt((sums**2).sum())
    return found / rounds


@pytest.mark.parametrize("discordance", [0.1, 0.3])
def test_a_simulated_test_has_the_power_that_is_said(discordance):
    of = scale({"a": 300, "b": 600}, {"a": 1.0, "b": 2.0})
    margin = assumed_margin(of, discordance)
    same = {"a": discordance, "b": discordance}
    assert power_of(of, same, margin.smallest, 1500) == pytest.approx(0.8, abs=0.04)
    assert power_of(of, same, 0.0, 1500) == pytest.approx(0.05, abs=0.02)
    assert power_of(of, same, margin.smallest / 2, 1500) < 0.35


def test_the_paired_permutation_test_has_this_power_too():
    of, rng, found = scale({"t": 400}), np.random.default_rng(0), 0
    margin = assumed_margin(of, 0.2)
    for seed in range(80):
        ours, theirs = drawn(rng, 400, 0.2, margin.smallest)
        found += compare(list(ours), list(theirs), of, seed).p < 0.05
    assert found / 80 == pytest.approx(0.8, abs=0.13)


def test_items_of_one_document_count_as_one_before_anything_is_known():
    """Three equal items of each of 200 documents."""
    clusters = tuple(n // 3 for n in range(600))
    margin = assumed_margin(scale({"t": 600}, clusters=clusters), 0.2)
    assert margin.smallest == pytest.approx(assumed_margin(scale({"t": 200}), 0.2).smallest)
    assert power_of(scale({"t": 600}, clusters=clusters), {"t": 0.2}, margin.smallest, repeat=3) == pytest.approx(
        0.8, abs=0.06
    )


def test_the_standard_error_of_clusters_is_miller_s():
    """SE² = Σ_c (Σ_{i∈c} (d_i − d̄))² / n², where the report set is built as the dev set is."""
    rng = np.random.default_rng(3)
    clusters = tuple(int(c) for c in np.repeat(np.arange(100), 3))
    shared = np.repeat(rng.integers(0, 2, 100), 3)
    ours = np.where(rng.random(300) < 0.6, shared, rng.integers(0, 2, 300)).astype(float)
    theirs = rng.integers(0, 2, 300).astype(float)
    of = scale({"t": 300}, clusters=clusters)
    each = ours - theirs
    sums = np.bincount(clusters, each - each.mean())
    error = math.sqrt((sums**2).sum()) / 300
    found = measured_margin([list(ours), list(theirs)], of, of, 0)
    assert found.smallest == pytest.approx(STANDARD_ERRORS * error, rel=0.01)
    assert (
        found.smallest
        > 1.05 * measured_margin([list(ours), list(theirs)], scale({"t": 300}), scale({"t": 300}), 0).smallest
    )
    assert found.discordance == pytest.approx((ours != theirs).mean())


def test_a_margin_is_measured_on_the_dev_items_and_holds_for_the_report_items():
    """Four times as many report items: half the margin. Of three pairs of experts the median counts."""
    rng = np.random.default_rng(0)
    a, c = rng.integers(0, 2, 200).astype(float), rng.integers(0, 2, 200).astype(float)
    b = np.where(rng.random(200) < 0.8, a, 1 - a)
    dev, report = scale({"t": 200}), scale({"t": 800})
    pairs = {k: measured_margin(p, dev, report, 0) for k, p in {"ab": [a, b], "ac": [a, c], "bc": [b, c]}.items()}
    found = measured_margin([a, b, c], dev, report, 0)
    assert found.smallest == sorted(p.smallest for p in pairs.values())[1]
    assert found.discordance == sorted(p.discordance for p in pairs.values())[1]
    assert pairs["ab"].smallest == pytest.approx(STANDARD_ERRORS * math.sqrt(np.mean((a - b) ** 2) / 800))


@pytest.mark.parametrize("metric", ["macro_f1", "mcc"])
def test_metrics_of_all_items_are_measured_by_resampling(metric):
    """The power of simulated tests of such a metric, whose standard error is that of resamples."""
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, 300).astype(float)
    a, b = (np.where(rng.random(300) < 0.7, right, 1 - right) for _ in "ab")
    of = scale({"t": 300}, metric=CLASS[metric], right=tuple(right))
    found = measured_margin([a, b], of, of, 0)
    truths = []
    for _ in range(400):
        r = rng.integers(0, 2, 300).astype(float)
        x, y = (np.where(rng.random(300) < 0.7, r, 1 - r) for _ in "ab")
        s = scale({"t": 300}, metric=CLASS[metric], right=tuple(r))
        truths.append(s.score(x) - s.score(y))
    assert found.smallest == pytest.approx(STANDARD_ERRORS * np.std(truths), rel=0.2)
    counts = [(0.0, *map(float, row)) for row in rng.integers(1, 4, (300, 3))]
    others = [(0.0, *map(float, row)) for row in rng.integers(1, 4, (300, 3))]
    assert measured_margin([counts, others], scale({"t": 300}, metric=TAGS["f1"]), of, 0).smallest > 0


def test_what_only_scores_can_tell():
    metrics = {"a": JUDGED, "b": CLASS["mcc"], "c": ENDLESS}
    assert Scale(tuple(metrics), dict.fromkeys(metrics, 1.0), metrics).unjudged == ["b", "c"]


def test_a_difference_above_the_discordance_is_impossible():
    assert not assumed_margin(scale({"t": 8}), 0.1).possible
    assert assumed_margin(scale({"t": 800}), 0.1).possible


def test_how_many_items_it_takes():
    assert Margin(0.2, 0.02, 1000).needed(0.01) == 4000
    assert Margin(0.2, 0.01, 1000).needed(0.01) == 1000


def test_power_is_never_computed_from_an_observed_difference():
    """Of the same discordance, a pair with a large difference promises as much as one without."""
    ours, theirs = [1.0] * 30 + [0.0] * 70, [0.0] * 30 + [0.0] * 70
    even = [1.0] * 15 + [0.0] * 70 + [0.0] * 15, [0.0] * 15 + [0.0] * 70 + [1.0] * 15
    of = scale({"t": 100})
    one_sided, balanced = measured_margin([ours, theirs], of, of, 0), measured_margin(even, of, of, 0)
    assert one_sided.discordance == pytest.approx(0.3)
    assert one_sided.smallest == pytest.approx(balanced.smallest)
