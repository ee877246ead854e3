"""Budgets: the first limit that is reached ends a search, and says so, with any number of workers, killed or not."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import toys
from test_search import CONFIGURATIONS, ORDERED, answer, build, every_search, ids, score, simulate
from toys import run_here

from evolver.config import Budget
from evolver.dashboard.status import statuses
from evolver.records import Result
from evolver.runs.clock import Clock, searched_seconds
from evolver.runs.ended import Ended, read_ended, write_ended
from evolver.search.ending import Progress, Timed
from evolver.storage import storage_at

# Searches whose steps have no scores refuse a limit on patience; their other limits are in test_descent.
SCORELESS = ("adamerging", "expert_merging", "fw_merging", "concrete", "defense_aware")


def scored(settings):
    found = {n: s for n, s in settings.items() if s["algorithm"] not in SCORELESS}
    return pytest.mark.parametrize("settings", found.values(), ids=found.keys())


EVERY, EVERY_ORDERED = scored(CONFIGURATIONS), scored(ORDERED)
LIMITS = {
    "patience": {"patience": 4, "candidates": 200},
    "target": {"target": 0.9, "candidates": 200},
    "both": {"target": 0.97, "patience": 6, "items": 900},
}


def result(score=None, complete=True, number=0, items=10):
    return Result(number, "00", "ok", score, complete=complete, items=(0.0,) * items)


def progress(*results, **limits):
    found = Progress()
    for one in results:
        found = found.after(one, Budget(**limits))
    return found


def test_a_search_is_patient_for_so_many_candidates_after_the_last_improvement():
    worse = [result(0.5), result(0.6), result(0.6), result(0.1)]
    assert progress(*worse, patience=2).reached == "patience"
    assert progress(*worse[:3], patience=2).reached is None
    assert progress(*worse[:3], result(0.7), patience=2).idle == 0


def test_what_has_no_score_of_all_items_is_no_improvement():
    stopped = [result(0.5), result(None, complete=False), replace(result(), status="failed"), result(0.9, False)]
    assert progress(*stopped, patience=9).idle == 3
    assert progress(*stopped, patience=9, target=0.8).reached is None


def test_the_first_limit_counts_whatever_comes_later():
    found = progress(result(0.5), result(0.4), result(0.9), patience=1, target=0.8, items=30)
    assert found.reached == "patience"
    assert (found.items, found.best, found.idle) == (30, 0.9, 0)
    assert progress(result(0.9), target=0.8, items=10).reached == "target"
    assert progress(result(0.7), target=0.8, items=10).reached == "items"


@pytest.mark.whole
@EVERY
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())
def test_workers_and_timing_change_neither_the_candidates_nor_the_reason(settings, limits):
    search = every_search(settings, **limits)
    alone = ids(simulate(search))
    for workers, order in ((1, 1), (2, 2), (8, 3), (8, 4)):
        other = every_search(settings, **limits)
        assert ids(simulate(other, workers, order)) == alone
        assert other.ended == search.ended is not None


@EVERY
def test_a_replay_ends_at_the_same_candidate_for_the_same_reason(settings):
    first = every_search(settings, **LIMITS["patience"])
    recorded = {c.number: answer(c) for c in simulate(first, 4, 1)}
    again, replayed = every_search(settings, **LIMITS["patience"]), 0
    while not again.done:
        for candidate in again.ask(1):
            assert recorded[candidate.number].recipe_id == candidate.recipe.id
            again.tell(recorded[candidate.number])
            replayed += 1
    assert (replayed, again.ended) == (len(recorded), first.ended)


@EVERY_ORDERED
def test_patience_is_kept(settings):
    """The last candidates did not improve anything, and no earlier ones of as many."""
    search = every_search(settings, patience=4, candidates=200)
    asked = simulate(search)
    best, idle, longest = -1.0, 0, []
    for told in map(answer, asked):
        improved = told.score is not None and told.score > best
        best, idle = (told.score, 0) if improved else (best, idle + 1)
        longest.append(idle)
    if search.ended == "patience":
        assert max(longest) >= 4
        assert max(longest[: search.waits_for(asked[-1].number)], default=0) < 4
    else:
        assert (search.ended, len(asked)) == ("search", search.total)


@EVERY_ORDERED
def test_a_target_ends_a_search(settings):
    search = every_search(settings, target=0.8, candidates=60)
    asked = simulate(search, 3, 1)
    best = [told.score or 0.0 for told in map(answer, asked)]
    assert search.ended == ("target" if max(best) >= 0.8 else "candidates" if len(asked) == 60 else "search")
    assert max(best[: search.waits_for(asked[-1].number)], default=0.0) < 0.8


@EVERY_ORDERED
def test_a_raised_limit_goes_on_with_the_same_candidates(settings):
    short, long = (ids(simulate(every_search(settings, patience=k, candidates=60))) for k in (3, 9))
    assert long[: len(short)] == short


@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"candidates": 8}, "candidates"), ({"candidates": 99}, "search"), ({"items": 25}, "items"),
     ({"patience": 1, "candidates": 99}, "patience"), ({"candidates": 12, "target": 1e-9}, "target")],
)  # fmt: skip
def test_a_search_says_what_ended_it(limits, reason):
    search = build({"algorithm": "evolver", "generations": 3}, **limits)
    assert search.ended is None
    simulate(search, 3, 1)
    assert search.ended == reason


def test_a_target_that_the_last_candidate_reaches_is_reached():
    asked = simulate(build({"algorithm": "evolver", "generations": 3}, candidates=4))
    last = max(map(score, asked))
    search = build({"algorithm": "evolver", "generations": 3}, candidates=4, target=last)
    simulate(search)
    assert search.ended == "target"


# Minutes


class Minutes:
    """A time that is up after so many questions."""

    def __init__(self, questions):
        self.left = questions

    def __call__(self):
        self.left -= 1
        return self.left < 0


@EVERY
@pytest.mark.parametrize("workers", [1, 4])
def test_candidates_in_evaluation_are_finished_when_the_time_is_up(settings, workers):
    timed = Timed(every_search(settings, candidates=60), Minutes(3), ())
    asked = simulate(timed, workers, 1)
    assert 0 < len(asked) <= 3 * workers
    assert timed.ended == "minutes"


@EVERY
def test_a_run_that_is_called_again_after_its_time_scores_nothing_more(settings):
    recorded = {c.number: answer(c) for c in simulate(Timed(every_search(settings), Minutes(3), ()), 3, 1)}
    again, asked = Timed(every_search(settings), lambda: True, recorded), {}
    while not again.done:
        for candidate in again.ask(3):
            asked[candidate.number] = recorded[candidate.number]
            again.tell(recorded[candidate.number])
    assert asked == recorded
    assert again.ended == "minutes"


def test_a_run_with_more_time_goes_on_where_it_was():
    first = ids(simulate(Timed(build(ORDERED["tpe"]), Minutes(8), ()), 3, 1))
    assert ids(simulate(Timed(build(ORDERED["tpe"]), lambda: False, range(len(first)))))[: len(first)] == first


def test_a_search_that_comes_to_its_end_in_time_says_so():
    timed = Timed(build(ORDERED["tpe"], candidates=7), lambda: False, ())
    assert timed.ended is None
    assert len(simulate(timed, 2, 1)) == timed.total == 7
    assert timed.ended == "candidates"


def test_results_that_nobody_asks_for_any_more_do_not_keep_a_search_going():
    timed = Timed(build(ORDERED["tpe"], candidates=7), lambda: True, [3, 99])
    assert len(simulate(timed)) == 7
    assert timed.done


class Hands:
    """The hands of a clock, which the test moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_clock_adds_up_the_calls_of_a_run(tmp_path):
    hands, folder = Hands(), storage_at(tmp_path)
    clock = Clock(folder, hands)
    hands.now += 50  # baselines
    clock.begin()
    hands.now += 30
    assert not clock.up(1)
    assert clock.left(1) == 30
    clock.tick()
    hands.now += 1
    clock.tick()  # too soon after the last: a call that is killed here loses a second
    assert searched_seconds(folder) == 30
    again = Clock(folder, hands)
    again.begin()
    hands.now += 31
    assert again.taken == 61
    assert again.up(1)
    assert searched_seconds(folder) == 61  # no later call finds that there is time
    assert again.left(None) == float("inf")
    hands.now += 5
    again.up(1)
    assert searched_seconds(folder) == 61


@pytest.mark.parametrize("content", ["", "[]", '{"seconds": "x"}', '{"seconds": -1}', "{}"])
def test_a_clock_that_cannot_be_read_begins_anew(tmp_path, content):
    (tmp_path / "clock.json").write_text(content)
    assert searched_seconds(storage_at(tmp_path)) == 0.0


# What a run's folder says


def test_the_reason_is_written_once(tmp_path):
    folder, budget = storage_at(tmp_path), Budget(candidates=9, patience=3)
    assert read_ended(folder, budget) is None
    first = write_ended(folder, budget, "patience")
    assert first.why == "3 candidates in a row did not improve the best dev score"
    assert write_ended(folder, budget, "candidates") == first == read_ended(folder, budget)
    raised = Budget(candidates=9, patience=5)
    assert read_ended(folder, raised) is None  # it has not ended within this one
    assert write_ended(folder, raised, "candidates").reason == "candidates"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"reason": "x", "budget": {"items": 5}}', '{"reason": "minutes", "budget": {"items": 5}}']
)
def test_a_reason_that_cannot_be_read_is_none(tmp_path, content):
    (tmp_path / "ended.json").write_text(content)
    assert read_ended(storage_at(tmp_path), Budget(items=5)) is None


def test_every_reason_has_words():
    budget = Budget(candidates=10**7, items=3, minutes=0.5, patience=4, target=0.825)
    said = {reason: Ended(reason, budget.limits).why for reason in (*budget.limits, "search")}
    assert "10000000 candidates" in said["candidates"]
    assert "0.5 minutes" in said["minutes"]
    assert "target of 0.825" in said["target"]
    assert len(set(said.values())) == 6


# Whole runs

PATIENT = {"budget": {"patience": 2, "candidates": 12}}


class Killed(Exception):
    pass


class Dying(toys.Silent):
    """A display at whose n-th result the process dies."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def result(self, candidate, result, left):
        self.left -= 1
        if not self.left:
            raise Killed


@pytest.mark.whole
def test_a_run_ends_for_the_same_reason_killed_or_not(make_config, tmp_path):
    file, display = make_config(tmp_path, toys.SHORT | PATIENT), toys.Silent()
    whole = run_here(file, tmp_path / "whole", display=display)
    ended = json.loads((whole / "ended.json").read_text())
    assert ended == {"reason": "patience", "budget": PATIENT["budget"]}
    said = "2 candidates in a row did not improve the best dev score"
    assert f"the search has ended: {said}" in display.lines
    assert f"The search ended because {said}." in (whole / "report.md").read_text()
    assert json.loads((whole / "summary.json").read_text())["ended"] == "patience"
    assert [(s.state, s.ended) for s in statuses(storage_at(tmp_path / "whole"))] == [("done", said)]
    for after in (5, 8, 10):
        with contextlib.suppress(Killed):
            run_here(file, tmp_path / f"killed {after}", display=Dying(after))
        killed = run_here(file, tmp_path / f"killed {after}")
        assert toys.essence(killed) == toys.essence(whole)
        assert (killed / "ended.json").read_bytes() == (whole / "ended.json").read_bytes()


@pytest.mark.whole
def test_a_run_whose_minutes_are_raised_goes_on(make_config, tmp_path):
    short = toys.SHORT | {"budget": {"minutes": 1e-4, "candidates": 8}}
    folder = run_here(make_config(tmp_path, short), tmp_path / "results")
    assert json.loads((folder / "ended.json").read_text())["reason"] == "minutes"
    first = sum(stage == "search" for stage, _ in toys.rows(folder))
    assert 1 <= first < 8
    before = (folder / "clock.json").read_text()
    assert json.loads(before)["seconds"] > 0.006
    run_here(make_config(tmp_path, short), tmp_path / "results", toys.no_work)  # its time is up, whatever it does
    assert (folder / "clock.json").read_text() == before
    ended = toys.evolver("resume", folder, "--minutes", 60)
    assert ended.code == 0, ended.err
    assert "the search has ended: it has proposed the 8 candidates of its budget" in ended.out
    assert sum(stage == "search" for stage, _ in toys.rows(folder)) == 8
    assert json.loads((folder / "ended.json").read_text())["reason"] == "candidates"
    alone = run_here(make_config(tmp_path, toys.SHORT | {"budget.candidates": 8}), tmp_path / "alone")
    assert toys.winner(alone) == toys.winner(folder)


@pytest.mark.whole
def test_a_run_is_done_though_an_older_version_knew_fewer_limits(make_config, tmp_path):
    folder = run_here(make_config(tmp_path, toys.SHORT), tmp_path / "results")
    summary = json.loads((folder / "summary.json").read_text())
    summary["budget"] = {"candidates": 3, "items": None}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "ended.json").unlink()
    assert [(s.state, s.ended) for s in statuses(storage_at(tmp_path / "results"))] == [("done", "")]
