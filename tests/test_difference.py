"""The estimate without bias: its mean over all draws, its intervals, and what good predictions are worth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from evolver.evaluation.scores.difference import (
    ASYMPTOTIC_FROM,
    Predictor,
    asymptotic_interval,
    betting_interval,
    estimate,
    estimate_at,
    predictor_of,
)
from evolver.evaluation.scores.metrics import JUDGED
from evolver.evaluation.scores.scoring import Scale

TASKS = 4


def family(models, items, seed=0):
    """Answers of models that are mixtures of four experts, (models, items), and the task of each item."""
    rng = np.random.default_rng(seed)
    tasks = np.arange(items) % TASKS
    experts = rng.normal(0, 1, (TASKS, items)) + 1.2 * (np.arange(TASKS)[:, None] == tasks)
    mixtures = rng.dirichlet(np.ones(TASKS) * 1.5, models) @ experts
    return (mixtures - rng.normal(0, 0.5, items) + rng.normal(0, 0.2, (models, items)) > 0.2).astype(float), tasks


def scale(tasks, **weights):
    names = [f"t{t}" for t in tasks]
    return Scale(tuple(names), weights or dict.fromkeys(names, 1.0), dict.fromkeys(names, JUDGED))


def part(rng, tasks, n):
    """n random items of each task, in a random order."""
    found = [rng.permutation(np.flatnonzero(tasks == t))[:n] for t in np.unique(tasks)]
    return rng.permutation(np.concatenate(found))


@pytest.mark.parametrize("models", [0, 3])
def test_over_all_draws_the_mean_is_the_score(models):
    """Every subset of six of eight items in every order of the folds that matters: exactly right on average."""
    rng = np.random.default_rng(1)
    known, answers = rng.integers(0, 2, (models, 6)).astype(float), rng.random((2, 6))
    of = scale([0] * 6)
    found = [
        estimate(of, known, order[:4], answers[:, list(order[:4])]).value for order in itertools.permutations(range(6))
    ]
    assert np.mean(found, axis=0) == pytest.approx(answers.mean(1), abs=1e-12)
    assert np.std(found, axis=0).min() > 0.01


def test_over_all_draws_of_two_weighted_tasks_the_mean_is_the_score():
    rng = np.random.default_rng(2)
    known, answers = rng.integers(0, 2, (3, 8)).astype(float), rng.random((1, 8))
    of = scale([0, 0, 0, 0, 1, 1, 1, 1], t0=1.0, t1=3.0)
    draws = itertools.product(itertools.permutations(range(4), 2), itertools.permutations(range(4, 8), 3))
    found = [estimate(of, known, [*a, *b], answers[:, [*a, *b]]).value[0] for a, b in draws]
    assert np.mean(found) == pytest.approx(of.score(answers[0].tolist()), abs=1e-12)


def test_all_items_give_the_score_without_an_error():
    answers, tasks = family(5, 40)
    found = estimate(scale(tasks), answers[:4], range(40), answers[4:])
    assert found.value == pytest.approx([answers[4].mean()])
    assert found.error == pytest.approx([0.0])


@pytest.mark.whole
def test_the_bias_over_many_draws_is_below_its_standard_error():
    answers, tasks = family(10, 400)
    made, share, rng = Predictor(answers[:6], tasks), np.full(400, 1 / 400), np.random.default_rng(3)
    mine, found = answers[6:8], []
    for _ in range(10_000):
        places = part(rng, tasks, 40)
        found.append(estimate_at(made, share, places, mine[:, places]).value)
    error = np.std(found, axis=0) / 100
    assert error.max() <= 0.0003  # 0.03 points
    assert np.abs(np.mean(found, axis=0) - mine.mean(1)).max() < 3 * error.max()


@pytest.mark.whole
@pytest.mark.parametrize("n", [-(-ASYMPTOTIC_FROM // TASKS), 25, 50])
def test_asymptotic_intervals_hold_as_often_as_they_say(n):
    answers, tasks = family(80, 1000)
    made, share, rng = Predictor(answers[:20], tasks), np.full(1000, 1 / 1000), np.random.default_rng(4)
    held = []
    for _ in range(400):
        places = part(rng, tasks, n)
        low, high = asymptotic_interval(estimate_at(made, share, places, answers[20:, places]))
        held.append((low <= answers[20:].mean(1)) & (answers[20:].mean(1) <= high))
    assert 0.935 <= np.mean(held) <= 0.965


@pytest.mark.parametrize(("n", "widest"), [(10, 1.0), (60, 0.5)])
def test_betting_intervals_hold_at_least_as_often(n, widest):
    """Of two tasks with other weights, in an order of both together, whatever the other models are worth."""
    answers, tasks = family(30, 200)
    tasks = tasks // 2
    of = scale(tasks, t0=2.0, t1=1.0)
    rng, share, held, width = np.random.default_rng(5), of.item_shares, [], []
    for k in range(200):
        made = predictor_of(of, answers[:10] if k % 2 else 1 - answers[:10])
        places, mine = rng.permutation(200)[:n], answers[10 + k % 20]
        low, high = betting_interval(made, share, places, mine[places])
        held.append(low <= share @ mine <= high)
        width.append(high - low)
    assert np.mean(held) >= 0.95
    assert np.mean(width) < widest


def test_models_of_the_same_kind_are_worth_items():
    answers, tasks = family(60, 1000)
    share, rng = np.full(1000, 1 / 1000), np.random.default_rng(6)
    errors = {}
    for name, known in (("none", answers[:0]), ("kin", answers[:20]), ("noise", rng.integers(0, 2, (20, 1000)) * 1.0)):
        made, draw = Predictor(known, tasks), np.random.default_rng(7)
        drawn = [part(draw, tasks, 50) for _ in range(30)]
        found = [estimate_at(made, share, p, answers[20:, p]).value - answers[20:].mean(1) for p in drawn]
        errors[name] = float(np.square(found).mean())
    assert errors["none"] > 2 * errors["kin"]
    assert errors["noise"] < 1.1 * errors["none"]  # predictions that are worth nothing do no harm


def test_a_task_with_one_scored_item_and_one_with_none():
    answers, tasks = family(6, 40)
    found = estimate(scale(tasks), answers[:5], [0, 4, 8, 1, 2], answers[5:, [0, 4, 8, 1, 2]])
    assert 0 <= found.value[0] <= 1.2
    assert found.error[0] > 0
