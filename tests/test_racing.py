"""Racing: the error rate that is promised, exactness, and the items that it saves."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evolver.evaluation.scores.metrics import CLASS, ENDLESS, JUDGED
from evolver.evaluation.scores.racing import Race, log_capital
from evolver.evaluation.scores.scoring import Scale

pytestmark = pytest.mark.whole

DUELS = 400
# How far the count of errors may be above its mean: once in a thousand seeds, a right program would fail.
SLACK = 0.999


def scale(tasks, **weights):
    return Scale(tuple(tasks), weights, dict.fromkeys(weights, JUDGED))


def even(count):
    return scale(["t"] * count, t=1.0)


def reordered(of, order, *answers):
    tasks = tuple(of.tasks[i] for i in order)
    return Scale(tasks, of.weights, of.metrics), *(np.asarray(a)[order].tolist() for a in answers)


def flipped(rival, gained, lost):
    """Answers like the rival's, but for ``gained`` wrong ones put right and ``lost`` right ones got wrong."""
    answers = np.array(rival, dtype=float)
    wrong, right = np.flatnonzero(answers == 0)[:gained], np.flatnonzero(answers == 1)[:lost]
    answers[wrong], answers[right] = 1.0, 0.0
    return answers.tolist()


def first_verdict(race, items):
    """What looking after every item gives: the verdict and the number of items."""
    low, high = 0, len(items)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if race.look(items[:middle]) else (middle + 1, high)
    return race.look(items[:low]), low


def errors(of, candidate, rival, alpha, wrong, seed=0):
    """In how many of DUELS random orders the verdict is ``wrong``."""
    rng, count = np.random.default_rng(seed), 0
    for _ in range(DUELS):
        known, a, b = reordered(of, rng.permutation(len(rival)), candidate, rival)
        count += first_verdict(Race(known, b, alpha), a)[0] == wrong
    return count


def most(alpha):
    return stats.binom.ppf(SLACK, DUELS, alpha)


@pytest.mark.parametrize("alpha", [0.05, 0.3])
@pytest.mark.parametrize("changed", [6, 40])
def test_equal_scores_are_called_better_no_more_often_than_promised(alpha, changed):
    """At the edge of the null hypothesis: as many items gained as lost."""
    rival = [0.0, 1.0] * 100
    found = errors(even(200), flipped(rival, changed, changed), rival, alpha, "better")
    assert found <= most(alpha)


@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_a_slightly_better_candidate_is_rejected_no_more_often_than_promised(alpha):
    rival = [0.0, 1.0] * 100
    found = errors(even(200), flipped(rival, 31, 30), rival, alpha, "not better")
    assert found <= most(alpha)


def test_the_error_rate_is_used_and_not_only_kept():
    """A test that never decides would keep every rate."""
    rival = [0.0, 1.0] * 100
    assert errors(even(200), flipped(rival, 30, 30), rival, 0.3, "better") > 0.15 * DUELS


@pytest.mark.parametrize("wrong", ["better", "not better"])
def test_the_error_rate_holds_for_weighted_tasks_of_unequal_sizes(wrong):
    """A small task that weighs much: its items gained make up for many lost of the other, or just do not."""
    of = scale(["small"] * 20 + ["large"] * 180, small=2.0, large=1.0)
    rival = [0.0, 1.0] * 100
    candidate = np.array(rival)
    candidate[np.flatnonzero(candidate[:20] == 0)[:2]] = 1.0  # 2 of 20 items of weight 2: as much as 36 of 180
    lost = 36 if wrong == "better" else 35
    candidate[20 + np.flatnonzero(candidate[20:] == 1)[:lost]] = 0.0
    assert (of.score(candidate.tolist()) > of.score(rival)) == (wrong == "not better")
    assert errors(of, candidate.tolist(), rival, 0.1, wrong) <= most(0.1)


def test_the_error_rate_holds_for_graded_answers():
    rng = np.random.default_rng(5)
    rival = rng.random(150)
    candidate = np.clip(rival + rng.normal(0, 0.3, 150), 0, 1)
    candidate *= rival.sum() / candidate.sum() * (1 - 1e-9)
    assert candidate.max() <= 1
    assert errors(even(150), candidate.tolist(), rival.tolist(), 0.1, "better") <= most(0.1)


def test_clear_differences_take_few_items_and_are_right():
    """Of 400 items 12 % differ; the candidate is 9 points worse, or better."""
    rival = [0.0, 1.0] * 200
    for gained, lost, truth in ((6, 42, "not better"), (42, 6, "better")):
        taken, rng = [], np.random.default_rng(2)
        for _ in range(50):
            known, a, b = reordered(even(400), rng.permutation(400), flipped(rival, gained, lost), rival)
            verdict, count = first_verdict(Race(known, b, 0.05), a)
            taken.append(count)
            assert verdict == truth
        assert np.mean(taken) < 400 / 3


def test_agreement_saves_items():
    """The same difference is told sooner where the two models agree on more of the other items."""
    rival, means = [0.0, 1.0] * 200, []
    for gained in (0, 20, 60):
        rng, taken = np.random.default_rng(3), []
        for _ in range(50):
            known, a, b = reordered(even(400), rng.permutation(400), flipped(rival, gained, gained + 24), rival)
            taken.append(first_verdict(Race(known, b, 0.05), a)[1])
        means.append(np.mean(taken))
    assert means[0] < 0.8 * means[1] < 0.8 * 0.8 * means[2]


def test_a_larger_error_rate_never_takes_more_items():
    rng, rival = np.random.default_rng(4), [0.0, 1.0] * 60
    for _ in range(30):
        known, a, b = reordered(even(120), rng.permutation(120), flipped(rival, 5, 15), rival)
        taken = [first_verdict(Race(known, b, alpha), a)[1] for alpha in (0.3, 0.1, 0.05, 0.001)]
        assert taken == sorted(taken)


ANSWER = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


@st.composite
def duels(draw):
    tasks = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=25))
    weights = {t: draw(st.floats(0.01, 10)) for t in sorted(set(tasks))}
    answers = st.lists(ANSWER, min_size=len(tasks), max_size=len(tasks))
    candidate = draw(answers)
    return scale(tasks, **weights), candidate, draw(answers | st.just(candidate))


@given(duels())
@settings(max_examples=200, deadline=None)
def test_without_room_for_errors_the_verdict_is_that_of_all_items(duel):
    """Whatever the answers are: verdicts at an error rate of next to nothing are right, and are never taken back."""
    of, candidate, rival = duel
    truth = "better" if of.score(candidate) > of.score(rival) else "not better"
    race = Race(of, rival, 1e-300)
    looks = [race.look(candidate[:n]) for n in range(len(rival) + 1)]
    assert set(looks) <= {None, truth}
    assert looks[-1] == truth
    decided = [look is not None for look in looks]
    assert decided == sorted(decided)


@given(duels(), st.floats(0.01, 0.9))
@settings(max_examples=200, deadline=None)
def test_all_items_give_the_right_verdict_at_any_error_rate(duel, alpha):
    of, candidate, rival = duel
    truth = "better" if of.score(candidate) > of.score(rival) else "not better"
    assert Race(of, rival, alpha).look(candidate) == truth


@given(duels(), st.floats(0.01, 0.9), st.integers(2, 7))
@settings(max_examples=100, deadline=None)
def test_a_verdict_depends_on_the_items_and_not_on_when_one_looked(duel, alpha, block):
    of, candidate, rival = duel
    often, seldom = Race(of, rival, alpha), Race(of, rival, alpha)
    singly = [often.look(candidate[:n]) for n in range(len(rival) + 1)]
    for n in range(0, len(rival) + 1, block):
        assert seldom.look(candidate[:n]) == singly[n]


def test_the_capital_never_gains_on_average():
    """All 720 orders of six items with equal scores, counted: E[capital] <= 1 after every item."""
    share = np.full(6, 1 / 6)
    for candidate, rival in (
        ([1.0, 0, 1, 0, 1, 0], [0.0, 1, 1, 0, 1, 0]),
        ([0.5, 0.25, 1, 0, 0.25, 0], [0.0, 1, 0, 0, 1, 0]),
        ([1.0, 1, 1, 1, 1, 1], [1.0] * 6),
    ):
        a, b = np.array(candidate), np.array(rival)
        capitals = [np.exp(log_capital(a[list(o)], b[list(o)], share)) for o in itertools.permutations(range(6))]
        assert np.all(np.mean(capitals, axis=0) <= 1 + 1e-9)
        assert np.mean(capitals, axis=0)[-2] == pytest.approx(1.0)  # it is the edge of the null: nothing is given away


def test_shares_add_up_to_the_score():
    of = scale("abaab", a=3.0, b=1.0)
    items = [1.0, 0.5, 0.0, 1.0, 1.0]
    assert of.item_shares @ np.array(items) == pytest.approx(of.score(items))


def test_what_cannot_be_raced_is_refused():
    for metric in (ENDLESS, CLASS["mcc"]):
        with pytest.raises(ValueError, match="judged item by item"):
            Race(Scale(("t",) * 2, {"t": 1.0}, {"t": metric}, (0.0, 1.0)), [0.0, 1.0], 0.05)
    with pytest.raises(ValueError, match="1 of 2 items of the rival"):
        Race(even(2), [0.0], 0.05)
    with pytest.raises(ValueError, match=r"between 0 and 1, and 1\.5 does not"):
        Race(even(2), [0.0, 1.5], 0.05)
    with pytest.raises(ValueError, match="error rate"):
        Race(even(2), [0.0, 1.0], 0.0)
    race = Race(even(2), [0.0, 1.0], 0.05)
    with pytest.raises(ValueError, match="nan"):
        race.look([float("nan")])
    with pytest.raises(ValueError, match="3 items of 2"):
        race.look([0.0, 1.0, 0.0])
