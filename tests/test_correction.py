"""The bootstrap correction of the best score: against a plain loop, and against the truth of simulated searches."""

from dataclasses import replace

import numpy as np
import pytest

from evolver.evaluation.scores import metrics
from evolver.evaluation.scores.correction import corrected_best, obstacle, rounds_of
from evolver.evaluation.scores.metrics import CLASS, JUDGED, TAGS, Metric
from evolver.evaluation.scores.resampling import Resampling
from evolver.evaluation.scores.scoring import Scale

TASKS = ("a", "b", "a", "b", "b") * 8


def scale_of(metric, right=(), clusters=()):
    return Scale(TASKS, {"a": 2.0, "b": 1.0}, {"a": metric, "b": metric}, right, clusters)


def by_loop(candidates, scale, seed):
    """The same, one round after another, with the score of every resample computed from repeated items."""
    rng, resampling, found = np.random.default_rng(seed), Resampling(scale), []
    for count in resampling.blocks(rounds_of(scale), len(candidates)):
        for times in resampling.draw(rng, count):
            inside = [i for i, n in enumerate(times) for _ in range(int(n))]
            outside = [i for i, n in enumerate(times) if n == 0]
            if {scale.tasks[i] for i in outside} != {"a", "b"}:
                continue
            scores = [round(score_of(items, scale, inside), 10) for items in candidates]
            found.append(score_of(candidates[scores.index(max(scores))], scale, outside))
    return float(np.mean(found))


def score_of(items, scale, places):
    part = Scale(
        tuple(scale.tasks[p] for p in places), scale.weights, scale.metrics,
        tuple(scale.right[p] for p in places) if scale.right else (),
    )  # fmt: skip
    return part.score([items[p] for p in places])


def candidates_of(metric, count=7, seed=0):
    rng = np.random.default_rng(seed)
    if metric.counts:
        return [tuple((0.0, *map(float, rng.integers(1, 5, metric.counts))) for _ in TASKS) for _ in range(count)]
    return [tuple(map(float, rng.integers(0, 2, len(TASKS)))) for _ in range(count)]


RIGHT = tuple(map(float, np.random.default_rng(9).integers(0, 2, len(TASKS))))


@pytest.mark.parametrize("metric", [JUDGED, CLASS["macro_f1"], CLASS["mcc"], TAGS["f1"]], ids=lambda m: m.name)
def test_the_correction_is_that_of_a_loop(metric):
    scale, candidates = scale_of(metric, RIGHT), candidates_of(metric)
    assert corrected_best(candidates, scale, 5) == pytest.approx(by_loop(candidates, scale, 5))


def test_documents_are_drawn_whole():
    scale = scale_of(JUDGED, clusters=tuple(i // 2 for i in range(len(TASKS))))
    candidates = candidates_of(JUDGED)
    found = corrected_best(candidates, scale, 5)
    assert found == pytest.approx(by_loop(candidates, scale, 5))
    assert found != corrected_best(candidates, replace(scale, clusters=()), 5)


def test_of_equal_scores_the_earlier_candidate_is_chosen():
    """Two candidates with the same number of right answers in every resample, but for the order of sums."""
    candidates = candidates_of(JUDGED, 1) * 3
    assert corrected_best(candidates, scale_of(JUDGED), 0) == corrected_best(candidates[:1], scale_of(JUDGED), 0)


def test_one_candidate_has_nothing_to_correct():
    (only,) = candidates_of(JUDGED, 1)
    assert corrected_best([only], scale_of(JUDGED), 0) == pytest.approx(scale_of(JUDGED).score(only), abs=0.01)


def test_why_there_is_no_correction():
    assert obstacle(scale_of(JUDGED)) == ""
    assert "a, b is a median" in obstacle(scale_of(Metric("median", metrics.median_item, None)))
    few = Scale(("a",) * 9 + ("b",) * 4, {"a": 1.0, "b": 1.0}, {"a": JUDGED, "b": JUDGED})
    assert "fewer than 5 items" in obstacle(few)
    # Twelve documents, of which one is asked by both tasks: it is in every resample, and the others make up for it.
    shared = replace(scale_of(JUDGED), tasks=("a", "b") * 6 + ("a",), clusters=(0, 0, *range(1, 12)))
    assert obstacle(shared) == ""
    assert "fewer than 5 items" in obstacle(replace(shared, tasks=("a", "b") * 5 + ("a",) * 3))


def test_the_correction_is_nearer_to_the_truth_than_the_best_score():
    """Sixty candidates of nearly equal worth on 100 items, in 60 simulated searches."""
    raw, corrected = [], []
    scale = Scale(("t",) * 100, {"t": 1.0}, {"t": JUDGED})
    for seed in range(60):
        rng = np.random.default_rng(seed)
        worth = rng.normal(0.5, 0.01, 60)
        answers = (rng.random((60, 100)) < worth[:, None]).astype(float)
        best = int(answers.mean(1).argmax())
        raw.append(answers[best].mean() - worth[best])
        corrected.append(corrected_best([tuple(a) for a in answers], scale, seed) - worth[best])
    assert np.mean(raw) > 0.08
    assert abs(np.mean(corrected)) < 0.02
    assert np.mean(np.abs(corrected)) < np.mean(np.abs(raw)) / 2


def test_it_is_nearer_in_searches_that_learn_from_scores_too_but_does_not_reach_the_truth():
    """An adaptive search: half of the candidates change a few answers of the best one so far, the better of which it
    keeps. What they gained on these items beyond their worth, no resample takes away.
    """
    raw, corrected = [], []
    scale = Scale(("t",) * 100, {"t": 1.0}, {"t": JUDGED})
    for seed in range(40):
        rng = np.random.default_rng(seed)
        answers = [(rng.random(100) < 0.5).astype(float) for _ in range(20)]
        for _ in range(40):
            parent = max(answers, key=lambda a: a.mean())
            answers.append(np.where(rng.random(100) < 0.3, (rng.random(100) < 0.5).astype(float), parent))
        best = max(a.mean() for a in answers)  # its worth on new items is 0.5
        raw.append(best - 0.5)
        corrected.append(corrected_best([tuple(a) for a in answers], scale, seed) - 0.5)
    assert 0.02 < np.mean(corrected) < np.mean(raw) - 0.02
