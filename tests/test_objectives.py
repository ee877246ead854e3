"""Several objectives: fronts and hypervolumes against other implementations, and a front on its way to the report."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import optuna
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from optuna._hypervolume import compute_hypervolume
from test_search import ORDERED, answer, every_search, ids, simulate
from toys import run_here

from evolver.config.reading import config_at
from evolver.dashboard import views
from evolver.dashboard.overview import Overview
from evolver.driver.prepare import prepare
from evolver.driver.weighing import best_for
from evolver.errors import BadInput
from evolver.evaluation.scores.comparison import compare
from evolver.evaluation.scores.metrics import JUDGED
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Candidate, Result
from evolver.records.objective import Objective, values_of
from evolver.records.recipe import Expert, dump_recipe
from evolver.runs.finals import on_front
from evolver.runs.history import read_history
from evolver.search.front import front, hypervolume, thinned
from evolver.storage import storage_at


def points(objectives=(2, 3, 4), most=40):
    coarse = st.integers(0, 6).map(float)  # equal values and equal points occur
    return st.sampled_from(objectives).flatmap(
        lambda k: st.integers(1, most).flatmap(lambda n: arrays(float, (n, k), elements=coarse))
    )


@given(points())
@settings(max_examples=200, deadline=None)
def test_a_front_is_that_of_all_pairs(values):
    beaten = [((values >= v).all(1) & (values > v).any(1)).any() for v in values]
    assert front(values).tolist() == np.flatnonzero(~np.asarray(beaten)).tolist()


@given(points(most=12))
@settings(max_examples=200, deadline=None)
def test_a_hypervolume_is_that_of_the_cells(values):
    """Of all cells of the grid with corners at whole numbers, those that a point dominates."""
    cells = itertools.product(range(6), repeat=values.shape[1])
    assert hypervolume(values) == pytest.approx(sum(bool((values >= np.add(c, 1)).all(1).any()) for c in cells))


@pytest.mark.parametrize("objectives", [2, 3, 5])
def test_a_hypervolume_is_that_of_optuna(objectives):
    values = np.random.default_rng(objectives).random((30, objectives))
    assert hypervolume(values) == pytest.approx(compute_hypervolume(-values, np.zeros(objectives)))
    assert hypervolume(values - 2) == 0.0


@pytest.mark.parametrize("objectives", [2, 3])
def test_the_points_that_matter_most(objectives):
    """Points are taken away one by one: each time the one without which the others dominate most."""
    values = np.random.default_rng(objectives).random((20, objectives))
    values = values[front(values)]
    scaled = (values - values.min(0)) / (values.max(0) - values.min(0)) + 1  # the volume is taken from -1 on
    kept = list(range(len(values)))
    while len(kept) > 3:
        left = {place: hypervolume(scaled[[k for k in kept if k != place]]) for place in kept}
        kept.remove(max(kept, key=lambda place: left[place]))
    assert thinned(values, 3) == kept
    assert thinned(values, 99) == list(range(len(values)))
    assert thinned(np.ones((1, 2)), 1) == [0]


def test_no_points_no_front():
    assert front([]).tolist() == []


# Objectives


def test_a_group_counts_its_tasks_by_their_shares():
    both = Objective("both", {"a": 0.75, "b": 0.25})
    assert both.of({"a": 1.0, "b": 0.2, "c": 9.0}) == pytest.approx(0.8)
    assert both.of({"a": 1.0}) is None
    assert values_of([both, Objective("c", {"c": 1.0})], {"a": 0.0, "b": 1.0, "c": 0.5}) == (0.25, 0.5)
    assert values_of([both, Objective("c", {"c": 1.0})], {"a": 0.0, "b": 1.0}) is None


@pytest.mark.parametrize(
    ("objectives", "said"),
    [
        (["toy"], "objectives: a front needs at least two objectives, and there is one"),
        ({"all": ["toy"]}, "objectives: a front needs at least two objectives, and there is one"),
        (["toy", "toys"], "objectives.toys: there is no task 'toys'; did you mean 'toy'?"),
        ({"one": [], "other": ["toy"]}, "objectives.one: names no task"),
        ({"a=b": ["toy"], "c": ["toy"]}, "'a=b' cannot be the name of an objective"),
        ({"a": ["toy", "toy"], "c": ["toy"]}, "objectives.a: a task is listed twice"),
        ("toy", "objectives"),
    ],
)
def test_objectives_that_cannot_be_used_are_refused_in_a_sentence(make_config, tmp_path, objectives, said):
    ended = toys.evolver("validate", make_config(tmp_path, {"objectives": objectives}))
    assert said in toys.refusal(ended.code, ended.err)


def test_nsga2_takes_groups_as_objectives():
    setup = every_search(ORDERED["nsga2"]).setup
    groups = (Objective("x", {"one": 0.5, "other": 0.5}), Objective("y", {"other": 1.0}))
    found = type(every_search(ORDERED["nsga2"]))(
        replace(setup, objectives=groups), every_search_settings()
    )  # fmt: skip
    asked = simulate(found)
    for trial, candidate in zip(found.study.trials, asked, strict=True):
        told = answer(candidate).tasks
        assert trial.values == [pytest.approx(0.5 * told["one"] + 0.5 * told["other"]), told["other"]]
    plain = every_search(ORDERED["nsga2"])
    assert plain.objectives == (Objective("one", {"one": 1.0}), Objective("other", {"other": 1.0}))
    assert ids(simulate(plain)) != ids(asked)
    assert optuna.study.StudyDirection.MAXIMIZE in plain.study.directions


def every_search_settings():
    from evolver.config.reading import check_section
    from evolver.search import SEARCHES

    return check_section(SEARCHES["nsga2"].settings, ORDERED["nsga2"], "f", "search.")


def pair(number, *values, **more):
    tasks = dict(zip(("a", "b"), values, strict=True))
    result = Result(number, f"{number:02}", "ok", sum(values) / 2, complete=True, items=(1.0,), tasks=tasks, **more)
    return Candidate(number, Expert(str(number), f"{number:02}"), "x"), result


AB = (Objective("a", {"a": 1.0}), Objective("b", {"b": 1.0}))


def numbers(pairs):
    return [c.number for c, _ in pairs]


def test_who_is_on_the_front():
    searched = [pair(0, 0.1, 0.9), pair(1, 0.5, 0.5), pair(2, 0.4, 0.4), pair(3, 0.9, 0.1), pair(4, 0.5, 0.5)]
    assert numbers(on_front(searched, AB, 9)) == [0, 1, 3]  # of equals the first
    assert numbers(on_front(searched, AB, 2)) == [0, 3]
    broken = [pair(5, 1.0, 1.0, violations={"0": 0.1})]
    assert numbers(on_front(searched + broken, AB, 9)) == [0, 1, 3]
    assert numbers(on_front(broken, AB, 9)) == [5]
    assert on_front([], AB, 9) == []


def test_a_part_of_a_scale_is_compared_alone():
    scale = Scale(("a", "b", "a", "b"), {"a": 1.0, "b": 3.0}, {"a": JUDGED, "b": JUDGED})
    part, places = scale.of({"b": 1.0})
    assert (part.tasks, places) == (("b", "b"), [1, 3])
    assert part.score([1.0, 0.0]) == 0.5
    right = Scale(("a", "b"), {"a": 1.0, "b": 1.0}, {"a": JUDGED, "b": JUDGED}, (3.0, 4.0)).of({"b": 1.0})[0]
    assert right.right == (4.0,)


# Whole runs


FRONTED = {
    "evaluation.tasks": [
        {"task": "toy", "dev": 16, "select": 12, "report": 20},
        {"task": "pair", "dev": 14, "select": 10, "report": 18, "weight": 2},
    ],
    "baselines.masses": [1.0],
    "search": {"algorithm": "nsga2", "population": 6},
    "budget.candidates": 12,
    "finalists": {"count": 2, "front": 3},
}


@pytest.fixture(scope="module")
def fronted(make_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fronted")
    return run_here(make_config(folder, FRONTED), folder / "results")


@pytest.mark.whole
def test_the_front_goes_to_the_finals_and_to_the_report(fronted):
    history = read_history(storage_at(fronted))
    finals, outcome = history.finals, history.outcome()
    assert [o.name for o in finals.objectives] == ["toy", "pair"]
    whole = [(c, r) for c, r in history.stages["search"] if r.score is not None]
    labels = {c.label for c in finals.searched}
    assert {f"candidate {c.number}" for c, _ in on_front(whole, finals.objectives, 3)} <= labels
    values = {c.label: finals.values(c) for c in finals.searched}
    on = {c.label for c in finals.front}
    for label, own in values.items():
        beaten = any(all(np.greater_equal(o, own)) and o != own for o in values.values())
        assert beaten == (label not in on)
    assert {f.label for f in outcome.front} == on
    assert all(f.report.score is not None for f in outcome.front)
    text = (fronted / "report.md").read_text().split("## The front")[1].split("\n## ")[0]
    expert, scale = outcome.best_expert, outcome.scales["report"]
    for point in outcome.front:
        (line,) = [row for row in text.splitlines() if row.startswith(f"| {point.label} ")]
        for objective in finals.objectives:
            part, places = scale.of(objective.shares)
            ours, theirs = ([r.items[p] for p in places] for r in (point.report, expert.report))
            found = compare(ours, theirs, part, outcome.config.seed)
            assert f"{100 * found.difference:+.1f} (p = {found.p:.3g})" in line
            assert f"{100 * point.report.tasks[objective.name]:.1f}" in line
    summary = json.loads((fronted / "summary.json").read_text())
    assert [f"candidate {p['candidate']}" for p in summary["front"]] == [c.label for c in finals.front]
    shown = views.pareto(Overview(storage_at(fronted)))
    assert shown["tasks"] == ["toy", "pair"]


@pytest.mark.whole
def test_the_same_front_again(fronted, make_config, tmp_path):
    file = make_config(tmp_path, FRONTED)
    before = (fronted / "report.md").read_text()
    run_here(file, fronted.parent, toys.no_work)
    assert (fronted / "report.md").read_text() == before


@pytest.mark.whole
def test_the_best_for_some_weights(fronted, tmp_path):
    history = read_history(storage_at(fronted))
    finals = history.finals
    for said, weights in {"toy=1": (1, 0), "pair=2": (0, 2), "toy=2, pair=1": (2, 1)}.items():
        worth = {c.candidate.number: float(np.dot(weights, finals.values(c))) for c in finals.front}
        assert worth[best_for(history, said).number] == max(worth.values())
    ended = toys.evolver("export", fronted, tmp_path / "one", "--weights", "toy=1")
    assert ended.code == 0, ended.err
    number = best_for(history, "toy=1").number
    assert f"candidate {number} is the best on the front for these weights" in ended.out
    recipe = next(c.recipe for c, _ in history.stages["search"] if c.number == number)
    assert (tmp_path / "one" / "recipe.json").read_text() == dump_recipe(recipe)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("weights", "said"),
    [("toys=1", "there is no objective 'toys'; did you mean 'toy'?"), ("toy=x", "'x' is not a weight"),
     ("toy=-1", "'-1' is not a weight"), ("toy", "'toy' is no name with a weight"), ("toy=0", "all weights are 0"),
     ("toy=1,toy=2", "toy has two weights"), ("", "is no name with a weight")],
)  # fmt: skip
def test_weights_that_are_none_are_refused_in_a_sentence(fronted, tmp_path, weights, said):
    ended = toys.evolver("export", fronted, tmp_path / "x", "--weights", weights)
    assert said in toys.refusal(ended.code, ended.err)
    assert not (tmp_path / "x").exists()


@pytest.mark.whole
def test_a_run_with_the_score_alone_has_nothing_to_weigh(make_config, tmp_path):
    folder = run_here(make_config(tmp_path, toys.SHORT), tmp_path / "results")
    with pytest.raises(BadInput, match="this run has no objectives"):
        best_for(read_history(storage_at(folder)), "toy=1")
    assert "## The front" not in (folder / "report.md").read_text()
    both = toys.evolver("export", folder, tmp_path / "x", "--weights", "toy=1", "--candidate", "1")
    assert "give one of these options" in toys.refusal(both.code, both.err)


@pytest.mark.whole
def test_objectives_of_groups_after_any_search(make_config, tmp_path):
    groups = {"objectives": {"both": ["toy", "pair"], "other": ["pair"]}, "budget.candidates": 6}
    changes = FRONTED | groups | {"search": {"algorithm": "tpe", "startup": 4}}
    file = make_config(tmp_path, changes)
    found = prepare(config_at(file)).objectives
    assert found[0] == Objective("both", {"toy": pytest.approx(1 / 3), "pair": pytest.approx(2 / 3)})
    folder = run_here(file, tmp_path / "results")
    history = read_history(storage_at(folder))
    assert history.about.objectives == found
    for contender in history.finals.front:
        assert history.finals.values(contender)[0] == pytest.approx(history.finals.score(contender, "both"))
    toys.refused(
        lambda: run_here(make_config(tmp_path, changes | {"objectives": {}}), tmp_path / "results"), "objectives"
    )
