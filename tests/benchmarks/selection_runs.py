"""Runs the searches of which the published tables of answers are made: ``python tests/benchmarks/selection_runs.py``.

``emotion-l3`` needs the pool of that name (``make pools``), ``smollm2`` the models of ``make demo-llm``. A search that
was stopped goes on when the script is called again. ``selection_tables.py`` beside it then makes a table of the runs.

Every search scores each model on all dev items, and all searches of a pool share their items. Models compute in
bfloat16, which takes a third of the time of float32 here: what is compared is how to choose among answers, and not how
good the models are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "configs" / "common")]

from packages import cache_folder  # noqa: E402

Search = dict[str, Any]
NEVER = 10**6
TASK_ARITHMETIC: Search = {"method": "task_arithmetic", "layer_groups": 3}
RANDOM: Search = {"algorithm": "tpe", "startup": NEVER}
# Of each pool, the searches with the number of their candidates. Two streams of each can run side by side.
SEARCHES: dict[str, dict[str, tuple[Search, int]]] = {
    "emotion-l3": {
        "random": (RANDOM | TASK_ARITHMETIC, 600),
        "cmaes": ({"algorithm": "cmaes"} | TASK_ARITHMETIC, 400),
        "random-ties": (RANDOM | {"method": "ties"}, 400),
        "evolver": ({"algorithm": "evolver", "merger": {"method": "task_arithmetic", "lambda": 1.5, "weight": 0.25},
                     "mode": "generational", "generations": NEVER}, 300),
        "tpe-ties": ({"algorithm": "tpe", "method": "ties", "layer_groups": 3}, 200),
        "evolution": ({"algorithm": "evolver", "strategy": "rand/1", "mode": "generational",
                       "merger": {"method": "task_arithmetic", "lambda": 1.5, "weight": 0.25},
                       "generations": NEVER}, 150),
    },
    "smollm2": {
        "random": (RANDOM | TASK_ARITHMETIC, 100),
        "cmaes": ({"algorithm": "cmaes"} | TASK_ARITHMETIC, 60),
        "evolver": ({"algorithm": "evolver", "merger": {"method": "task_arithmetic", "lambda": 3.0, "weight": 0.25},
                     "mode": "generational", "generations": NEVER}, 60),
    },
}  # fmt: skip
DEV_ITEMS = {"emotion-l3": 1000, "smollm2": 150}


def main() -> None:
    """Run the searches of one pool, one after another."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("pool", choices=SEARCHES)
    given.add_argument("--only", nargs="+", metavar="SEARCH", help="these searches alone")
    given.add_argument("--folder", type=Path, help="where the runs are kept; default: $EVOLVER_CACHE/tables/POOL")
    asked = given.parse_args()
    folder = asked.folder or cache_folder() / "tables" / asked.pool
    folder.mkdir(parents=True, exist_ok=True)
    for name in asked.only or SEARCHES[asked.pool]:
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config(asked.pool, name), sort_keys=False))
        subprocess.run([sys.executable, "-m", "evolver", "run", str(file)], cwd=folder, check=True)


def config(pool: str, name: str) -> dict[str, Any]:
    """The configuration of a search of a pool."""
    search, candidates = SEARCHES[pool][name]
    model, experts, evaluation = {"emotion-l3": _emotion, "smollm2": _smollm2}[pool](DEV_ITEMS[pool])
    return {
        "run": f"{pool}-{name}",
        "seed": 0,
        "model": model | {"compute": "bfloat16"},
        "experts": experts,
        "search": search,
        "budget": {"candidates": candidates},
        "baselines": {"masses": [1.0, 2.0]},
        "evaluation": evaluation | {"threads": 1, "early_stopping": False},
    }


def _emotion(items: int) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    pool, data = cache_folder() / "experts/emotion-l3", cache_folder() / "pools/data/emotion"
    names = ("tec", "crowdflower", "isear", "dailydialog")
    tasks = [
        {"task": n, "data": str(data / n / "test.jsonl"), "dev": items, "select": 0, "report": 50} for n in names
    ]  # fmt: skip
    return {"base": str(pool / "base"), "kind": "classifier"}, {n: str(pool / n) for n in names}, {"tasks": tasks}


def _smollm2(items: int) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    demo, experts = cache_folder() / "demo-llm", ROOT / "configs/demo-llm/experts"
    names = ("commonsense", "science", "maths", "sentiment")
    tasks = [{"task": f"demo_{n}", "dev": items, "select": 0, "report": 25} for n in names]
    tasks[1]["metric"] = "acc_norm"
    evaluation = {"include_path": str(demo / "tasks"), "tasks": tasks}
    return {"base": str(demo / "base")}, {n: str(experts / n) for n in names}, evaluation


if __name__ == "__main__":
    main()
