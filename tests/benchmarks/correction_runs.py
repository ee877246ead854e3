"""Runs the demo's search with other seeds and notes raw, corrected and report score of each winner.

``python tests/benchmarks/correction_runs.py [--runs 30]``; models and data are those of ``make demo``. Without select
items the winner is the best candidate on the dev items, so its report score says by how much the dev score was too
high. It writes ``results/tables/correction.csv``, from which ``selection.py`` makes a section. Runs that are done are
not done again.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "configs" / "common")]

from packages import cache_folder  # noqa: E402

from evolver.report.report import finished  # noqa: E402
from evolver.storage import storage_at  # noqa: E402

FILE = ROOT / "results" / "tables" / "correction.csv"
COLUMNS = ("seed", "raw", "corrected", "report", "others_dev", "others_report")


def main() -> None:
    """Run what is missing, and write the file."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--runs", type=int, default=30)
    asked = given.parse_args()
    folder = cache_folder() / "tables" / "correction"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(1, asked.runs + 1):
        run = folder / "results" / f"demo-{seed}"
        if not (run / "summary.json").exists():
            file = folder / f"demo-{seed}.yaml"
            file.write_text(yaml.safe_dump(config(seed), sort_keys=False))
            subprocess.run([sys.executable, "-m", "evolver", "run", str(file)], cwd=folder, check=True)
        rows.append(figures(seed, run))
        with FILE.open("w", newline="") as out:
            writer = csv.DictWriter(out, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


def config(seed: int) -> dict[str, Any]:
    """The demo's configuration with another seed, other dev items, half as many report items, and no select items."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    found |= {"run": f"demo-{seed}", "seed": seed}
    found["model"]["compute"] = "bfloat16"
    found["experts"] = {name: str(ROOT / place) for name, place in found["experts"].items()}
    found["evaluation"]["threads"] = 1
    for task in found["evaluation"]["tasks"]:
        task["select"], task["report"] = 0, 400
        del task["select_data"]
    return found


def figures(seed: int, run: Path) -> dict[str, Any]:
    """A run's row; the others are the models of the report that no search has chosen."""
    claims = json.loads((run / "summary.json").read_text())
    *others, winner = finished(storage_at(run)).outcome.finalists
    scores = {split: fmean(float(getattr(o, split).score) for o in others) for split in ("dev", "report")}
    return {
        "seed": seed, "raw": claims["best_dev"], "corrected": claims["corrected_dev"], "report": winner.report.score,
        "others_dev": scores["dev"], "others_report": scores["report"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
