"""What the dashboard shows of a run, as JSON: small, however many candidates there are."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from evolver.history import History
from evolver.records import Candidate, Cross, Expert, Merge, Recipe, Result, ancestors
from evolver.search.hypervolume import hypervolume
from evolver.status import Status

POINTS = 2000  # of a curve
ROWS, COLUMNS = 60, 240  # of the heat map
NODES = 200  # of a lineage


def details(history: History, status: Status) -> dict[str, Any]:
    """A run's own page."""
    search = history.stages["search"]
    return {
        "status": asdict(status),
        "curve": curve(search),
        "plain": {c.label: r.score for c, r in history.stages["baseline"] if r.score is not None},
        "tasks": tasks(history),
        "heat": heat(history),
        "lineage": lineage(history.best[0].recipe) if history.best else {"nodes": [], "edges": []},
        "pareto": pareto(history),
        "failures": [{"number": c.number, "reason": r.reason} for c, r in search if r.status == "failed"][:200],
        "cost": cost(history),
        "candidates": table(search),
        "warnings": list(history.warnings),
    }


def curve(search: Sequence[tuple[Candidate, Result]]) -> dict[str, list[Any]]:
    """Items scored against the best dev score so far, and the scores of those that were scored in full."""
    spent, best = 0, -math.inf
    rows: list[tuple[int, float | None, float | None, int]] = []
    for candidate, result in search:
        spent += result.cost
        if result.score is not None:
            best = max(best, result.score)
        rows.append((spent, None if best == -math.inf else best, result.score, candidate.number))
    step = max(1, len(rows) // POINTS)
    kept = [r for n, r in enumerate(rows) if n % step == 0 or n == len(rows) - 1 or r[2] == r[1] != rows[n - 1][1]]
    return {key: [r[k] for r in kept] for k, key in enumerate(("spent", "best", "score", "number"))}


def tasks(history: History) -> dict[str, Any]:
    """Dev metrics per task of the plain models and of the best candidate."""
    models = {c.label: r.tasks for c, r in history.stages["baseline"] if r.status == "ok"}
    if history.best:
        models["best"] = history.best[1].tasks
    names = list(history.scales["dev"].weights)
    return {"tasks": names, "models": {m: [found.get(t) for t in names] for m, found in models.items()}}


def heat(history: History) -> dict[str, Any]:
    """Answers of experts and leading candidates, by item; items side by side are averaged where there are many."""
    complete = [(c, r) for c, r in history.stages["search"] if r.complete and r.score is not None]
    leading = sorted(complete, key=lambda pair: -(pair[1].score or 0.0))[: ROWS // 2]
    rows = [(c.label, r.items) for c, r in history.stages["baseline"] if r.complete][: ROWS // 2]
    rows += [(f"{c.number}", r.items) for c, r in leading]
    if not rows:
        return {"models": [], "items": []}
    answers = np.asarray([items for _, items in rows])
    edges = np.linspace(0, answers.shape[1], min(COLUMNS, answers.shape[1]) + 1).astype(int)
    cells = np.stack([answers[:, a:b].mean(1) for a, b in itertools.pairwise(edges)], axis=1)
    return {"models": [label for label, _ in rows], "items": np.round(cells, 4).tolist()}


def lineage(recipe: Recipe) -> dict[str, Any]:
    """Nodes with their depth under the model, and edges from what is used to what uses it."""
    nodes = list(ancestors(recipe))
    depth = {recipe.id: 0}
    for node in reversed(nodes):
        for below in node.inputs:
            depth[below.id] = max(depth.get(below.id, 0), depth.get(node.id, 0) + 1)
    kept = {n.id for n in nodes[-NODES:]} | {n.id for n in nodes if isinstance(n, Expert)}
    return {
        "nodes": [{"id": n.id, "made": made(n), "depth": depth.get(n.id, 0)} for n in nodes if n.id in kept],
        "edges": [[i.id, n.id] for n in nodes if n.id in kept for i in n.inputs if i.id in kept],
    }


def made(node: Recipe) -> str:
    """How a node came to be, in a few words."""
    if isinstance(node, Expert):
        return node.name
    if isinstance(node, Cross):
        return f"crossover, F {node.F:g}, Cr {node.Cr:g}"
    return f"merge, {node.method}" if isinstance(node, Merge) else "layers"


def pareto(history: History) -> dict[str, Any]:
    """The candidates that no other one beats in every task, and the hypervolume that they dominate from 0 on."""
    names = list(history.scales["dev"].weights)
    complete = [(c, r) for c, r in history.stages["search"] if r.complete and len(r.tasks) == len(names)]
    if len(names) < 2 or not complete:
        return {"tasks": names, "front": [], "others": [], "volume": None}
    values = np.asarray([[r.tasks[t] for t in names] for _, r in complete])
    numbers = [c.number for c, _ in complete]
    order = np.argsort(-values.sum(1), kind="stable")
    front: list[int] = []
    for k in order:
        if not any((values[f] >= values[k]).all() and (values[f] > values[k]).any() for f in front):
            front.append(int(k))
    others = [k for k in range(len(values)) if k not in set(front)][:POINTS]
    return {
        "tasks": names,
        "front": [{"number": numbers[k], "values": values[k].tolist()} for k in front],
        "others": [{"number": numbers[k], "values": values[k].tolist()} for k in others],
        "volume": hypervolume(values[front].tolist()),
    }


def cost(history: History) -> dict[str, Any]:
    """What the search took, and how busy each worker was with it."""
    seconds: dict[str, float] = defaultdict(float)
    parts: dict[str, float] = defaultdict(float)
    for _, result in history.stages["search"]:
        if not result.reused:
            seconds[result.worker] += result.seconds.get("total", 0.0)
            for part in ("materialise", "forward", "total"):
                parts[part] += result.seconds.get(part, 0.0)
    return {
        "workers": dict(seconds),
        "seconds": dict(parts),
        "flying": len(history.flying),
        "guessed": len(history.guessed),
    }


def table(search: Sequence[tuple[Candidate, Result]], rows: int = 200) -> list[dict[str, Any]]:
    """The candidates with the highest scores."""
    scored = sorted(search, key=lambda pair: (pair[1].score is None, -(pair[1].score or 0.0), pair[0].number))[:rows]
    return [
        {"number": c.number, "recipe": c.recipe.id, "proposer": c.proposer, "score": r.score, "items": len(r.items),
         "seconds": r.seconds.get("total"), "tasks": dict(r.tasks)}
        for c, r in scored
    ]  # fmt: skip


def coefficients(recipe: Recipe) -> list[dict[str, Any]]:
    """The settings of a candidate's merges, rule by rule: where they hold, and their values."""
    found = []
    for node in ancestors(recipe):
        if isinstance(node, Merge):
            for rule in node.rules:
                layers, outside, contains = rule.place.form()
                inputs = [i.name if isinstance(i, Expert) else i.id[:8] for i in node.inputs]
                place = f"layers {layers[0]}–{layers[1] - 1}" if layers else "everywhere"
                where = {"place": place, "contains": contains, "outside": outside}
                found.append({"method": node.method, "inputs": inputs, "values": _plain(dict(rule.values)), **where})
    return found


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
