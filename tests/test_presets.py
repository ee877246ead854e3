"""Presets: what each of them sets, that whatever a user writes counts before it, and that each of them runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toys
import yaml
from test_search import build, simulate
from toys import DROP, rows, run_here

from evolver.commands.reference import presets_page
from evolver.config.presets import expanded, presets
from evolver.config.reading import config_at
from evolver.driver.early import chosen_search, named_search
from evolver.errors import BadInput

GOLDEN = Path(__file__).parent / "oracles" / "presets.json"
EVERY = pytest.mark.parametrize("name", presets())
# What a short run on a toy needs beside the preset: fewer items or candidates than a paper's.
PAIR = {"experts.c": DROP}
SMALL = {
    "merge3": PAIR | {"search.population": 4, "search.knots": 2, "evaluation.estimate": {"items": 8}},
    "evo-merging": {"search.sparsity": 5, "search.population": 4},
    "gptailor": {"search.first": 8, "search.batch": 3, "search.of": {"remove": 1, "protect": 0}},
    "cycleqd": {"evaluation.tasks": [{"task": t, "dev": 16, "report": 8} for t in ("toy", "pair")]},
    "m2n2": {"search.warmup": 2},
    "map": {"search.samples": 5},
    "adamms": PAIR | {"search.items": 8},
    "model-glue": {"search.population": 4},
    "rmm": {"search.population": 3, "evaluation.estimate": {"items": 8}},
}
CANDIDATES = {"adamms": 9}


def written(search, **more):
    return expanded({"search": search, **more}, "run.yaml")


def test_what_presets_set_is_what_was_checked_against_the_papers():
    """A change of a preset is a change of what a published name means: it has to be made here, too."""
    assert {name: preset.keys for name, preset in presets().items()} == json.loads(GOLDEN.read_text())


@EVERY
def test_a_preset_is_a_configuration(make_config, tmp_path, name):
    """With every key known, and no section that is not a configuration's."""
    config = config_at(make_config(tmp_path, {"search": {"preset": name}})).parsed()
    algorithm, settings = chosen_search(config, "run.yaml")
    assert algorithm == presets()[name].sets["search"]["algorithm"]
    for key, value in presets()[name].sets["search"].items():
        kept = getattr(settings, key)
        assert (kept.items() >= value.items()) if isinstance(kept, dict) and "by" not in kept else True
    assert "preset" not in config.search


@EVERY
def test_a_preset_is_a_search_that_ends(name):
    """On made-up scores."""
    search = written({"preset": name})["search"]
    if name == "merge3":
        search |= {"method": "ties", "tune": ["density"], "knots": 4}
    search |= {"target": "a", "source": "b"} if name == "adamms" else {}
    search |= {"first": 3} if name == "gptailor" else {}
    assert len({c.recipe.id for c in simulate(build(search, candidates=9))}) >= 7


@pytest.mark.whole
@EVERY
def test_a_preset_runs(make_config, tmp_path, name):
    more = {f"{key}": value for key, value in SMALL.get(name, {}).items()}
    candidates = {"budget.candidates": CANDIDATES.get(name, 7)}
    folder = run_here(
        make_config(tmp_path, {"search": {"preset": name}} | candidates | more), tmp_path / "results"
    )  # fmt: skip
    found = [r for (stage, _), r in rows(folder).items() if stage == "search"]
    assert len(found) >= 7
    assert {r["status"] for r in found} == {"ok"}
    assert (folder / "report.md").exists()


def test_what_the_user_writes_counts_first():
    given = written(
        {"preset": "merge3", "population": 9, "tune": None}, evaluation={"estimate": {"items": 7}}, budget={"items": 99}
    )  # fmt: skip
    assert (given["search"]["population"], given["search"]["steps"]) == (9, 10)
    assert "tune" not in given["search"]
    assert given["evaluation"]["estimate"] == {"items": 7, "kind": "mp-irt"}
    assert given["budget"] == {"items": 99}
    assert "estimate" not in written({"preset": "merge3"}, evaluation={"estimate": None})["evaluation"]
    assert written({"preset": "merge3"})["budget"] == {"candidates": 175}


def test_another_method_takes_the_whole_place_of_the_preset_s():
    merger = {"method": "ties", "density": 0.3}
    assert written({"preset": "evolver-merger", "merger": merger})["search"]["merger"] == merger
    inner = written({"preset": "gptailor", "of": {"remove": 2, "by": {"algorithm": "random"}}})["search"]["of"]
    assert inner == {"algorithm": "layers", "genome": "prune", "protect": 1, "remove": 2, "by": {"algorithm": "random"}}


def test_what_is_read_is_not_changed():
    before = {name: preset.keys for name, preset in presets().items()}
    given = {"preset": "gptailor", "of": {"remove": 2}}
    written(given)["search"]["of"]["remove"] = 3
    assert given == {"preset": "gptailor", "of": {"remove": 2}}
    assert {name: preset.keys for name, preset in presets().items()} == before


def test_a_preset_can_be_an_arm_if_it_is_a_search_only():
    arms = {"swarm": {"preset": "pso-merging", "particles": 9}, "random": {"algorithm": "random"}}
    found = written({"algorithm": "portfolio", "arms": arms})["search"]["arms"]
    assert found["swarm"] == {**presets()["pso-merging"].sets["search"], "particles": 9}
    assert found["random"] == {"algorithm": "random"}
    toys.refused(
        lambda: written({"algorithm": "portfolio", "arms": arms | {"swarm": {"preset": "merge3"}}}),
        "run.yaml: search.arms.swarm.preset: merge3 also sets evaluation", "write algorithm: genetic",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"preset": "merge4"}, "search.preset: there is no preset 'merge4'; did you mean 'merge3'"),
        ({"preset": 3}, "search.preset: there is no preset 3"),
        ({"algorithm": "merge3"}, "search.algorithm: merge3 is a preset; write preset: merge3"),
        ({"preset": "merge3", "populations": 3}, "search.populations: unknown key; did you mean 'population'"),
        ({"preset": "gptailor", "of": 3}, "search.of: 3 is not usable"),
        ({"algorithm": "halving", "of": {"preset": "x"}}, "search.of.preset: there is no preset 'x'"),
    ],
)
def test_what_cannot_be_meant_is_refused(make_config, tmp_path, search, said):
    file = make_config(tmp_path, {"search": search})
    toys.refused(lambda: chosen_search(config_at(file).parsed(), str(file)), said, file)
    done = toys.evolver("validate", str(file))
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def test_an_error_of_a_key_that_a_preset_has_set_says_so(make_config, tmp_path):
    changes = PAIR | {"search": {"preset": "merge3"}, "evaluation.estimate": {"items": 8}}
    said = "search.knots: a spline of 5 knots through 2 layers; write a number from 2 to 2"
    file = make_config(tmp_path, changes)
    assert toys.evolver("validate", str(file)).err == f"{file}: {said} (the preset merge3 sets search.knots).\n"
    own = make_config(tmp_path, changes | {"search": {"preset": "merge3", "knots": 5}})
    assert toys.evolver("validate", str(own)).err == f"{own}: {said}.\n"


def test_validate_and_explain_say_what_was_set(make_config, tmp_path):
    changes = PAIR | {"search": {"preset": "merge3", "knots": 2}, "evaluation.estimate": {"items": 8}}
    file = make_config(tmp_path, changes)
    done = toys.evolver("validate", str(file))
    assert done.code == 0, done.err
    assert "search.preset: merge3 is MERGE³ (Mencattini" in done.out
    assert "  evaluation.estimate.kind: mp-irt\n" in done.out
    assert "search.knots" not in done.out
    assert "budget" not in done.out
    explained = toys.evolver("explain", str(file))
    assert "  search.method: slerp\n" in explained.err
    assert "slerp  t=tuned" in explained.out


def test_a_budget_that_a_preset_sets_can_be_raised(make_config, tmp_path):
    text = config_at(make_config(tmp_path, {"search": {"preset": "adamms"}, "budget": DROP}))
    assert text.parsed().budget.limits == {"candidates": 9}
    toys.refused(
        config_at(make_config(tmp_path, {"search": {"preset": "map"}, "budget": DROP})).parsed, "budget: this key is mi"
    )  # fmt: skip


def test_presets_are_listed_with_their_papers():
    done = toys.evolver("searches")
    for name, preset in presets().items():
        assert f"│ {name} " in done.out
        assert preset.paper.split(",")[0].split('"')[0][:12] in done.out
    one = toys.evolver("searches", "rmm")
    assert "search.algorithm: policy" in one.out
    assert "merge3" not in one.out
    assert toys.evolver("searches", "merge4").code == 2


def test_the_page_is_current():
    assert (toys.ROOT / "docs/presets.md").read_text() == presets_page(), "run: make docs"


@EVERY
def test_every_preset_says_what_it_is(name):
    preset = presets()[name]
    assert len(preset.published) >= 1
    assert len(preset.differs) >= 1
    assert "arXiv" in preset.paper
    assert yaml.safe_load(yaml.safe_dump(preset.keys)) == preset.keys
    assert set(preset.sets) <= {"search", "budget", "evaluation", "start"}


def test_another_algorithm_takes_what_fits():
    found = written({"preset": "merge3", "algorithm": "tpe", "population": None, "steps": None})["search"]
    assert named_search(found, "f", "search.")[0] == "tpe"
    with pytest.raises(BadInput, match="population: unknown key"):
        named_search(written({"preset": "merge3", "algorithm": "tpe", "steps": None})["search"], "f", "search.")
