"""The commands around a run, as a user calls them: from its folder alone, wherever it lies."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toys
import yaml
from playwright.sync_api import Error, sync_playwright
from safetensors.torch import load_file

from evolver.config.reading import config_at
from evolver.report.verdict import verdict
from evolver.runs.history import read_history
from evolver.search import SEARCHES
from evolver.storage import storage_at

pytestmark = pytest.mark.whole

CHANGES = {"budget.candidates": 12, "search.generations": 9}


def process(*arguments, cwd=toys.ROOT):
    call = "import sys; sys.path.insert(0, sys.argv.pop(1)); from evolver.commands.cli import main; main()"
    command = [sys.executable, "-c", call, str(toys.ROOT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def evolver(*arguments):
    done = toys.evolver(*arguments)
    return subprocess.CompletedProcess(arguments, done.code, done.out, done.err)


@pytest.fixture(scope="module")
def file(make_config, tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("config"), CHANGES)


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    """The folder of a finished run."""
    return toys.run_here(file, tmp_path_factory.mktemp("results"))


def test_run_is_the_main_job(file, run, tmp_path):
    done = process("run", file, "--results", tmp_path, "--run", "again")
    assert (done.returncode, done.stderr) == (0, "")
    assert toys.essence(tmp_path / "again") == toys.essence(run)


def test_a_run_goes_on_from_its_folder_with_another_budget(file, tmp_path):
    folder = toys.run_here(file, tmp_path)
    done = evolver("resume", folder, "--candidates", 20)
    assert (done.returncode, done.stderr) == (0, "")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["budget"]["candidates"] == 20
    assert len([k for k in toys.rows(folder) if k[0] == "search"]) == 20
    assert json.loads(evolver("status", tmp_path, "--json").stdout)[0]["spent"][0] == 20


def test_what_is_wrong_with_a_run_is_said_of_its_own_file(file, tmp_path):
    folder = toys.run_here(file, tmp_path)
    config = folder / "config.yaml"
    config.write_text(config.read_text() + "serach: {}\n")
    done = evolver("resume", folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{config}: serach: unknown key; did you mean 'search'?\n"


def test_what_is_no_run_cannot_go_on(tmp_path):
    for command in ("resume", "report"):
        done = evolver(command, tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert (
            done.stderr
            == f"{tmp_path}: there is no run in this folder; give the folder of a run, such as results/demo.\n"
        )


def test_a_configuration_is_checked_without_reading_weights(file, monkeypatch, tmp_path):
    done = process("validate", file, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"{file}: 3 experts, 40 dev, 0 select and 30 report items, 12 candidates: ready to run\n"
        "A set of items can show a difference between two models if a paired test (two-sided, at 5 %) finds it with a "
        "probability of 80 %.\n"
        "The 30 report items can show a difference of 28.0 points between models that score differently on 30 % of "
        "them; for 1 point (`worthwhile`) it would take 7,849, 15,698 or 23,547 items (on 10, 20 or 30 %).\n"
        "model.compute: auto is float32 on this machine: the weights are float32\n"
    )
    assert list(tmp_path.iterdir()) == []
    broken = yaml.safe_load(file.read_text()) | {"sead": 1}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    done = evolver("validate", tmp_path / "broken.yaml")
    assert done.returncode == 2
    assert "sead: unknown key" in done.stderr


def test_validate_opens_headers_only(file, monkeypatch):
    from evolver.checkpoints.weights import Checkpoint
    from evolver.driver.prepare import prepare

    def refuse(self):
        raise AssertionError("weights are read")

    monkeypatch.setattr(Checkpoint, "digest", refuse)
    assert prepare(config_at(file), weights=False).search.total == 12


def test_status_of_all_runs(run):
    done = evolver("status", run.parent)
    assert done.returncode == 0
    assert re.search(r"toy.*done.*evolver.*12 of 12", done.stdout)
    (found,) = json.loads(evolver("status", run.parent, "--json").stdout)
    outcome = read_history(storage_at(run)).outcome()
    assert found["best"] == outcome.winner.dev.score
    assert found["verdict"] == verdict(outcome)
    assert found["holder"] == ""


def test_a_report_is_written_again_from_the_folder_alone(run, tmp_path):
    done = evolver("report", run, "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "report.md").read_text() == (run / "report.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)  # it needs no network, and no file beside it
    assert "data:image/png;base64," in page
    assert done.stdout.splitlines()[0].split("(")[0] in page.replace("&amp;", "&")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "candidates.csv").read_text())))
    assert len(rows) == len(toys.rows(run))
    for row in rows:
        recorded = toys.rows(run)[row["stage"], int(row["number"])]
        assert row["recipe_id"] == recorded["recipe_id"]
        assert row["score"] == ("" if recorded["score"] is None else str(recorded["score"]))


def test_the_best_model_is_taken_along(run, tmp_path):
    done = evolver("export", run, tmp_path / "best")
    assert (done.returncode, done.stderr) == (0, "")
    assert "gives the answers in the ledger on 40 of 40 dev items" in done.stdout
    one, two = (load_file(f / "model.safetensors") for f in (run / "best", tmp_path / "best"))
    assert one.keys() == two.keys()
    assert all(one[n].equal(two[n]) for n in one)
    assert (tmp_path / "best" / "README.md").read_text() == (run / "best" / "README.md").read_text()


def test_any_candidate_is_taken_along_by_number_or_recipe(run, tmp_path):
    recipe = toys.rows(run)["search", 5]["recipe_id"]
    for n, name in enumerate(("5", recipe[:12])):
        done = evolver("export", run, tmp_path / str(n), "--candidate", name)
        assert (done.returncode, done.stderr) == (0, "")
    one, two = (load_file(tmp_path / str(n) / "model.safetensors") for n in range(2))
    assert all(one[n].equal(two[n]) for n in one)
    done = evolver("export", run, tmp_path / "x", "--candidate", "zz")
    assert done.returncode == 2
    assert "no candidate of this run matches 'zz'" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_candidate_that_did_not_win_has_a_card_that_says_so(run, tmp_path):
    best = read_history(storage_at(run)).best[0].recipe.id
    number, recorded = next((n, row) for (stage, n), row in sorted(toys.rows(run).items())
                            if stage == "search" and row["recipe_id"] != best)  # fmt: skip
    assert evolver("export", run, tmp_path / "other", "--candidate", number).returncode == 0
    card = (tmp_path / "other" / "README.md").read_text()
    (result,) = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    assert result["dataset"]["name"] == f"toy, {len(recorded['items'])} dev items"
    assert result["metrics"][0]["value"] == dict(recorded["tasks"])["toy"]
    assert f"Candidate {number} of a run" in card
    assert "mergekit" in card


def logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8, 9]])).logits


def test_a_lora_of_all_energy_is_the_model_and_a_smaller_one_is_near(run, models, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    full = logits(AutoModelForCausalLM.from_pretrained(run / "best"))
    held = {}
    for name, given in {"all": ["--energy", 1], "most": ["--energy", 0.9], "some": ["--lora", 8]}.items():
        done = evolver("export", run, tmp_path / name, *given)
        assert (done.returncode, done.stderr) == (0, "")
        held[name] = float(re.search(r"holds ([\d.]+) %", done.stdout)[1])
        base = AutoModelForCausalLM.from_pretrained(models / "base")
        distance = (logits(PeftModel.from_pretrained(base, tmp_path / name)) - full).abs().max()
        if name == "all":
            assert distance < 1e-3
    assert held["all"] == 100.0
    assert 90 <= held["most"] < 100
    assert 0 < held["some"] < 90
    done = evolver("export", run, tmp_path / "x", "--energy", 2)
    assert (done.returncode, done.stdout) == (2, "")


def test_a_delta_and_the_base_are_the_model(run, models, tmp_path):
    done = evolver("export", run, tmp_path / "delta", "--delta")
    assert (done.returncode, done.stderr) == (0, "")
    delta = load_file(tmp_path / "delta" / "delta.safetensors")
    base, best = (load_file(f / "model.safetensors") for f in (models / "base", run / "best"))
    for name, tensor in best.items():
        assert (base[name] + delta.get(name, 0)).allclose(tensor, rtol=0, atol=1e-6)


def test_models_are_scored_as_in_the_final(run, file, models):
    done = evolver("evaluate", file, run / "best", models / "a")
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads((run / "summary.json").read_text())
    best, a = done.stdout.splitlines()[2:]
    assert f"| {run / 'best'} | {100 * summary['report']['winner']:.1f} |" in best
    assert f"| {models / 'a'} | {100 * summary['report']['a']:.1f} |" in a
    done = evolver("evaluate", file, run / "best", "--dev")
    assert f"| {100 * summary['winner']['dev']:.1f} |" in done.stdout
    assert evolver("evaluate", file, run / "gone").returncode == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer_config.json", '{"model": null}', ["neither a first nor a last token"]),
        ("config.json", '{"model_type": "llama", "attention_bias": null}', ["config.json", "attention_bias"]),
    ],
)
def test_a_model_that_cannot_be_scored_is_refused(file, models, tmp_path, name, text, words):
    odd = shutil.copytree(models / "a", tmp_path / "odd")
    (odd / name).write_text(text)
    ended = toys.evolver("evaluate", file, models / "b", odd)
    said = toys.refusal(ended.code, ended.err)
    assert said.startswith(f"{file}: evolver evaluate {odd}: ")
    assert all(word in said for word in words), said


def test_models_are_scored_in_the_batches_of_a_run(file, run, monkeypatch):
    """In bfloat16 other batches would give other scores."""
    from evolver.evaluation.tasks import SplitScorer

    asked, score = [], SplitScorer.score_at
    monkeypatch.setattr(SplitScorer, "score_at", lambda self, places: asked.append(places) or score(self, places))
    assert evolver("evaluate", file, run / "best", "--dev").returncode == 0
    assert asked == [set(range(start, start + 8)) for start in range(0, 40, 8)]  # block_items


@pytest.fixture(scope="module")
def tuned(make_config, tmp_path_factory):
    """The folder of a finished coefficient search over two tasks, and its study."""
    folder = tmp_path_factory.mktemp("tuned")
    tasks = [{"task": "toy", "dev": 20, "report": 10}, {"task": "pair", "dev": 20, "report": 10}]
    search = {"algorithm": "tpe", "startup": 4, "layer_groups": 2}
    changes = {"search": search, "budget.candidates": 10, "evaluation.tasks": tasks}
    run = toys.run_here(make_config(folder, changes), folder)
    done = evolver("study", run, folder / "study.db")
    assert (done.returncode, done.stderr) == (0, "")
    return run, f"sqlite:///{folder / 'study.db'}"


def test_a_coefficient_search_is_a_study_of_optuna_s(tuned, run, tmp_path):
    import optuna

    study = optuna.load_study(study_name="toy", storage=tuned[1])
    rows = [row for (stage, _), row in sorted(toys.rows(tuned[0]).items()) if stage == "search"]
    assert [t.value for t in study.trials] == [row["score"] for row in rows]
    assert [t.user_attrs["recipe"] for t in study.trials] == [row["recipe_id"] for row in rows]
    assert study.best_value == read_history(storage_at(tuned[0])).best[1].score
    assert any("lambda" in name for name in study.best_params)
    assert set(optuna.importance.get_param_importances(study)) == set(study.best_params)
    by_task = optuna.load_study(study_name="toy, by task", storage=tuned[1])
    assert by_task.metric_names == ["toy", "pair"]
    assert [dict(zip(("toy", "pair"), t.values, strict=True)) for t in by_task.trials] == [
        dict(row["tasks"]) for row in rows
    ]
    refused = evolver("study", run, tmp_path / "other.db")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "only runs of the searches tpe, gp, cmaes, nsga2, nsga3, random, qmc and grid" in refused.stderr


def test_optuna_s_dashboard_shows_the_study(tuned):
    path, port = toys.chromium(), str(toys.free_port())
    command = [str(Path(sys.executable).with_name("optuna-dashboard")), tuned[1], "--port", port]
    served = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with sync_playwright() as playwright:
            page = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]).new_page()
            began = time.monotonic()
            while True:
                try:
                    page.goto(f"http://127.0.0.1:{port}/dashboard/studies/1")
                    break
                except Error:
                    assert time.monotonic() - began < 600
                    time.sleep(0.5)
            page.wait_for_selector("text=Best Trial")
            page.wait_for_selector("text=lambda@outside")  # the importances are there
            page.goto(f"http://127.0.0.1:{port}/dashboard/studies/2")
            page.wait_for_selector("text=Pareto Front")
            page.wait_for_selector("text=Objective Values")
    finally:
        served.terminate()
        served.wait(30)


def test_searches_are_listed():
    said = evolver("searches").stdout
    assert all(name in said for name in SEARCHES)
    assert "in_flight" in evolver("searches", "tpe").stdout
    assert evolver("searches", "tpa").stderr.startswith("evolver searches: unknown search 'tpa'; did you mean 'tpe'?")


def test_the_doctor_says_what_there_is():
    done = process("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    for what in ("torch", "memory", "accelerator", "compiler", "cache", "cluster"):
        assert what in done.stdout
