"""The finals: who comes to them, who wins, what is recommended, and what is on disk then."""

import json
import shutil
from dataclasses import replace

import pytest
import toys
import yaml

from evolver.config.evaluation import TaskEntry
from evolver.config.reading import config_at
from evolver.dashboard import views
from evolver.dashboard.overview import Overview
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.evaluation.items import Item, ItemSource, draw
from evolver.evaluation.scores.metrics import JUDGED
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Candidate, Question, Result
from evolver.records.leaders import leaders
from evolver.records.recipe import Expert, dump_recipe
from evolver.report.finals import recommendation
from evolver.runs.finals import Contender, Finals
from evolver.runs.history import read_history
from evolver.storage import storage_at

THREE = [{"task": "toy", "dev": 30, "select": 40, "report": 30}]


def scale(count):
    return Scale(("t",) * count, {"t": 1.0}, {"t": JUDGED})


def result(items, **more):
    score = sum(items) / len(items)
    return Result(0, "x", "ok", score=score, complete=True, items=tuple(items), tasks={"t": score}, **more)


def contender(label, dev, select=None):
    return Contender(
        label, Candidate(0, Expert(label, label), "s"), result(dev), None if select is None else result(select)
    )


def held(searched, plain=((0.0, 0.0),), alone=False):
    """Finals with contenders of these shares of right answers on 10 dev and 20 select items."""

    def of(label, pairs):
        rows = [
            ([1.0] * round(10 * d) + [0.0] * round(10 - 10 * d), [1.0] * round(20 * s) + [0.0] * round(20 - 20 * s))
            for d, s in pairs
        ]
        return tuple(contender(f"{label}{n}", dev, select) for n, (dev, select) in enumerate(rows))

    return Finals(
        of("c", searched), of("e", [(0.5, 0.5)]), of("p", plain), {"dev": scale(10), "select": scale(20)}, alone
    )


def test_the_winner_leads_on_dev_and_select_together():
    assert held([(1.0, 0.5), (0.8, 0.65)]).winner.label == "c1"  # 20 and 21 of 30
    assert held([(1.0, 0.5), (0.8, 0.55)]).winner.label == "c0"  # 20 and 19 of 30


def test_or_on_select_alone():
    assert held([(1.0, 0.5), (0.8, 0.55)], alone=True).winner.label == "c1"


def test_of_equals_the_higher_on_dev_wins():
    assert held([(0.8, 0.6), (1.0, 0.5)]).winner.label == "c1"  # 20 of 30 both


def test_a_plain_merge_is_recommended_where_it_leads_on_select_alone():
    lucky = held([(1.0, 0.5)], plain=[(0.5, 0.55)])
    assert (lucky.winner.label, lucky.recommended.label) == ("c0", "p0")
    level = held([(1.0, 0.5)], plain=[(1.0, 0.5)])
    assert level.recommended.label == "c0"  # a lead is a lead


def test_a_winner_that_could_not_be_scored_on_select_gives_way():
    two = held([(1.0, 0.5), (0.5, 0.4)])
    failed = Result(0, "c0", "failed", reason="boom")
    two = replace(two, searched=(replace(two.searched[0], select=failed), two.searched[1]))
    assert two.winner.label == "c1"


def test_without_select_items_the_dev_score_decides():
    found = Finals((contender("c0", [1, 1]), contender("c1", [1, 0])), (), (contender("p", [1, 1]),), {"dev": scale(2)})
    assert found.held
    assert found.winner.label == "c0"
    assert found.recommended.label == "c0"


def test_leaders_are_complete_and_each_model_counts_once():
    a, b, c = (Expert(n, n) for n in "abc")
    pairs = [
        (Candidate(0, a, "s"), result([1, 0])),
        (Candidate(1, b, "s"), result([1, 1])),
        (Candidate(2, b, "s"), result([1, 1])),
        (Candidate(3, c, "s", question=Question(limit=1)), result([1, 1])),
        (Candidate(4, c, "s"), replace(result([1, 1]), complete=False)),
    ]
    assert [c.number for c, _ in leaders(pairs, 6)] == [1, 0]
    assert [c.number for c, _ in leaders(pairs, 1)] == [1]


def source(dev, select, report, own=100, other=None):
    items = [Item("t", n, f"h{n}") for n in range(own)]
    entry = TaskEntry(task="t", dev=dev, report=report, select=select)
    more = None if other is None else [Item("o", n, f"o{n}") for n in range(other)]
    return ItemSource(entry, "evaluation.tasks[0]", items, select=more)


def hashes(items):
    return {i.hash for i in items}


@pytest.mark.parametrize(("select", "count"), [(None, 30), (0, 0), (7, 7), (0.4, 40), (40, 40)])
def test_select_items_are_drawn_last_and_are_nobody_elses(select, count):
    (without,), (drawn,) = draw([source(30, 0, 10)], 3), draw([source(30, select, 10)], 3)
    assert (drawn.dev, drawn.report) == (without.dev, without.report)
    assert len(drawn.select) == count
    assert not hashes(drawn.select) & hashes((*drawn.dev, *drawn.report))


def test_the_default_leaves_half_of_what_is_left():
    (drawn,) = draw([source(30, None, 30)], 3)
    assert len(drawn.select) == 20
    (drawn,) = draw([source(50, None, 50, other=60)], 3)
    assert len(drawn.select) == 50
    assert {i.task for i in drawn.select} == {"o"}


def test_documents_of_other_tasks_are_not_selected():
    tasks = [source(40, 20, 10), replace(source(30, 15, 10), key="evaluation.tasks[1]")]
    first, second = draw(tasks, 5)
    used = hashes((*first.dev, *first.report, *second.dev, *second.report))
    assert not used & hashes((*first.select, *second.select))


def test_too_many_select_items_are_refused_with_the_number_that_is_left():
    with pytest.raises(
        BadInput, match=r"evaluation.tasks\[0\].select: 61 items are asked for, and 60 of the 100 items"
    ):
        draw([source(30, 61, 10)], 3)


@pytest.fixture(scope="module")
def finished(make_config, tmp_path_factory):
    place = tmp_path_factory.mktemp("finals")
    file = make_config(place, {"evaluation.tasks": THREE, "budget.candidates": 12, "search.generations": 9})
    return file, toys.run_here(file, place / "results")


@pytest.mark.whole
def test_a_run_has_three_sets(finished):
    _, run = finished
    history = read_history(storage_at(run))
    outcome = history.outcome()
    assert [len(history.about.scales[s].tasks) for s in ("dev", "select", "report")] == [30, 40, 30]
    labels = [c.label for c, _ in history.stages["select"]]
    assert labels[:5] == ["a", "b", "c", "average", next(x for x in labels if x.startswith("task_arithmetic@"))]
    assert 1 <= len(labels) - 5 <= 6
    assert all(x.startswith("candidate ") for x in labels[5:])
    assert all(len(r.items) == 40 for _, r in history.stages["select"])
    best = json.loads((run / "summary.json").read_text())
    assert best["recommended"] == outcome.recommended.label
    assert (run / "recipe.json").read_text() == dump_recipe(outcome.recommended.recipe)
    report = (run / "report.md").read_text()
    assert ("## The finals" in report and "(recommended)" in report) or "recommended)" in report
    assert recommendation(outcome) in report


@pytest.mark.whole
def test_the_dashboard_shows_them(finished):
    _, run = finished
    shown = views.contenders(Overview(storage_at(run)))
    stage = read_history(storage_at(run)).stages["select"]
    assert {(f["label"], f["select"]) for f in shown} == {(c.label, r.score) for c, r in stage}
    assert all(f["dev"] is not None for f in shown)
    assert shown[0]["select"] == max(f["select"] for f in shown)


@pytest.mark.whole
def test_the_winner_follows_from_the_ledger_alone(finished):
    """Worked out anew from the answers: the highest of dev and select together, then a plain merge if it leads."""
    _, run = finished
    history = read_history(storage_at(run))
    select = {r.recipe_id: r for _, r in history.stages["select"]}
    both = {c.number: sum((*r.items, *select[r.recipe_id].items)) for c, r in leaders(history.stages["search"], 6)}
    outcome = history.outcome()
    assert both[outcome.winning.number] == max(both.values())
    plain = max(outcome.finals.plain, key=lambda c: (sum((*c.dev.items, *c.select.items)), c.dev.score))
    ours = sum(select[outcome.winning.recipe.id].items)
    assert (outcome.recommended.label == "winner") == (sum(plain.select.items) <= ours)


@pytest.mark.whole
@pytest.mark.parametrize("workers", [2])
def test_any_number_of_workers_gives_the_same_finals(finished, workers, tmp_path):
    file, run = finished
    config = {**yaml.safe_load(file.read_text()), "pool": {"kind": "local", "num_workers": workers}}
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(config))
    assert toys.run_process(other, tmp_path / "results").code == 0
    again = tmp_path / "results" / "toy"
    assert toys.winner(again) == toys.winner(run)
    ours, theirs = (read_history(storage_at(r)).stages["select"] for r in (again, run))
    assert [(c.label, r.items) for c, r in ours] == [(c.label, r.items) for c, r in theirs]


@pytest.mark.whole
def test_finalists_may_be_changed_in_a_finished_run(finished, tmp_path):
    """It costs the new ones only; nothing is scored twice."""
    file, run = finished
    shutil.copytree(run, tmp_path / "results" / "toy")
    config = {**yaml.safe_load(file.read_text()), "finalists": {"count": 1}}
    one = tmp_path / "one.yaml"
    one.write_text(yaml.safe_dump(config))
    again = toys.run_here(one, tmp_path / "results")
    outcome = read_history(storage_at(again)).outcome()
    assert len(outcome.finals.searched) == 1
    assert outcome.winning.number == leaders(outcome.searched, 1)[0][0].number


@pytest.mark.whole
def test_a_run_from_before_the_finals_goes_on_without_them(make_config, tmp_path):
    file = make_config(tmp_path, toys.SHORT)
    toys.run_here(file, tmp_path / "results")
    tasks = [{"task": "toy", "dev": 12, "report": 8, "select": None}]
    config = {**yaml.safe_load(file.read_text())}
    config["evaluation"]["tasks"] = tasks
    config["budget"]["candidates"] = 5
    file.write_text(yaml.safe_dump(config))
    assert prepare(config_at(file)).tasks.items.select
    again = toys.run_here(file, tmp_path / "results")
    history = read_history(storage_at(again))
    assert "select" not in history.about.scales
    assert not history.stages["select"]
    assert len(history.stages["search"]) == 5
    assert "There are no select items" in (again / "report.md").read_text()
