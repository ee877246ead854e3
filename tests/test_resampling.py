"""Items that share a source document: clusters, resamples of whole documents, and metrics of weighted items."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from test_comparison import p_of_all_exchanges

from evolver.evaluation.scores import metrics
from evolver.evaluation.scores.comparison import compare, interval, resampled
from evolver.evaluation.scores.metrics import CLASS, JUDGED, LABELS, TAGS, VALUE, Metric
from evolver.evaluation.scores.resampling import Resampling, clusters_of
from evolver.evaluation.scores.scoring import Scale
from evolver.evaluation.scores.weighted import is_weighable, weighted_metric


def test_items_that_share_a_key_are_one_cluster():
    assert clusters_of([["a", "x"], ["b", "y"], ["a", "z"]]) == (0, 1, 0)


def test_clusters_are_connected_by_other_items():
    assert clusters_of([["a", "x"], ["b", "x"], ["b", "y"], ["c", "y"], ["d", "w"]]) == (0, 0, 0, 0, 1)


@pytest.mark.parametrize("keys", [[], [["a"]], [["a", "x"], ["b", "y"]], [["a", "a"], ["b", "b"]]])
def test_items_of_their_own_need_no_clusters(keys):
    assert clusters_of(keys) == ()


def both_tasks(count, clusters=True):
    """Every document is asked by two tasks."""
    tasks = ("a",) * count + ("b",) * count
    numbers = tuple(range(count)) * 2 if clusters else ()
    return Scale(tasks, {"a": 1.0, "b": 3.0}, {"a": JUDGED, "b": JUDGED}, clusters=numbers)


def test_a_document_is_drawn_with_all_of_its_items():
    scale = replace(both_tasks(5), tasks=("a",) * 5 + ("b",) * 4 + ("a",), clusters=(0, 1, 2, 3, 4, 0, 1, 2, 3, 4))
    resampling = Resampling(scale)
    assert [list(s) for s in resampling.strata] == [[4], [0, 1, 2, 3]]  # those of task a alone, those of both
    drawn = resampling.draw(np.random.default_rng(0), 200)
    assert (drawn[:, :5] == drawn[:, 5:]).all()
    assert (drawn[:, 4] == 1).all()
    assert (drawn[:, :4].sum(1) == 4).all()
    assert len(np.unique(drawn[:, :4], axis=0)) > 20


def test_without_clusters_items_are_drawn_within_their_tasks():
    resampling = Resampling(both_tasks(6, clusters=False))
    drawn = resampling.draw(np.random.default_rng(0), 100)
    assert (drawn[:, :6].sum(1) == 6).all()
    assert (drawn[:, 6:].sum(1) == 6).all()
    assert drawn.mean(0) == pytest.approx(np.ones(12), abs=0.4)


def test_the_interval_of_items_that_repeat_a_document_is_wider():
    """Ten items of each of 30 documents that all answer alike say as much as 30 items."""
    documents = np.random.default_rng(0).integers(0, 2, 30).astype(float)
    items, numbers = np.repeat(documents, 10), tuple(map(int, np.repeat(np.arange(30), 10)))
    scale = Scale(("t",) * 300, {"t": 1.0}, {"t": JUDGED}, clusters=numbers)
    once = Scale(("t",) * 30, {"t": 1.0}, {"t": JUDGED})
    low, high = interval(list(items), scale, 0)
    expected_low, expected_high = interval(list(documents), once, 0)
    assert high - low == pytest.approx(expected_high - expected_low, rel=0.1)
    low, high = interval(list(items), replace(scale, clusters=()), 0)
    assert high - low < (expected_high - expected_low) / 2.5


def test_the_paired_test_exchanges_whole_documents():
    """Of 2^4 exchanges of documents, the share that is at least as far out, counted here one by one."""
    ours, theirs = [1.0, 1, 1, 0, 1, 1, 0, 1], [0.0, 0, 1, 1, 0, 0, 1, 0]
    scale = replace(both_tasks(4), weights={"a": 1.0, "b": 1.0})
    each = (np.subtract(ours, theirs) / 8).reshape(2, 4).sum(0)
    sums = [abs(np.dot(signs, each)) for signs in itertools.product((1, -1), repeat=4)]
    assert compare(ours, theirs, scale, 0).p == pytest.approx(np.mean([s >= abs(each.sum()) - 1e-12 for s in sums]))


def test_the_exchange_of_answers_takes_whole_documents_too():
    """The same for a metric that looks at all items together."""
    right = (0.0, 1, 1, 0, 1, 0)
    ours, theirs = [0.0, 1, 1, 0, 0, 0], [1.0, 1, 0, 0, 0, 1]
    scale = Scale(("t",) * 6, {"t": 1.0}, {"t": CLASS["macro_f1"]}, right, (0, 0, 1, 1, 2, 2))
    found = compare(ours, theirs, scale, 0)
    assert found.p == pytest.approx(p_of_all_exchanges(ours, theirs, scale, of_each=2))


def test_a_median_of_documents_is_taken_of_the_items_that_are_drawn():
    scale = Scale(("t",) * 6, {"t": 1.0}, {"t": Metric("median", metrics.median_item, None)}, (), (0, 0, 1, 1, 2, 2))
    values = [1.0, 2, 3, 4, 5, 6]
    found = resampled([values], scale, 3)[0]
    times = Resampling(scale).draw(np.random.default_rng(3), len(found))
    for k in range(50):
        drawn = np.sort(np.repeat(values, times[k].astype(int)))
        assert found[k] == drawn[len(drawn) // 2]


ALL = {
    "mean": JUDGED, **{k: CLASS[k] for k in ("macro_f1", "mcc")}, "labels": LABELS["macro_f1"],
    "pearson": VALUE["pearson"], "f1": Metric("f1", metrics.binary_f1),
    "perplexity": Metric("perplexity", metrics.perplexity, -1.0), "spans": TAGS["f1"], "words": TAGS["acc"],
    "word_perplexity": Metric("word_perplexity", metrics.weighted_perplexity, -1.0),
    "bits_per_byte": Metric("bits_per_byte", metrics.bits_per_byte, 0.0),
    "bleu": Metric("bleu", metrics.bleu, counts=10), "chrf": Metric("chrf", metrics.chrf, counts=18),
    "ter": Metric("ter", metrics.ter, 0.0, counts=2),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_the_metric_of_weighted_items_is_that_of_repeated_items(name):
    """An item of weight 3 counts as three items; items of weight 0 are left out."""
    metric, rng = ALL[name], np.random.default_rng(4)
    shape = (3, 40, metric.counts) if metric.counts else (3, 40)
    answers, right = rng.integers(0, 4, shape).astype(float), rng.integers(1, 4, 40).astype(float)
    weights = rng.integers(0, 4, (5, 40)).astype(float)
    found = weighted_metric(metric, answers, right, lambda f: weights @ f.T if f.ndim == 2 else (weights @ f)[:, None])
    assert is_weighable(metric)
    for r, c in itertools.product(range(5), range(3)):
        rows = np.repeat(np.arange(40), weights[r].astype(int))
        own = answers[c][rows].sum(0)[None] if metric.counts else answers[c][rows][None]
        assert np.broadcast_to(found, (5, 3))[r, c] == pytest.approx(float(metric.of(own, right[rows][None])[0]))


def test_every_metric_but_the_median_is_weighable():
    known = set(metrics._functions().values())
    mute = {f for f in known if not is_weighable(Metric("m", f, counts=2))}
    assert mute == {metrics.median_item, metrics.opposite}
    assert known - mute == {m.of for m in ALL.values()} | {metrics.right_share}


def test_how_often_the_first_model_is_ahead():
    """Ten items, of which the first model has won one: it is ahead in the resamples that hold this item."""
    ours, theirs = [1.0] * 10, [1.0] * 9 + [0.0]
    scale = Scale(("t",) * 10, {"t": 1.0}, {"t": JUDGED})
    missing = 0.9**10
    assert compare(ours, theirs, scale, 0).ahead == pytest.approx(1 - missing / 2, abs=0.01)
    assert compare(theirs, ours, scale, 0).ahead == pytest.approx(missing / 2, abs=0.01)
    assert compare(ours, ours, scale, 0).ahead == 0.5


def test_the_share_ahead_is_that_of_a_loop():
    rng, scale = np.random.default_rng(2), Scale(("a", "b") * 30, {"a": 2.0, "b": 1.0}, {"a": JUDGED, "b": JUDGED})
    ours, theirs = (list(rng.integers(0, 2, 60).astype(float)) for _ in "ab")
    wins = 0.0
    for _ in range(4000):
        score = [0.0, 0.0]
        for places, weight in ((range(0, 60, 2), 2.0), (range(1, 60, 2), 1.0)):
            drawn = rng.choice(list(places), 30)
            for k, model in enumerate((ours, theirs)):
                score[k] += weight / 3 * sum(model[p] for p in drawn) / 30
        wins += 1.0 if score[0] > score[1] + 1e-12 else 0.5 if abs(score[0] - score[1]) < 1e-12 else 0.0
    assert compare(ours, theirs, scale, 0).ahead == pytest.approx(wins / 4000, abs=0.03)


def test_a_scale_with_documents_is_written_and_read():
    scale = both_tasks(3)
    assert Scale.from_form(scale.form()) == scale
    older = {key: value for key, value in scale.form().items() if key != "clusters"}
    assert Scale.from_form(older) == replace(scale, clusters=())
