"""The gate between two models: its error rate, its bounds, and the command."""

import math

import numpy as np
import pytest
import toys
from scipy import stats

from evolver.evaluation.scores.gate import Gate
from evolver.evaluation.scores.metrics import CLASS, ENDLESS, JUDGED
from evolver.evaluation.scores.scoring import Scale

SLACK = 0.999  # once in a thousand seeds, a right program would fail
GATES = 300


def pair(rng, count, differing, difference):
    """Answers of two models that differ on a share of the items, by ``difference`` on average."""
    draw = rng.random(count)
    gained, lost = (differing + difference) / 2, (differing - difference) / 2
    change = np.where(draw < gained, 1, np.where(draw < gained + lost, -1, 0))
    both = rng.random(count) < 0.5
    ours = np.where(change == 1, 1, np.where(change == -1, 0, both)).astype(float)
    return ours.tolist(), (ours - change).tolist()


def even(count):
    return Scale(("t",) * count, {"t": 1.0}, {"t": JUDGED})


def verdicts(count, differing, difference, margin, alpha=0.1, seed=0):
    rng = np.random.default_rng(seed)
    gate = Gate(even(count), margin, alpha, count)
    found = [gate.look(*pair(rng, count, differing, difference)) for _ in range(GATES)]
    return {v: found.count(v) for v in ("not worse", "worse", None)}


@pytest.mark.parametrize("differing", [0.1, 0.3, 0.6])
def test_the_error_rate_holds_where_a_model_is_worse_by_just_the_margin(differing):
    found = verdicts(500, differing, -0.03, 0.03)
    most = stats.binom.ppf(SLACK, GATES, 0.1)
    assert found["not worse"] <= most
    assert found["worse"] <= most


def test_models_that_differ_much_are_told_apart():
    assert verdicts(500, 0.3, -0.2, 0.03)["worse"] > 0.95 * GATES
    assert verdicts(500, 0.3, 0.2, 0.03)["not worse"] > 0.95 * GATES
    assert verdicts(500, 0.3, 0.0, 0.1)["not worse"] > 0.8 * GATES


def test_the_error_rate_holds_for_tasks_of_several_sizes_and_weights():
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(GATES):
        parts = {"a": pair(rng, 100, 0.4, 0.13), "b": pair(rng, 300, 0.4, -0.11)}
        tasks = np.repeat(["a", "b"], [100, 300])
        order = rng.permutation(400)
        ours, theirs = (np.concatenate([parts[t][k] for t in "ab"])[order].tolist() for k in (0, 1))
        of = Scale(tuple(tasks[order].tolist()), {"a": 1.0, "b": 2.0}, {"a": JUDGED, "b": JUDGED})
        wrong += Gate(of, 0.03, 0.1, 400).look(ours, theirs) == "not worse"  # the difference is -0.03
    assert wrong <= stats.binom.ppf(SLACK, GATES, 0.1)


def test_the_bounds_hold_and_agree_with_the_verdict():
    rng, outside = np.random.default_rng(2), 0
    for _ in range(GATES):
        ours, theirs = pair(rng, 300, 0.3, 0.05)
        gate = Gate(even(300), 0.02, 0.1, 300)
        low, high = gate.bounds(ours, theirs)
        assert low <= gate.difference(ours, theirs) <= high
        outside += low > 0.05
        assert (low > -0.02) == (gate.look(ours, theirs) == "not worse") or math.isclose(low, -0.02, abs_tol=1e-9)
    assert outside <= stats.binom.ppf(SLACK, GATES, 0.1)


def test_looking_more_often_changes_no_verdict():
    rng = np.random.default_rng(3)
    ours, theirs = pair(rng, 400, 0.3, -0.2)
    gate = Gate(even(400), 0.01, 0.05, 400)
    first = next(n for n in range(1, 401) if gate.look(ours[:n], theirs[:n]))
    assert {gate.look(ours[:n], theirs[:n]) for n in range(first, 401)} == {"worse"}
    assert first < 150


def test_models_that_agree_everywhere_are_let_through():
    ours = [1.0, 0.0] * 500
    assert Gate(even(1000), 0.01, 0.05, 1000).look(ours, ours) == "not worse"
    assert Gate(even(1000), 0.0, 0.05, 1000).look(ours, ours) is None


@pytest.mark.parametrize("metric", [CLASS["mcc"], ENDLESS])
def test_other_metrics_are_refused(metric):
    with pytest.raises(ValueError, match="judged item by item"):
        Gate(Scale(("t",) * 2, {"t": 1.0}, {"t": metric}, (0.0, 1.0)), 0.01, 0.05, 2)


@pytest.mark.whole
def test_the_command(models, make_config, tmp_path):
    file = make_config(tmp_path, {"evaluation.tasks": [{"task": "toy", "dev": 30, "report": 60, "select": 0}]})
    same = toys.evolver("gate", models / "a", models / "a", "--config", file, "--margin", 0.2)
    assert (same.code, same.err) == (0, "")
    assert same.out.startswith("Not worse: ")
    assert "Difference: +0.0 points on 24 of 60 report items; it is at least -" in same.out
    assert same.out.count("\n") == 2
    short = toys.evolver("gate", models / "a", models / "b", "--config", file, "--margin", 0.3, "--max-items", 3)
    assert short.code == 5
    assert "on 3 of 60 report items" in short.out
    worse = toys.evolver("gate", models / "base", models / "a", "--config", file, "--margin", 0, "--error-rate", 0.4)
    assert worse.code in (4, 5)
    for options, said in (
        (["--margin", 1], "--margin: 1 is not usable"),
        (["--error-rate", 0.7], "--error-rate: 0.7 is not usable"),
    ):
        ended = toys.evolver("gate", models / "a", models / "b", "--config", file, *options)
        assert said in toys.refusal(ended.code, ended.err)
    ended = toys.evolver("gate", models / "nowhere", models / "b", "--config", file)
    assert "evolver gate" in toys.refusal(ended.code, ended.err)
    rolls = make_config(
        tmp_path, {"evaluation.tasks": [{"task": "roll", "metric": "word_perplexity", "dev": 3, "report": 3}]}
    )
    ended = toys.evolver("gate", models / "a", models / "b", "--config", rolls)
    assert "the metric of roll does not give" in toys.refusal(ended.code, ended.err)
