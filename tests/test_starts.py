"""Models that a search begins with: where they come from, what they cost, and what searches make of them."""

from __future__ import annotations

import json

import pytest
import toys
import yaml
from test_search import BASE, EXPERTS, build
from toys import rows, run_here

from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.records import Candidate, Result
from evolver.records.recipe import Cross, Merge, Rule, dump_recipe, load_recipe

TPE = {"algorithm": "tpe", "startup": 3}
ES = {"algorithm": "evolution_strategy", "population": 2, "sigma": 0.05}


def search_rows(folder):
    return [
        r for (stage, _), r in sorted(rows(folder).items(), key=lambda pair: pair[1]["number"]) if stage == "search"
    ]


@pytest.mark.whole
@pytest.mark.parametrize("search", [TPE, {"algorithm": "evolver", "generations": 9}, {"algorithm": "cmaes"}, ES])
def test_baselines_come_first_and_cost_nothing(make_config, tmp_path, search):
    changes = {"start": ["experts", "average", "masses"], "search": search, "budget.candidates": 9}
    folder = run_here(make_config(tmp_path, changes), tmp_path / "results")
    found = search_rows(folder)
    assert [r["number"] for r in found] == list(range(9))
    words = ["experts"] * 3 + ["average"] + ["masses"] * 2
    assert [r["proposer"] for r in found[:6]] == [f"start ({word})" for word in words]
    assert all(r["reused"] for r in found[:6])
    labels = {r["recipe_id"]: r["label"] for (stage, _), r in rows(folder).items() if stage == "baseline"}
    assert [labels[r["recipe_id"]] for r in found[:6]] == [
        "a", "b", "c", "average", "task_arithmetic@0.5", "task_arithmetic@1",
    ]  # fmt: skip
    again = run_here(make_config(tmp_path, changes), tmp_path / "results")
    assert search_rows(again) == found


@pytest.mark.whole
def test_recipes_runs_and_mergekit_files(make_config, tmp_path, models):
    first = run_here(make_config(tmp_path, {"run": "first", "search": TPE}), tmp_path / "results")
    merge = {
        "merge_method": "ties", "base_model": str(models / "base"), "parameters": {"density": 0.5},
        "models": [{"model": str(models / n), "parameters": {"weight": 0.4}} for n in "ab"],
    }  # fmt: skip
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(merge))
    starts = [{"run": str(first)}, {"recipe": str(first / "recipe.json")}, {"mergekit": str(tmp_path / "merge.yml")}]
    changes = {"run": "second", "start": starts, "search": TPE, "budget.candidates": 4}
    second = run_here(make_config(tmp_path, changes), tmp_path / "results")
    won, ties, *_ = search_rows(second)
    assert won["recipe"] == toys.winner(first)
    recipe = load_recipe(ties["recipe"])
    assert isinstance(recipe, Merge)
    assert (recipe.method, [i.name for i in recipe.inputs]) == ("ties", ["a", "b"])
    assert not ties["reused"]


def told(search, recipe, score):
    result = Result(0, recipe.id, "ok", score, score, True, (score,) * 10)
    search.inform([(Candidate(0, recipe, "start"), result)])


@pytest.mark.parametrize("settings", [TPE, {"algorithm": "cmaes", "sigma": 0.02}])
def test_a_sampler_begins_where_the_start_is(settings):
    """Far from the middle of the space: with a mass of 0.25."""
    search, plain = build(settings, candidates=30), build(settings, candidates=30)
    point = plain.space.encode_equal(1.0) | {"lambda": 0.25}
    told(search, search.space.decode(point), 0.9)
    masses = []
    for one in (search, plain):
        found = []
        while asked := one.ask(1):
            value = next(v for rule in asked[0].recipe.rules for k, v in rule.values if k == "lambda")
            found.append(value)
            one.tell(Result(asked[0].number, asked[0].recipe.id, "ok", 0.5 - value / 100, 0.5, True, (0.5,) * 10))
        masses.append(found[1:8])
    assert sum(masses[0]) < sum(masses[1])


def test_evolver_takes_a_start_into_its_population():
    search = build({"algorithm": "evolver", "generations": 3}, candidates=30)
    start = Merge("simple", EXPERTS[:4], BASE)
    told(search, start, 0.9)
    assert search.ask(1)[0].recipe == start


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (
            ["expert"],
            r"start: 'expert' is no model to start with; write experts, .*, clusters, .*, greedy, or a mapping with",
        ),
        ([{"recipe": "/nowhere/recipe.json"}], r"start\[0\]\.recipe: /nowhere/recipe.json cannot be read as a recipe"),
        ([{"run": "/nowhere"}], r"start\[0\]\.run: /nowhere/recipe.json cannot be read"),
        ([{"run": "x", "recipe": "y"}], r"start: .* exactly one of the keys recipe, run, mergekit"),
        (["experts", "average", "masses"], r"start: 6 models are named, which count among the 6 candidates"),
    ],
)
def test_what_is_no_start_is_refused(make_config, tmp_path, start, said):
    file = make_config(tmp_path, {"start": start, "budget.candidates": 6})
    with pytest.raises(BadInput, match=said):
        prepare(config_at(file))


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        (Merge("tyes", EXPERTS[:2], BASE), "unknown merge method 'tyes'; did you mean 'ties'"),
        (Merge("ties", EXPERTS[:2], BASE, (Rule.of({"densty": 0.5}),)), "ties has no setting 'densty'; .* 'density'"),
        (Merge("ties", EXPERTS[:2], BASE, (Rule.of({"density": 0.0}),)), "density: 0.0 is not usable; .* above 0"),
        (Merge("ties", EXPERTS[:2], BASE, (Rule.of({"weight": (1.0,) * 3}),)), "weight: 3 numbers for 2 experts"),
        (Merge("nearswap", EXPERTS[:1], BASE), "nearswap has no default for t; write it in a rule"),
        (Merge("fisher", EXPERTS[:2], BASE), "fisher of 2 models needs 2 statistics, and the recipe names 0"),
    ],
)
def test_a_misspelt_recipe_is_refused_when_it_is_read(make_config, tmp_path, merge, said):
    file = tmp_path / "recipe.json"
    file.write_text(dump_recipe(Cross(merge, (EXPERTS[0],), "evolver", 0.5, 0.5, 1)))  # also below another node
    config = make_config(tmp_path, {"start": [{"recipe": str(file)}]})
    with pytest.raises(BadInput, match=rf"start\[0\]\.recipe: {file}.*{said}"):
        prepare(config_at(config))


def test_a_start_of_other_experts_is_refused(make_config, tmp_path):
    strange = Cross(EXPERTS[0], (EXPERTS[1],), "evolver", 0.5, 0.5, 1)
    (tmp_path / "recipe.json").write_text(dump_recipe(strange))
    file = make_config(tmp_path, {"start": [{"recipe": str(tmp_path / "recipe.json")}]})
    with pytest.raises(BadInput, match=r"start\[0\]\.recipe: the model was made of other experts"):
        prepare(config_at(file), weights=True)


def test_a_mergekit_file_of_other_models_is_refused(make_config, tmp_path, models):
    other = {"merge_method": "linear", "models": [{"model": "elsewhere", "parameters": {"weight": 1}}]}
    (tmp_path / "merge.yml").write_text(json.dumps(other))
    file = make_config(tmp_path, {"start": [{"mergekit": str(tmp_path / "merge.yml")}]})
    with pytest.raises(BadInput, match=r"start\[0\]\.mergekit: .* merges elsewhere, which is neither the base"):
        prepare(config_at(file))


def test_rules_of_a_recipe_are_kept():
    recipe = Merge("task_arithmetic", EXPERTS[:2], BASE, (Rule.of({"lambda": 0.5}),))
    assert load_recipe(dump_recipe(recipe)) == recipe
