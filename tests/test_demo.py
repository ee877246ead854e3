"""The demo's own path on its real model and data, shortened: what ``make demo`` does, with few items and candidates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from evolver.records import load_recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture
def environment():
    """The user's own cache, which holds the base and the data once they have been fetched; no hub."""
    kept = {k: v for k, v in os.environ.items() if k not in {"EVOLVER_CACHE", "OMP_WAIT_POLICY"}}
    return {**kept, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def call(environment, *arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=420)


def test_the_demo_in_short(tmp_path, environment):
    prepared = call(environment, "configs/demo/prepare.py")
    assert prepared.returncode == 0, prepared.stderr
    raw = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    raw["budget"], raw["baselines"] = {"candidates": 3}, {"masses": [3.0]}
    raw["evaluation"]["tasks"] = [{**t, "dev": 4, "report": 4} for t in raw["evaluation"]["tasks"]]
    config = tmp_path / "demo.yaml"
    config.write_text(yaml.safe_dump(raw))

    done = call(environment, "evolve.py", config, "--results", tmp_path)

    assert done.returncode == 0, done.stderr
    run = tmp_path / "demo"
    report = (run / "report.md").read_text()
    assert "mprovement: the winner" in report
    assert all(f"| {name} |" in report for name in ("base", *raw["experts"], "average", "task_arithmetic@3"))
    assert json.loads((run / "best.json").read_text()) == {"items": 16, "equal": 16}
    recipe = load_recipe((run / "recipe.json").read_text())
    assert recipe.method == "task_arithmetic"
