"""The language model's demo on its real model and data, shortened: what ``make demo-llm`` does, with few items."""

import json

import pytest
import yaml
from test_demo import ROOT, call

from evolver.records.recipe import load_recipe


@pytest.mark.slow
def test_the_demo_in_short(tmp_path):
    prepared = call("configs/demo-llm/prepare_llm.py")
    assert prepared.returncode == 0, prepared.stderr
    raw = yaml.safe_load((ROOT / "configs/demo-llm.yaml").read_text())
    raw["budget"], raw["baselines"] = {"candidates": 3}, {"masses": [3.0]}
    raw["evaluation"]["tasks"] = [{**t, "dev": 4, "report": 4} for t in raw["evaluation"]["tasks"]]
    config = tmp_path / "demo-llm.yaml"
    config.write_text(yaml.safe_dump(raw))

    done = call("evolve.py", config, "--results", tmp_path)

    assert done.returncode == 0, done.stderr
    run = tmp_path / "demo-llm"
    report = (run / "report.md").read_text()
    assert "mprovement: the winner" in report
    assert all(f"| {name} |" in report for name in ("base", *raw["experts"], "average", "task_arithmetic@3"))
    assert json.loads((run / "best.json").read_text()) == {"items": 16, "equal": 16}
    recipe = load_recipe((run / "recipe.json").read_text())
    assert recipe.method == "task_arithmetic"
