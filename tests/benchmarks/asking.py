"""What a search costs the driver: seconds of one core to propose a candidate and to learn its result.

``python tests/benchmarks/asking.py``. The results are made up, of 600 items each; models are not built. Every search is
asked and told one candidate at a time until it has seen 10, 100 and 1,000, with a population of as many members where
it has one, and then timed over the following ones.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "configs" / "common"), str(ROOT / "tests" / "benchmarks")]

from digits import Items  # noqa: E402
from packages import cache_folder  # noqa: E402

from evolver.config import Budget  # noqa: E402
from evolver.config.reading import check_section  # noqa: E402
from evolver.merging.maker import RecipeMaker  # noqa: E402
from evolver.records import Candidate, Result  # noqa: E402
from evolver.report.text import markdown_table  # noqa: E402
from evolver.search import SEARCHES  # noqa: E402
from evolver.search.base import Search, Setup  # noqa: E402

KEPT = cache_folder() / "searches" / "asking.json"
ITEMS, TIMED, SIZES, FOREVER = 600, 40, (10, 100, 1000), 10**6
MOST_SECONDS = 300
TASKS = ("one", "two", "three", "four")
MERGER = {"method": "task_arithmetic", "lambda": 1.5, "weight": 0.25}
# The sizes of a population stand for the text "size".
ASKED: dict[str, dict[str, Any]] = {
    "random": {"algorithm": "random"},
    "qmc": {"algorithm": "qmc"},
    "tpe": {"algorithm": "tpe"},
    "tpe, 3 groups": {"algorithm": "tpe", "layer_groups": 3},
    "gp": {"algorithm": "gp"},
    "cmaes": {"algorithm": "cmaes", "population": "size"},
    "cmaes, a layer each": {"algorithm": "cmaes", "layer_groups": "per-layer"},
    "nsga2": {"algorithm": "nsga2", "population": "size"},
    "nsga3": {"algorithm": "nsga3", "population": "size"},
    "evolver": {"algorithm": "evolver", "population": "size", "generations": FOREVER},
    "evolver, merger": {
        "algorithm": "evolver", "population": "size", "generations": FOREVER, "merger": MERGER, "mode": "generational",
    },
    "shade": {"algorithm": "shade", "population": "size", "generations": FOREVER},
    "m2n2": {"algorithm": "m2n2", "archive": "size"},
    "pso": {"algorithm": "pso", "particles": "size", "steps": FOREVER},
    "ga": {"algorithm": "ga", "population": "size", "generations": FOREVER},
    "cycleqd": {"algorithm": "cycleqd", "steps": FOREVER},
    "map": {"algorithm": "map", "samples": "size"},
    "layers": {"algorithm": "layers"},
    "portfolio": {"algorithm": "portfolio"},
}  # fmt: skip


def setup_of(size: int) -> Setup:
    """Four experts of twelve layers, with as many tensors as BERT."""
    parts = [f"{p}.{kind}" for p in ("query", "key", "value", "output", "norm", "up", "down", "last") for kind in "wb"]
    tensors = ["embeddings.word", *(f"encoder.layer.{i}.{part}" for i in range(12) for part in parts)]
    maker = RecipeMaker(["a", "b", "c", "d"], tensors)
    return Setup(
        maker.experts, maker.base, 0, Budget(candidates=size + TIMED), maker, Items(ITEMS), early_stopping=False,
        tasks=TASKS,
    )  # fmt: skip


def milliseconds(settings: dict[str, Any], size: int) -> float | None:
    """Of one candidate after ``size`` of them; None where the search ends before, or takes minutes to come so far."""
    found = SEARCHES[settings["algorithm"]]
    given = {key: size if value == "size" else value for key, value in settings.items()}
    given = {k: v for k, v in given.items() if k in found.settings.model_fields}
    search: Search = found.build(setup_of(size), check_section(found.settings, given, "asking", "search."))
    draw, spent, seen, began = random.Random(0), [], 0, time.process_time()
    while not search.done and seen < size + TIMED and time.process_time() - began < MOST_SECONDS:
        start = time.process_time()
        candidates = search.ask(1)
        asked = time.process_time() - start
        if not candidates:
            break
        result = _result(candidates[0], draw)
        start = time.process_time()
        search.tell(result)
        seen += 1
        if seen > size:
            spent.append(asked + time.process_time() - start)
    return 1000 * float(np.mean(spent)) if len(spent) == TIMED else None


def _result(candidate: Candidate, draw: random.Random) -> Result:
    items = tuple(float(draw.random() < 0.5) for _ in range(ITEMS))
    score = sum(items) / ITEMS
    return Result(candidate.number, candidate.recipe.id, "ok", score, score, True, items, dict.fromkeys(TASKS, score))


def main() -> None:
    """Measure what is missing."""
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    for size in SIZES:
        for name, settings in ASKED.items():
            done = json.loads(KEPT.read_text()) if KEPT.exists() else {}
            if str(size) not in done.get(name, {}):
                found = milliseconds(settings, size)
                done.setdefault(name, {})[str(size)] = found
                KEPT.write_text(json.dumps(done))
                print(f"{name}, {size}: {found}", flush=True)
    print(section())


def section() -> str:
    """The section of the page."""
    done = json.loads(KEPT.read_text())
    rows = [
        [name, *(f"{at[str(n)]:.2f}" if at.get(str(n)) is not None else "–" for n in SIZES)]
        for name, at in done.items()
    ]
    return f"{HEAD}\n\n{markdown_table(['search', *(f'{n:,}' for n in SIZES)], rows)}\n"


HEAD = """\
## What a search costs the driver

Milliseconds of one core that a search takes to propose a candidate and to learn its result of 600 items, after 10,
100 and 1,000 candidates, and with a population of as many members where it has one: means over the 40 candidates
that follow. A dash: the search ends before, or takes more than five minutes to come so far. Four experts of twelve
layers."""


if __name__ == "__main__":
    main()
