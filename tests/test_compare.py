"""Runs side by side, from their folders alone."""

import json
import shutil

import pytest
import toys

from evolver.evaluation.scores.comparison import compare
from evolver.report.compare import compare_runs, comparison_text
from evolver.runs.history import read_history
from evolver.storage import storage_at

pytestmark = pytest.mark.whole

TASKS = [{"task": "toy", "dev": 20, "report": 14, "select": 10}, {"task": "pair", "dev": 12, "report": 10, "select": 8}]
TPE = {"algorithm": "tpe", "startup": 3}
CHANGES = {
    "one": {"search": TPE, "evaluation.tasks": TASKS},
    "two": {"evaluation.tasks": TASKS},
    "fewer": {"search": TPE, "evaluation.tasks": [{**TASKS[0], "report": 9}, TASKS[1]]},
    "other": {"evaluation.tasks": [{"task": "last", "dev": 8, "report": 6, "select": 4}]},
}


@pytest.fixture(scope="module")
def results(make_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    for name, changes in CHANGES.items():
        file = make_config(folder, {"run": name, "budget.candidates": 6, "finalists": {"count": 2}} | changes)
        toys.run_here(file, folder / "results")
    return folder / "results"


@pytest.fixture
def at(results):
    return lambda *names: compare_runs([storage_at(results / name) for name in names])


def test_winners_on_shared_items(at, results):
    found = at("one", "two")
    assert len(found.scale.tasks) == 24
    outcomes = [read_history(storage_at(results / name)).outcome() for name in ("one", "two")]
    ours, theirs = (o.winner.report.items for o in outcomes)
    assert [w.score for w in found.winners] == [o.winner.report.score for o in outcomes]
    ((a, b, test),) = found.tests
    assert (a, b) == ("one", "two")
    assert test == compare(ours, theirs, outcomes[0].scales["report"], 1)


def test_items_that_only_one_run_has_do_not_count(at, results):
    found = at("fewer", "one")
    assert len(found.scale.tasks) == 19
    assert at("one", "fewer").winners[0].score == pytest.approx(found.winners[1].score)


def test_best_so_far_against_items(at, results):
    for name, curve in at("one", "two").curves.items():
        scored, best = 0, []
        for row in sorted(toys.rows(results / name).items()):
            if row[0][0] == "search":
                scored += 0 if row[1]["reused"] else len(row[1]["items"]) - row[1]["given"]
                best.append((scored, row[1]["score"]))
        assert curve[-1] == (scored, max(s for _, s in best if s is not None))
        assert all(y == max(s for x, s in best if x <= at_ and s is not None) for at_, y in curve)


def test_keys_that_differ(at):
    keys = dict(at("one", "two").keys)
    assert keys["search.algorithm"] == ("tpe", "evolver")
    assert keys["search.generations"] == ("–", "3")
    assert not any(key.startswith("evaluation") for key in keys)
    assert dict(at("one", "fewer").keys) == {"evaluation.tasks[toy].report": ("14", "9")}


def test_runs_of_other_tasks_are_refused(at, results):
    toys.refused(lambda: at("one", "other"), "one, other share no report items")
    toys.refused(lambda: at("one", "one"), "at least two different runs")
    toys.refused(lambda: at("one", "nowhere"), "there is no run in this folder")


def test_a_run_that_is_not_finished_shows_its_search(at, results, tmp_path):
    shutil.copytree(results / "two", results / "half", dirs_exist_ok=True)
    try:
        for part in sorted((results / "half" / "ledger").glob("part-*"))[-2:]:
            part.unlink()
        found = at("one", "half")
    finally:
        shutil.rmtree(results / "half")
    assert [w.run for w in found.winners] == ["one"]
    assert found.tests == ()
    assert "Without a winner that was scored on report items: half." in comparison_text(found)


def test_three_runs_are_corrected_for_the_number_of_tests(at):
    form = at("one", "two", "fewer").form()
    assert len(form["tests"]) == 3
    assert all(float(row[5]) >= float(row[4]) for row in form["tests"])
    json.dumps(form)


def test_the_command(results, tmp_path):
    ended = toys.evolver("compare", results / "one", results / "two", "--out", tmp_path / "out")
    assert (ended.code, ended.err) == (0, "")
    assert "## Winners on 24 shared report items" in ended.out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"comparison.md", "comparison.html", "comparison.png"}
    assert (tmp_path / "out" / "comparison.html").read_text().count("<table>") == 4
    ended = toys.evolver("compare", results / "one", results / "other", "--out", tmp_path / "none")
    assert "share no report items" in toys.refusal(ended.code, ended.err)
    assert not (tmp_path / "none").exists()
