"""Write results/benchmarks/pools.md: what the pools' experts are good at, and what their training took.

Run by `make pools`, behind `evolver experts` on every pool, whose tables and records it gathers.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from evolver.config.evaluation import TaskEntry
from evolver.evaluation.data import read_rows
from evolver.report.text import markdown_table
from evolver.training.experts import cache
from evolver.training.settings import PoolConfig, load_pool

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "results/benchmarks/pools.md"
HEAD = """# The pools: what their experts are good at

Each model on each task, in percent ± one standard error; in brackets the number of items, none of which, by its text,
was trained on. In bold each expert's own task. {machine}. Made by `make pools`; how, and from which data:
[configs/pools](../../configs/pools/README.md).
"""
OWN_HEADS = (
    "Each task is scored with the head of its own expert, also on the base's body, which was not trained for it. The "
    "most frequent label alone would reach {shares}."
)


def main() -> int:
    """Write the page; 2 where a pool has not been measured."""
    sections = []
    for file in sorted(HERE.glob("*.yaml")):
        pool = load_pool(file)
        table = cache() / pool.pool / "table.md"
        if not table.is_file():
            print(f"{table} is missing: run `evolver experts {os.path.relpath(file)}` first.", file=sys.stderr)
            return 2
        sections.append("\n\n".join(section(pool, table.read_text().strip())))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    PAGE.write_text(HEAD.format(machine=machine) + "\n" + "\n\n".join(sections) + "\n")
    print(f"wrote {PAGE}")
    return 0


def section(pool: PoolConfig, table: str) -> list[str]:
    """A pool's part of the page, a paragraph each."""
    parts = [f"## {pool.pool}", table]
    if pool.own_heads:
        parts.append(OWN_HEADS.format(shares=", ".join(map(most_frequent, pool.evaluation.tasks))))
    rows = [[name, *training(pool, name)] for name in pool.experts]
    return [*parts, markdown_table(["expert", "steps", "items a step", "items to draw from", "seconds"], rows)]


def training(pool: PoolConfig, name: str) -> list[str]:
    """What an expert's training took: steps, batch, items, seconds."""
    record: dict[str, Any] = json.loads((cache() / pool.pool / name / "training.json").read_text())
    settings = record["settings"]
    return [str(settings["steps"]), str(settings["batch"]), str(record["items"]), str(record["seconds"])]


def most_frequent(entry: TaskEntry) -> str:
    """What a task's metric is of always naming the most frequent label of its items."""
    assert entry.data is not None
    counts = Counter(row[entry.label] for row in read_rows(entry.data, entry.task))
    share = 100 * max(counts.values()) / counts.total() if entry.metric == "acc" else 0.0
    return f"{share:.1f} in {entry.task}"


if __name__ == "__main__":
    sys.exit(main())
