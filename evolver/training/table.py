"""What the base and the experts of a pool are good at: every model on every task, on items kept for reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evolver.evaluation.scores.scoring import Scale
from evolver.evaluation.tasks import load_tasks
from evolver.records import SPLITS, Candidate, ItemAnswer, Result
from evolver.records.recipe import Expert
from evolver.report.text import markdown_table
from evolver.training.settings import PoolConfig
from evolver.workers.opened import open_models
from evolver.workers.plan import Plan, items_hash
from evolver.workers.worker import Worker

# For the errors of metrics that look at all answers together.
TABLE_RESAMPLES = 999


def measure(pool: PoolConfig, folders: Mapping[str, Path]) -> str:
    """A Markdown table: the metric of each task in percent ± one standard error, the experts' own tasks in bold.

    Experts with heads of their own are measured on their own tasks, the base under the head that belongs to a task.

    Raises BadInput for tasks that cannot be loaded.
    """
    config = pool.run({n: str(f) for n, f in folders.items()}, f"pool {pool.pool}")
    opened, tasks = open_models(config), load_tasks(config)
    plan = Plan(config, opened.digests(), {s: items_hash(tasks, s) for s in SPLITS})
    worker = Worker(plan, "report", tasks=tasks)
    rows = []
    for number, name in enumerate(("base", *pool.experts)):
        recipe = Expert(name, plan.digests[name])
        result = worker.evaluate(Candidate(number, recipe, "pool", stage="report"))
        rows.append([name, *_cells(pool, name, result, worker.scale)])
    head = [f"{task} ({len(worker.scale.places[task])})" for task in worker.scale.weights]
    return markdown_table(["model", *head], rows)


def _cells(pool: PoolConfig, name: str, result: Result, scale: Scale) -> list[str]:
    if result.status == "failed":
        return [f"failed: {result.reason}"] * len(scale.weights)
    cells = []
    for entry in pool.evaluation.tasks:
        own = name in (entry.head, entry.task) or entry.task.endswith(f"_{name}")
        if pool.own_heads and not own and name != "base":
            cells.append("–")
            continue
        error = standard_error(result.items, scale, entry.task)
        text = f"{100 * result.tasks[entry.task]:.1f} ± {100 * error:.1f}"
        cells.append(f"**{text}**" if own else text)
    return cells


def standard_error(items: Sequence[ItemAnswer], scale: Scale, task: str) -> float:
    """The standard error of a task's metric: of a mean by the items' spread, of others by resampling the items."""
    places, metric = scale.places[task], scale.metrics[task]
    answers = np.asarray([items[p] for p in places])
    if metric.judged:
        return float(answers.std()) / math.sqrt(max(1, len(places) - 1))
    right = np.asarray([scale.right[p] for p in places])
    drawn = np.random.default_rng(0).integers(len(places), size=(TABLE_RESAMPLES, len(places)))
    return float(metric.of(answers[drawn], right[drawn]).std())
