"""The time left of a run is told from its first result on, and is near to what it takes."""

from __future__ import annotations

import math

import pytest

from evolver.loggers.pace import Pace, Remaining, in_words
from evolver.records import Result

START, EACH, ITEM = 3.0, 0.2, 0.01  # seconds: to build a worker, to build a candidate, to score an item
STEP = 8  # how much longer gradients take


def stages(candidates=40, most=None):
    return {
        "baseline": Remaining(8, 100),
        "search": Remaining(candidates, 100, most),
        "report": Remaining(7, 400, builds=True),
        "check": Remaining(1, 100, builds=True),
    }


class Simulated:
    """A run by a clock of its own."""

    def __init__(self, ahead, workers=1, mood=lambda n: 1.0):
        self.now, self.mood, self.workers, self.number = 0.0, mood, workers, 0
        self.pace = Pace(ahead, workers, lambda: self.now)
        self.told = []

    def build(self):
        self.now += START

    def score(self, stage, items, reused=False, loss=None):
        scoring = items * ITEM * self.mood(self.number) * (1 if loss is None else STEP)
        self.number += 1
        seconds = {"materialise": EACH, "forward": scoring, "total": EACH + scoring}
        self.now += 0.0 if reused else seconds["total"] / self.workers
        self.pace.result(
            Result(
                0, "r", "ok", 0.5, items=(1.0,) * items, seconds=seconds, stage=stage, reused=reused, complete=True,
                loss=loss,
            )
        )  # fmt: skip
        self.told.append((self.now, self.pace.left()))


def whole(run, searched=lambda n: 100, candidates=40):
    run.build()
    for _ in range(8):
        run.score("baseline", 100)
    for n in range(candidates):
        run.score("search", searched(n))
    run.build()
    for _ in range(7):
        run.score("report", 400)
    run.now += START + 100 * ITEM  # the export is loaded and scored
    return run


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_result_tells_the_whole_time(workers):
    run = whole(Simulated(stages(), workers))
    for now, left in run.told[:-7]:
        assert math.isclose(left, run.now - now, rel_tol=0.35 if workers > 1 else 0.08)


def test_candidates_that_stop_early_are_learnt():
    run = whole(Simulated(stages()), searched=lambda n: 25)
    now, left = run.told[20]
    assert math.isclose(left, run.now - now, rel_tol=0.1)


def test_a_machine_that_slows_down_is_noticed():
    run = whole(Simulated(stages(), mood=lambda n: 1.0 if n < 10 else 5.0))
    now, left = run.told[30]
    assert math.isclose(left, run.now - now, rel_tol=0.15)


def test_a_budget_of_items_and_no_budget_at_all():
    run = Simulated(stages(None, 1000))
    run.build()
    run.score("baseline", 100)
    assert math.isclose(run.told[0][1], 7 * 1.2 + 10 * 1.2 + 7 * 4.2 + 1.2 + 2 * START, rel_tol=0.01)
    run = Simulated(stages(None))
    run.score("baseline", 100)
    assert run.told == [(1.2, None)]


def test_what_was_known_takes_no_time_and_tells_none():
    run = Simulated(stages())
    run.score("baseline", 100, reused=True)
    assert run.told == [(0.0, None)]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.1, "1 s"),
        (89, "89 s"),
        (100, "1 min 40 s"),
        (181, "3 min"),
        (596, "10 min"),
        (3600, "60 min"),
        (12000, "3 h 20 min"),
    ],
)
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words


def test_gradients_take_longer_than_the_scores_that_follow_them():
    run = Simulated(stages(candidates=30))
    run.build()
    for _ in range(8):
        run.score("baseline", 100)
    for _ in range(30):
        run.score("search", 100, loss=1.0)
    told = run.pace.left()
    last = 2 * START + 7 * (EACH + 400 * ITEM) + EACH + 100 * ITEM
    assert told == pytest.approx(last, rel=0.1)
    halfway = run.told[8 + 15 - 1][1]
    assert halfway == pytest.approx(15 * (EACH + 100 * ITEM * STEP) + last, rel=0.1)
