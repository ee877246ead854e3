"""Hi-Merging: its table against a slow reference, how it resolves conflicts, and whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import toys
from test_classification import classify  # noqa: F401  # a fixture
from test_descent import configured  # noqa: F401  # a fixture
from test_search import build, simulate
from toys import run_here

from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.records import Result
from evolver.records.recipe import Merge, dump_recipe
from evolver.runs.history import read_history
from evolver.storage import storage_at

PLAIN = {"algorithm": "hi_merging", "tune": "none"}
LAYERS = 4
# What layer ℓ of expert a (first) and b brings to the task "one" (first) and to "other", at the scale 1.
EFFECTS = [
    [(0.10, -0.02), (0.03, 0.05)],  # both help their own task more than the mean: a has more for all
    [(0.02, 0.02), (0.00, 0.00)],  # nobody is in anybody's way
    [(0.04, 0.00), (0.01, 0.01)],  # a alone
    [(0.00, 0.01), (0.06, 0.07)],  # b alone
]


def shares_of(recipe, layer):
    """(scale, density) of every expert in a layer."""
    if not isinstance(recipe, Merge):
        return [(0.0, 1.0)] * 2
    values = recipe.settings(f"model.layers.{layer}.w", layer)
    assert (recipe.method, values["gamma"]) == ("breadcrumbs", (0.0, 0.0))
    return list(zip(values["weight"], values["density"], strict=True))


def scores(recipe):
    """The scores of both tasks: the sum of effects, and what layers 0 and 2 of a merge bring together."""
    shares = [shares_of(recipe, layer) for layer in range(LAYERS)]
    out = []
    for task in range(2):
        own = sum(EFFECTS[n][e][task] * shares[n][e][0] for n in range(LAYERS) for e in range(2))
        out.append(0.3 + own + 0.02 * shares[0][0][0] * shares[2][1][0])
    return out


def reply(candidate, _=False):
    one, other = scores(candidate.recipe)
    mean = (one + other) / 2
    tasks = {"one": one, "other": other}
    return Result(candidate.number, candidate.recipe.id, "ok", mean, mean, True, (mean,) * 10, tasks)


def searched(settings, answer=reply, candidates=300):
    search = build(settings, experts=2, candidates=candidates)
    return search, simulate(search, 3, 1, reply=answer)


def test_the_table_is_that_of_the_formula():
    """Scores of models that are put together here, by hand, for every layer and expert."""

    def score(on, task):
        """Of the model with these (layer, expert) alone."""
        own = sum(EFFECTS[n][e][task] for n, e in on) + 0.02 * ({(0, 0), (2, 1)} <= on)
        return 0.3 + own

    def mean(on):
        return (score(on, 0) + score(on, 1)) / 2

    every = {(n, e) for n in range(LAYERS) for e in range(2)}
    search, _ = searched({**PLAIN, "alpha": 0.7, "beta": 0.2})
    for (layer, expert), found in search.table().items():
        cell = {(layer, expert)}
        own = 0.7 * (score(every, expert) - score(every - cell, expert))
        own += 0.2 * (score(cell, expert) - score(set(), expert))
        merged = 0.7 * (mean(every) - mean(every - cell)) + 0.2 * (mean(cell) - mean(set()))
        assert (found.own, found.merged) == pytest.approx((own, merged), abs=1e-12)
        assert found.conflict == pytest.approx(own - merged, abs=1e-12)


def test_conflicts_are_resolved_layer_by_layer():
    search, asked = searched({**PLAIN, "density": 0.8, "scale": 0.6})
    assert len(asked) == 2 + 2 * 2 * LAYERS + 1
    found = asked[-1].recipe
    whole = (0.6, 0.8)
    assert shares_of(found, 0) == [whole, (0.0, 0.8)]  # a contributes more, so b gives way
    assert shares_of(found, 1) == [whole, whole]
    assert shares_of(found, 2) == [(0.3, 0.4), whole]  # a alone is halved, in its scale and in its density
    assert shares_of(found, 3) == [whole, (0.3, 0.4)]
    assert [r.place.layers for r in found.rules] == [None, (0, 1), (2, 3), (3, 4)]
    assert search.merged().rules == found.rules[:1]


def test_only_better_ones_are_kept_if_that_is_asked_for():
    """Here every halving costs score, and so does leaving b out of layer 0."""
    search, asked = searched({**PLAIN, "keep": "better"})
    assert len(asked) == 2 + 2 * 2 * LAYERS + LAYERS
    assert not search.cells
    worse = {(0, 1)}  # with b out of layer 0 the score rises in this world

    def harmed(candidate, _=False):
        told = reply(candidate)
        harm = 0.3 * sum(shares_of(candidate.recipe, n)[e][0] for n, e in worse)
        return Result(told.number, told.recipe_id, "ok", told.score - harm, None, True, told.items, told.tasks)

    search, asked = searched({**PLAIN, "keep": "better"}, harmed)
    assert set(search.cells) == {(0, 1)}
    # By Σ max(γ, 0), which is half of what the own task has more than the other one: 0.07, 0.02, 0.005, 0.
    assert asked[-LAYERS].recipe.rules[1].place.layers == (0, 1)


@pytest.mark.parametrize(("tune", "count"), [("separate", 19), ("joint", 100)])
def test_each_expert_is_tuned_on_its_own_tasks(tune, count):
    """A world in which a is best at scale 0.4 and density 0.3, b at 0.9 and 1."""
    wanted = [(0.4, 0.3), (0.9, 1.0)]

    def answer(candidate, _=False):
        told = [0.0, 0.0]
        for e, (scale, density) in enumerate(shares_of(candidate.recipe, 0)):
            if scale:
                told[e] = 1 - abs(scale - wanted[e][0]) - abs(density - wanted[e][1])
        mean = sum(told) / 2
        tasks = dict(zip(("one", "other"), told, strict=True))
        return Result(candidate.number, candidate.recipe.id, "ok", mean, mean, True, (mean,) * 10, tasks)

    search, asked = searched({"algorithm": "hi_merging", "tune": tune}, answer)
    assert len(asked) == 2 * count + 2 + 2 * 2 * LAYERS + 1
    assert [(s.scale, s.density) for s in search.shares] == wanted
    assert search.merged({}).rules == asked[2 * count + 1].recipe.rules
    assert {c.proposer for c in asked} == {
        "hi_merging/tuning", "hi_merging/whole", "hi_merging/ablation", "hi_merging",
    }  # fmt: skip


def test_what_failed_contributes_nothing():
    def answer(candidate, _=False):
        failing = candidate.proposer == "hi_merging/ablation"
        return Result.failed(candidate, "boom") if failing else reply(candidate)

    search, asked = searched(PLAIN, answer)
    assert all(c.own == c.merged == 0 for c in search.table().values())
    assert asked[-1].recipe.id == search.merged().id


def test_a_budget_that_ends_too_early_is_told():
    search = build({"algorithm": "hi_merging"}, experts=2, candidates=30)
    assert "57 candidates are needed" in search.remarks[0]
    assert not build({"algorithm": "hi_merging"}, experts=2, candidates=57).remarks


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({**PLAIN, "alpha": 0, "beta": 0}, "search.alpha: alpha and beta are both 0"),
        ({"algorithm": "hi_merging", "scale": 0.5}, "search.tune: the density and the scale are tuned"),
        ({**PLAIN, "density": 0}, "search.density"),
        ({**PLAIN, "keep": "best"}, "search.keep"),
    ],
)
def test_bad_settings_are_refused(settings, said):
    toys.refused(lambda: build(settings, experts=2), said)


def test_experts_without_tasks_of_their_own_are_refused(configured):  # noqa: F811
    every = {"statistics": {"tasks": {"a": ["a", "b"], "b": ["b", "a"]}}}
    toys.refused(
        lambda: prepare(config_at(configured(PLAIN, **every))), "search.algorithm: hi_merging compares",
        "statistics.tasks",
    )  # fmt: skip


@pytest.mark.whole
def test_a_run_that_is_killed_finds_the_same_merge(configured, tmp_path):  # noqa: F811
    file = configured({**PLAIN, "mass": 0.5, "keep": "better"}, budget={"candidates": 99})
    whole = run_here(file, tmp_path / "straight")
    straight, stages = Path(whole, "recipe.json").read_text(), read_history(storage_at(whole)).stages["search"]
    assert len(stages) == 2 + 2 * 2 * 2 + 2
    assert all(r.complete for _, r in stages)
    folder = run_here(file, tmp_path / "killed")
    toys.cut_short(folder)
    again = run_here(file, tmp_path / "killed")
    assert Path(again, "recipe.json").read_text() == straight
    twice = read_history(storage_at(again)).stages["search"]
    assert [dump_recipe(c.recipe) for c, _ in twice] == [dump_recipe(c.recipe) for c, _ in stages]
