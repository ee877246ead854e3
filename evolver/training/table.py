"""What the base and the experts of a pool are good at: every model on every task, on items kept for reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from evolver.config import Budget, Config, Model
from evolver.evaluation.scoring import Scale
from evolver.evaluation.tasks import load_tasks
from evolver.records import Candidate, Expert, Result
from evolver.report import markdown_table
from evolver.training.settings import PoolConfig
from evolver.worker import Plan, Worker, items_hash, open_models


def measure(pool: PoolConfig, folders: Mapping[str, Path]) -> str:
    """A Markdown table: the metric of each task in percent ± one standard error, the experts' own tasks in bold.

    Raises BadInput for tasks that cannot be loaded.
    """
    own = pool.kind == "classifier" and pool.labels is None
    model = Model(base=str(folders["base"]), kind=pool.kind, heads="apart" if own else "merged")
    config = Config(
        run=pool.pool, seed=pool.seed, model=model,
        experts={n: str(folders[n]) for n in pool.experts}, search={"algorithm": "none"},
        budget=Budget(candidates=1), evaluation=pool.evaluation,
    )  # fmt: skip
    opened, tasks = open_models(config), load_tasks(config)
    plan = Plan(config, opened.digests(), {s: items_hash(tasks, s) for s in ("dev", "report")})
    worker = Worker(plan, "report", tasks=tasks)
    rows = []
    for number, name in enumerate(("base", *pool.experts)):
        recipe = Expert(name, plan.digests[name])
        result = worker.evaluate(Candidate(number, recipe, "pool", stage="report"))
        rows.append([name, *_cells(name, result, worker.scale)])
    return markdown_table(["model", *_headlines(worker.scale)], rows)


def _headlines(scale: Scale) -> list[str]:
    return [f"{task} ({len(places)})" for task, places in _in_order(scale)]


def _cells(name: str, result: Result, scale: Scale) -> list[str]:
    if result.status == "failed":
        return [f"failed: {result.reason}"] * len(scale.weights)
    return [_cell(name, task, result.tasks[task], len(places)) for task, places in _in_order(scale)]


def _in_order(scale: Scale) -> list[tuple[str, Sequence[int]]]:
    return [(task, scale.places[task]) for task in scale.weights]


def _cell(name: str, task: str, value: float, items: int) -> str:
    error = math.sqrt(max(0.0, value * (1 - value)) / items)
    text = f"{100 * value:.1f} ± {100 * error:.1f}"
    return f"**{text}**" if task == name or task.endswith(f"_{name}") else text
