"""Whole runs in this process, from a configuration to a report."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import toys
from safetensors.torch import load_file, save_file
from toys import no_work, rows, run_here

from evolver import ledger
from evolver.commands.explain import explain
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare, run_folder
from evolver.errors import BadInput
from evolver.records import Candidate, Result
from evolver.records.canonical import content_hash
from evolver.records.recipe import Merge, load_recipe
from evolver.storage import storage_at
from evolver.workers.worker import Worker

pytestmark = pytest.mark.whole

FILES = {
    "config.yaml",
    "identity.json",
    "items.parquet",
    "ledger",
    "best",
    "best.json",
    "recipe.json",
    "report.md",
    "summary.json",
    "report.html",
    "about.json",
    "curve.png",
    "examples.json",
    "ended.json",
    "clock.json",
}


@pytest.fixture(scope="module")
def done(make_config, tmp_path_factory):
    """A finished run: configuration, results folder, run folder. Tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("done")
    file = make_config(folder)
    return file, folder / "results", run_here(file, folder / "results")


@pytest.fixture
def copied(done, make_config, tmp_path):
    """A copy of the finished run, free to be changed."""
    shutil.copytree(done[1], tmp_path / "results")
    return make_config(tmp_path), tmp_path / "results", tmp_path / "results" / "toy"


def test_leaves_everything_that_was_promised(done):
    folder = done[2]
    assert {p.name for p in folder.iterdir()} == FILES
    assert (folder / "config.yaml").read_text() == done[0].read_text()
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    best = {p.name for p in (folder / "best").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "recipe.json", "README.md"} <= best
    assert (folder / "best" / "recipe.json").read_text() == toys.winner(folder)


def test_ledger_holds_every_stage_once(done):
    found = rows(done[2])
    counts = {stage: sum(s == stage for s, _ in found) for stage in ("baseline", "search", "report")}
    assert counts == {"baseline": 7, "search": 9, "report": 7}
    assert all(row["status"] == "ok" for row in found.values())


def test_winner_is_the_best_of_the_search(done):
    searched = [r for r in rows(done[2]).values() if r["stage"] == "search" and r["score"] is not None]
    best = max(searched, key=lambda r: (r["score"], -r["number"]))
    assert best["recipe"] == toys.winner(done[2])
    assert json.loads((done[2] / "best.json").read_text()) == {"items": 40, "equal": 40}
    assert best["recipe_id"] in (done[2] / "report.md").read_text()


def test_known_recipes_cost_nothing(done):
    found = rows(done[2])
    for number in range(3):  # the search starts from the experts, which the baselines have scored
        assert found["search", number]["reused"]
        assert found["search", number]["items"] == found["baseline", 1 + number]["items"]
    assert not any(r["reused"] for (stage, _), r in found.items() if stage == "report")


def test_dev_and_report_items_are_disjoint(done):
    items = prepare(config_at(done[0])).tasks.items
    dev, report = ({i.hash for i in split} for split in (items.dev, items.report))
    assert (len(dev), len(report), len(dev & report)) == (40, 30, 0)


def test_second_call_evaluates_nothing_and_says_the_same(copied):
    file, results, folder = copied
    before = {n: (folder / n).read_text() for n in ("report.md", "recipe.json", "best.json")}
    asked = len(toys.all_rows(folder, "asked"))
    run_here(file, results, no_work)
    assert {n: (folder / n).read_text() for n in before} == before
    assert len(toys.all_rows(folder, "asked")) == asked


FRESH = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer
best, tasks, chosen = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
lm = HFLM(AutoModelForCausalLM.from_pretrained(best), tokenizer=AutoTokenizer.from_pretrained(best), batch_size=1)
manager = TaskManager(include_path=tasks, include_defaults=False)
out = simple_evaluate(lm, tasks=["toy"], samples={"toy": chosen}, task_manager=manager, bootstrap_iters=0)
print(json.dumps(out["results"]["toy"]["acc,none"]))
"""


def test_best_scores_the_same_for_anybody(done, tasks):
    folder = done[2]
    chosen = json.dumps(sorted(i.index for i in prepare(config_at(done[0])).tasks.items.dev))
    command = [sys.executable, "-c", FRESH, str(folder / "best"), str(tasks), chosen]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    recorded = max(r["score"] for r in rows(folder).values() if r["stage"] == "search" and r["score"] is not None)
    assert json.loads(ended.stdout.splitlines()[-1]) == pytest.approx(recorded, abs=1e-12)


def test_raising_the_budget_goes_on(copied, make_config, tmp_path):
    _, results, folder = copied
    before = toys.essence(folder)
    more = make_config(tmp_path, {"budget.candidates": 12})
    run_here(more, results)
    after = toys.essence(folder)
    assert sum(stage == "search" for stage, _ in after) == 12
    kept = {key for key in before if key[0] != "report"}
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    once = run_here(make_config(tmp_path, {"budget.candidates": 12}), tmp_path / "once")
    assert toys.winner(once) == toys.winner(folder)


def test_a_raised_budget_may_change_the_winner(make_config, tmp_path):
    first = run_here(make_config(tmp_path, {"budget.candidates": 3}), tmp_path / "results")
    old = toys.winner(first)
    assert "evolver/initial" in (first / "report.md").read_text()
    run_here(make_config(tmp_path, {"budget.candidates": 9}), tmp_path / "results")
    assert toys.winner(first) != old
    assert toys.winner(first) == (first / "best" / "recipe.json").read_text()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 2}, "seed: 1 → 2"),
        ({"search.F": 0.7}, "search.F: 0.5 → 0.7"),
        ({"evaluation.tasks": [{"task": "toy", "dev": 41, "report": 30}]}, "evaluation.tasks"),
        ({"evaluation.early_stopping": False}, "evaluation.early_stopping"),
    ],
)
def test_another_configuration_is_refused(done, make_config, tmp_path, changes, key):
    file = make_config(tmp_path, changes)
    with pytest.raises(BadInput) as refused:
        run_here(file, done[1], no_work)
    assert key in str(refused.value)
    assert "another run name" in str(refused.value)


def test_free_keys_do_not_make_another_run(copied, make_config, tmp_path):
    before = prepare(config_at(make_config(tmp_path))).identity
    file = make_config(tmp_path, {"pool": {"cache_gb": 0.5, "timeout_s": 9.0}})
    assert prepare(config_at(file)).identity == before
    recorded = rows(copied[2])
    assert rows(run_here(file, copied[1], no_work)) == recorded != {}


def test_an_expert_that_changed_on_disk_is_refused(copied, make_config, models, tmp_path):
    moved = shutil.copytree(models / "a", tmp_path / "a")
    file = make_config(tmp_path, {"experts.a": str(moved)})
    run_here(file, copied[1], no_work)  # elsewhere, but the same weights
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    stat = (moved / "model.safetensors").stat()
    os.utime(moved / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    with pytest.raises(BadInput, match=r"experts\.a: other weights"):
        run_here(file, copied[1], no_work)


SEARCHES = {
    "generational": {"search.mode": "generational"},
    "with merger": {"search.merger": {"method": "ties", "density": 0.5}},
    "best/1, more experts": {"search.strategy": "best/1", "experts.lora": "LORA"},
    "tpe": {"search": {"algorithm": "tpe", "startup": 3, "in_flight": 2}},
    "cmaes": {"search": {"algorithm": "cmaes", "layer_groups": 2}},
    "layers": {"search": {"algorithm": "layers", "genome": "dataflow", "protect": 0, "repeats": 2}},
    "halving": {
        "search": {"algorithm": "halving", "of": {"algorithm": "tpe", "startup": 3}, "first": 8, "eta": 2, "batch": 2},
    },
    "racing": {"evaluation.racing": 0.1},
    "dare_ties": {"search": {"algorithm": "tpe", "method": "dare_ties", "tune": ["density", "lambda"]}},
    "two tasks": {
        "evaluation.tasks": [
            {"task": "toy", "dev": 20, "report": 20, "metric": "acc_norm"},
            {"task": "pair", "dev": 20, "report": 20, "weight": 2.0},
        ]
    },
    "soup": {"search": {"algorithm": "soup", "rounds": 2}},
    "m2n2": {"search": {"algorithm": "m2n2"}},
    "pso": {"search": {"algorithm": "pso"}},
    "model swarms": {"search": {"algorithm": "pso", "rule": "model-swarms", "particles": 4}},
    "map": {"search": {"algorithm": "map", "samples": 4, "batch": 2}},
    "ga": {"search": {"algorithm": "ga", "population": 4}},
    "cycleqd": {
        "search": {"algorithm": "cycleqd"},
        "evaluation.tasks": [{"task": "toy", "dev": 20, "report": 20}, {"task": "pair", "dev": 20, "report": 20}],
    },
    "budget of items": {"budget": {"items": 120}},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_runs_to_its_report(make_config, models, tmp_path, name):
    changes = {k: str(models / "lora") if v == "LORA" else v for k, v in SEARCHES[name].items()}
    file = make_config(tmp_path, changes)
    folder = run_here(file, tmp_path / "results")
    assert {p.name for p in folder.iterdir()} == FILES
    found = rows(folder)
    assert not [r["reason"] for r in found.values() if r["status"] != "ok"]
    searched = [r for r in found.values() if r["stage"] == "search" and r["score"] is not None]
    assert len({r["recipe_id"] for r in searched}) > 3
    best = max(searched, key=lambda r: (r["score"], -r["number"]))
    assert best["recipe"] == toys.winner(folder)
    agreement = json.loads((folder / "best.json").read_text())
    assert agreement["equal"] == agreement["items"] == 40


@pytest.mark.parametrize("mode", ["sequential", "generational"])
def test_early_stopping_decides_the_same(make_config, tmp_path, mode):
    found = {}
    for early in (True, False):
        changes = {"search.mode": mode, "evaluation.early_stopping": early, "evaluation.block_items": 4}
        changes["budget.candidates"] = 12
        folder = run_here(make_config(tmp_path, changes), tmp_path / f"{early}")
        found[early] = ({k: r["recipe_id"] for k, r in rows(folder).items()}, toys.winner(folder))
        scored = [len(r["items"]) for r in rows(folder).values() if r["stage"] == "search"]
        assert (min(scored) < 40) == early
    assert found[True] == found[False]


@pytest.mark.parametrize(
    ("search", "early", "blocks"),
    [
        ({"algorithm": "evolver"}, True, [8, 8, 8, 8, 8]),
        ({"algorithm": "evolver"}, False, [8, 8, 8, 8, 8]),  # the same batches, so that bfloat16 decides the same
        ({"algorithm": "halving", "of": {"algorithm": "cmaes"}, "first": 8}, True, [8, 8, 8, 8, 8]),
        ({"algorithm": "cmaes"}, True, [40]),
    ],
)
def test_items_are_scored_at_once_where_no_answer_comes_earlier(make_config, tmp_path, search, early, blocks):
    prepared = prepare(config_at(make_config(tmp_path, {"search": search, "evaluation.early_stopping": early})))
    for split, expected in (("dev", blocks), ("report", [len(prepared.tasks.items.report)])):
        worker = Worker(prepared.plan, split, tasks=prepared.tasks)
        worker.scorer = Mock(wraps=worker.scorer)
        assert worker.evaluate(Candidate(0, prepared.experts[0], "test")).complete
        assert [len(places) for (places,), _ in worker.scorer.score_at.call_args_list] == expected


def test_a_run_from_before_a_key_is_one_in_which_it_has_its_default(make_config, tmp_path):
    ready = prepare(config_at(make_config(tmp_path)))
    for keys in (("evaluation", "early_stopping"), ("evaluation", "tasks", 0, "judge"), ("search", "Cr")):
        old = copy.deepcopy(dict(ready.identity))
        section = functools.reduce(lambda found, key: found[key], keys[:-1], old)
        assert keys[-1] in section
        del section[keys[-1]]
        run = storage_at(tmp_path / "-".join(map(str, keys)))
        run.write("identity.json", json.dumps(old).encode())
        assert run_folder(ready, run).owner == content_hash(old)
        section[keys[-1]] = "another"
        run.write("identity.json", json.dumps(old).encode())
        with contextlib.closing(ledger.Ledger(run.folder("ledger"), "owner")) as open_ledger:
            candidate = Candidate(0, ready.base, "nobody")
            open_ledger.write_result(candidate, Result.failed(candidate, "tried"))
        with pytest.raises(BadInput, match=f"{keys[-1]}: 'another' → "):
            run_folder(ready, run)


def test_explain_says_how_the_winner_was_made(done, tmp_path):
    folder = done[2]
    recipe = load_recipe((folder / "recipe.json").read_text())
    found = explain(folder)
    assert [name for name, _, _ in found] == recipe.names([name for name, _, _ in found])
    assert {how for _, how, _ in found} == {recipe.label if isinstance(recipe, Merge) else recipe.describe()}
    exported = folder / "best"
    if (exported / "mergekit_config.yml").exists():
        assert explain(exported) == explain(exported / "mergekit_config.yml")
    with pytest.raises(BadInput, match="the folder does not say how its model was made"):
        explain(tmp_path)


def test_explain_shows_what_a_search_tunes_and_what_it_leaves(make_config, tmp_path):
    search = {
        "algorithm": "tpe", "method": "ties", "tune": ["lambda", "weight"],
        "settings": {"density": {"a": [0.2, 0.4], "b": 0.6}},
    }  # fmt: skip
    file = make_config(tmp_path, {"search": search})
    rows = {name: values for name, _, values in explain(file)}
    first, last = (next(v for n, v in rows.items() if f".layers.{k}." in n) for k in (0, 1))
    assert first["lambda"] == first["weight"] == "tuned"
    assert first["density"][:2] == (0.2, 0.6)
    assert last["density"][:2] == (0.4, 0.6)
    alone = make_config(tmp_path, {"search": {"algorithm": "evolver"}})
    with pytest.raises(BadInput, match="evolver has no merge method of its own"):
        explain(alone)


def test_every_answer_can_be_read_with_its_item(make_config, tmp_path):
    file = make_config(tmp_path, {"evaluation.early_stopping": False})
    folder = run_here(file, tmp_path / "results")
    items = prepare(config_at(file)).tasks.items
    table = ledger.answer_table(storage_at(folder)).to_pylist()
    winner = [r for r in rows(folder).values() if r["recipe"] == toys.winner(folder) and r["stage"] == "report"]
    found = [r for r in table if r["stage"] == "report" and r["number"] == winner[0]["number"]]
    assert [r["hash"] for r in found] == [i.hash for i in items.report]
    assert [r["answer"] for r in found] == winner[0]["items"]
    assert {r["task"] for r in table} == {"toy"}
