"""Item-response estimates: what a model is expected to answer to the items that it has not seen."""

import numpy as np
import pytest
from scipy import optimize, stats

from evolver.evaluation.scores import irt
from evolver.evaluation.scores.irt import fit_items
from evolver.evaluation.scores.metrics import CLASS, JUDGED
from evolver.evaluation.scores.scoring import Scale

KINDS = ("p-irt", "gp-irt", "mp-irt")
WEIGHTS = {"a": 1.0, "b": 3.0}


def simulated(models, count, seed, spread=1.0):
    """Abilities, and answers by the two-parameter logistic model."""
    rng = np.random.default_rng(seed)
    abilities, slopes, hard = (
        rng.normal(0, spread, models),
        np.exp(rng.normal(0, 0.4, count)),
        rng.normal(0, 1.7, count),
    )
    right = rng.random((models, count)) < 1 / (1 + np.exp(hard - np.outer(abilities, slopes)))
    return abilities, right.astype(float).tolist()


def scale(count):
    tasks = tuple("aab"[i % 3] for i in range(count))
    return Scale(tasks, WEIGHTS, dict.fromkeys(WEIGHTS, JUDGED))


def plain(of, items):
    """The score by the items seen alone."""
    tasks = of.of_tasks(items)
    return sum(WEIGHTS[t] * v for t, v in tasks.items()) / sum(WEIGHTS[t] for t in tasks)


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_rank_new_models_better_than_the_items_seen_do(kind):
    """40 models to learn from, 40 new ones of which 36 of 240 items are seen; five worlds."""
    of, ours, theirs, errors = scale(240), [], [], []
    for seed in range(5):
        _, answers = simulated(80, 240, seed)
        model = fit_items(answers[:40], 240)
        experts = [model.ability(row) for row in answers[:4]]
        truth = [of.score(row) for row in answers[40:]]
        found = [model.estimate(row[:36], of, kind, experts) for row in answers[40:]]
        means = [plain(of, row[:36]) for row in answers[40:]]
        ours.append(stats.spearmanr(found, truth).statistic)
        theirs.append(stats.spearmanr(means, truth).statistic)
        errors.append((np.abs(np.subtract(found, truth)).mean(), np.abs(np.subtract(means, truth)).mean()))
    assert np.mean(ours) > np.mean(theirs)
    mine, other = np.mean(errors, axis=0)
    assert mine < (0.8 if kind != "mp-irt" else 1.0) * other


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_of_all_items_is_their_score(kind):
    of, (_, answers) = scale(60), simulated(12, 60, 1)
    model = fit_items(answers[:10], 60)
    for row in answers:
        assert model.estimate(row, of, kind, [0.5, -0.2]) == of.score(row)


def test_no_item_seen_gives_the_average_model():
    """Without an answer the ability is the prior's mean; an easy task is expected to be answered well."""
    of, (_, answers) = scale(90), simulated(50, 90, 2)
    found = fit_items(answers, 90).estimate([], of)
    assert found == pytest.approx(np.mean([of.score(row) for row in answers]), abs=0.03)


def test_parameters_are_recovered():
    abilities, answers = simulated(200, 300, 3)
    model = fit_items(answers, 300)
    found = [model.ability(row) for row in answers]
    assert stats.spearmanr(found, abilities).statistic > 0.95
    rates = np.mean(answers, axis=0)
    assert stats.spearmanr(model.difficulty, -rates).statistic > 0.9


def test_the_gradient_is_that_of_the_loss():
    rng = np.random.default_rng(4)
    known, asked = rng.random((4, 6)), rng.random((4, 6)) < 0.8
    x = rng.normal(0, 1, 4 + 12)
    loss = lambda at: irt._loss(at, known * asked, asked, 0.3)  # noqa: E731
    numeric = optimize.approx_fprime(x, lambda at: loss(at)[0], 1e-7)
    assert loss(x)[1] == pytest.approx(numeric, abs=1e-4)


def test_an_ability_is_where_the_posterior_is_highest():
    _, answers = simulated(30, 80, 5)
    model = fit_items(answers, 80)
    row = np.array(answers[3][:25])
    a, b = model.discrimination[:25], model.difficulty[:25]

    def loss(theta):
        z = a * theta - b
        return np.sum(np.logaddexp(0, z) - row * z) + (theta - 0.4) ** 2 / (2 * 0.7**2)

    best = optimize.minimize_scalar(loss, bounds=(-8, 8), method="bounded", options={"xatol": 1e-9}).x
    assert model.ability(row.tolist(), 0.4, 0.7) == pytest.approx(best, abs=1e-5)


def test_models_that_were_asked_the_first_items_only_count_with_those():
    """Items that none was asked are expected to be as hard as the others on average, and first answers still teach."""
    _, answers = simulated(40, 60, 6)
    whole, part = fit_items(answers, 60), fit_items([row[:30] for row in answers], 60)
    assert np.ptp(part.difficulty[30:]) == pytest.approx(0, abs=1e-4)
    assert stats.spearmanr(part.difficulty[:30], whole.difficulty[:30]).statistic > 0.99


def test_graded_answers_are_fractions_of_right_ones():
    """A model that scores 0.5 everywhere is as able as one that gets every other of equal items right."""
    model = irt.ItemModel(np.ones(40), np.zeros(40), np.zeros((1, 40)))
    assert model.ability([0.5] * 40) == pytest.approx(model.ability([0.0, 1.0] * 20), abs=1e-9)
    assert fit_items([[0.5, 0.25], [0.75, 1.0]], 2).discrimination.shape == (2,)


def test_a_blend_leans_on_the_items_seen_where_the_model_is_wrong():
    """All models get the first half right and the second wrong, and the item model does not know that."""
    of = Scale(("t",) * 100, {"t": 1.0}, {"t": JUDGED})
    model = irt.ItemModel(np.ones(100), np.zeros(100), np.tile(np.r_[np.ones(50), np.zeros(50)], (8, 1)))
    wrong = model.estimate([1.0] * 20, of, "p-irt")
    blended = model.estimate([1.0] * 20, of, "gp-irt")
    assert wrong < blended < 1.0
    trusted = irt.ItemModel(np.ones(100), np.zeros(100), np.full((8, 100), np.nan))
    assert trusted.estimate([1.0] * 20, of, "gp-irt") == trusted.estimate([1.0] * 20, of, "p-irt")


def test_able_experts_let_expect_an_able_merge():
    of, (_, answers) = scale(60), simulated(20, 60, 7)
    model = fit_items(answers, 60)
    weak, strong = (model.estimate(answers[0][:6], of, "mp-irt", [t, t]) for t in (-1.0, 1.0))
    assert weak < strong


def test_the_same_answers_give_the_same_model():
    _, answers = simulated(12, 50, 8)
    one, two = fit_items(answers, 50), fit_items(answers, 50)
    assert np.array_equal(one.difficulty, two.difficulty)
    assert np.array_equal(one.discrimination, two.discrimination)


def test_what_cannot_be_estimated_is_refused():
    model = fit_items([[0.0, 1.0], [1.0, 1.0]], 2)
    of = Scale(("t",) * 2, {"t": 1.0}, {"t": JUDGED})
    with pytest.raises(ValueError, match="no models"):
        fit_items([], 2)
    with pytest.raises(ValueError, match="3 items of 2"):
        fit_items([[0.0, 1.0, 1.0]], 2)
    with pytest.raises(ValueError, match="between 0 and 1"):
        model.ability([1.5])
    with pytest.raises(ValueError, match="mp-irt needs"):
        model.estimate([1.0], of, "mp-irt")
    with pytest.raises(ValueError, match="judged item by item"):
        model.estimate([1.0], Scale(("t",) * 2, {"t": 1.0}, {"t": CLASS["mcc"]}, (0.0, 1.0)))
    with pytest.raises(ValueError, match="1 items, of 2"):
        model.estimate([1.0], Scale(("t",), {"t": 1.0}, {"t": JUDGED}))
