"""What the dashboard shows of a run, as JSON: small, however many candidates there are."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evolver.dashboard.lineage import drawing
from evolver.dashboard.overview import Column, Overview, Places, Rows
from evolver.dashboard.status import Status
from evolver.records import own_score
from evolver.records.objective import Objective
from evolver.records.recipe import Merge, Recipe, ancestors, at_layer
from evolver.report.text import cost_rows
from evolver.search.front import front, hypervolume

POINTS = 2000  # of a curve
HEAT_ROWS, COLUMNS = 60, 240  # of the heat map
BINS = 120  # of time
SPARKS = 60  # points of the small curve of a run
LISTED = 200  # candidates, failures
FRONT = 200  # points of a front; one of many tasks may hold nearly all candidates
# The end of a sentence: a full stop before a capital letter. Full stops within names and numbers do not count.
FIRST_SENTENCE = re.compile(r"(?<=\.)\s+(?=[A-Z])")
VOLUME = 10**5  # points of a front to the power of its tasks, less two: what its hypervolume takes


def details(run: Overview, status: Status) -> dict[str, Any]:
    """A run's own page."""
    search, plain = run.rows("search"), run.rows("baseline")
    best = None if search.best is None else run.pair("search", search.best)[0]
    return {
        "status": asdict(status),
        "curve": curve_points(search),
        "experts": list(run.about.config.experts),
        "plain": {n: s for n, s in zip(plain.texts("label"), plain.numbers("score").tolist(), strict=True) if s == s},
        "tasks": tasks(run),
        "heat": heat(run),
        "lineage": lineage(run, best.recipe) if best else None,
        "best": best.number if best else None,
        "pareto": pareto(run),
        "failures": failures(search),
        "cost": cost(run),
        "busy": utilisation(search),
        "candidates": leading(search),
        "finals": contenders(run),
        "warnings": list(run.about.warnings),
    }


def contenders(run: Overview) -> list[dict[str, Any]]:
    """Who was scored on the select items so far, the highest first, with their dev scores."""
    rows, dev = run.rows("select"), dict[str, float]()
    for stage in (run.rows("baseline"), run.rows("search")):
        places = stage.whole
        ids = stage.table["recipe_id"].take(pa.array(places)).to_pylist()
        dev |= dict(zip(ids, stage.numbers("score")[places].tolist(), strict=True))
    columns = (rows.texts("label"), rows.texts("recipe_id"), rows.numbers("score").tolist())
    found = [{"label": n, "dev": dev.get(r), "select": s} for n, r, s in zip(*columns, strict=True) if s == s]
    return sorted(found, key=lambda row: -row["select"])


def curve_points(search: Rows) -> dict[str, list[Any]]:
    """Items scored against the best dev score so far, and the scores of those that were scored in full."""
    scores, counting = search.numbers("score"), search.accepted
    best = np.maximum.accumulate(np.where(np.isnan(counting), -np.inf, counting)) if len(scores) else scores
    improved = np.flatnonzero(best > np.concatenate([[-np.inf], best[:-1]])[: len(best)])
    kept = np.union1d(np.arange(0, len(scores), max(1, len(scores) // POINTS)), improved)
    kept = np.union1d(kept, [len(scores) - 1] if len(scores) else []).astype(int)
    return {
        "spent": np.cumsum(search.numbers("cost"))[kept].astype(int).tolist(),
        "best": _plain(best[kept]), "score": _plain(scores[kept]),
        "number": search.numbers("number")[kept].astype(int).tolist(),
    }  # fmt: skip


def sparkline(run: Overview) -> list[float]:
    """The best dev score after each of ``SPARKS`` shares of the search's candidates, from the first score on."""
    scores = run.rows("search").accepted
    best = np.fmax.accumulate(scores)
    best = best[~np.isnan(best)]
    places = np.linspace(0, len(best) - 1, min(SPARKS, len(best))).round().astype(int)
    return np.round(best[places], 6).tolist()  # type: ignore[no-any-return]


def verdict_line(status: Status) -> str:
    """The first sentence of a finished run's verdict; nothing for the others, which have none yet."""
    return FIRST_SENTENCE.split(status.verdict, maxsplit=1)[0] if status.state == "done" else ""


def tasks(run: Overview) -> dict[str, Any]:
    """Dev metrics per task of the plain models and of the best candidate."""
    names, plain, search = list(run.about.scales["dev"].weights), run.rows("baseline"), run.rows("search")
    models = {label: _of_tasks(plain, k, names) for k, label in enumerate(plain.texts("label"))
              if plain.texts("status")[k] == "ok"}  # fmt: skip
    if search.best is not None:
        models["best"] = _of_tasks(search, search.best, names)
    return {"tasks": names, "models": models}


def heat(run: Overview) -> dict[str, Any]:
    """Answers of experts and leading candidates, by item; items side by side are averaged where there are many."""
    search, plain = run.rows("search"), run.rows("baseline")
    leaders = search.whole[np.argsort(-search.numbers("score")[search.whole], kind="stable")][: HEAT_ROWS // 2]
    pairs = [run.pair("baseline", int(k)) for k in plain.whole[: HEAT_ROWS // 2]]
    pairs += [run.pair("search", int(k)) for k in leaders]
    if not pairs:
        return {"models": [], "items": []}
    answers = np.asarray([[own_score(a) for a in result.items] for _, result in pairs])
    edges = np.linspace(0, answers.shape[1], min(COLUMNS, answers.shape[1]) + 1).astype(int)
    cells = np.stack([answers[:, a:b].mean(1) for a, b in itertools.pairwise(edges)], axis=1)
    return {"models": [c.label or str(c.number) for c, _ in pairs], "items": np.round(cells, 4).tolist()}


def lineage(run: Overview, recipe: Recipe) -> dict[str, Any]:
    """A model's lineage as it is drawn; the models in it that are candidates have their numbers."""
    table = run.rows("search").table
    ids = pa.array([node.id for node in ancestors(recipe)])
    known = table.filter(pc.is_in(table["recipe_id"], ids)).select(["recipe_id", "number"])
    numbers = dict(zip(*(reversed(column.to_pylist()) for column in known.columns), strict=True))  # the first counts
    return drawing(recipe, numbers)


def pareto(run: Overview) -> dict[str, Any]:
    """The candidates that no other one beats in every objective, and the hypervolume that they dominate from 0 on; None
    where it takes too long to compute. Of a run with the score alone, every task counts as an objective.

    Candidates that break a constraint are left out, unless all do. Of a large front, those of the largest sums are
    shown.
    """
    objectives = run.about.objectives or [Objective(task, {task: 1.0}) for task in run.about.scales["dev"].weights]
    names, search = [objective.name for objective in objectives], run.rows("search")
    columns = [
        sum((share * search.numbers(f"task {task}") for task, share in o.shares.items()), np.zeros(len(search)))
        for o in objectives
    ]
    values = np.stack(columns, axis=1)
    places = np.flatnonzero(search.flags("complete") & ~np.isnan(values).any(1))
    feasible = places[search.numbers("violation")[places] == 0]
    places = feasible if len(feasible) else places
    if len(names) < 2 or not len(places):
        return {"tasks": names, "front": [], "others": [], "volume": None, "whole": True}
    values, numbers = values[places], search.numbers("number")[places].astype(int)
    all_on = front(values)
    on = np.sort(all_on[np.argsort(-values[all_on].sum(1), kind="stable")][:FRONT])
    others = np.setdiff1d(np.arange(len(values)), all_on)[:POINTS]

    def points(chosen: Places) -> list[dict[str, Any]]:
        return [{"number": int(numbers[k]), "values": values[k].tolist()} for k in chosen]

    whole = len(on) == len(all_on)
    quick = whole and len(on) ** (len(names) - 2) <= VOLUME
    volume = hypervolume(values[on]) if quick else None
    return {"tasks": names, "front": points(on), "others": points(others), "volume": volume, "whole": whole}


def failures(search: Rows) -> list[dict[str, Any]]:
    """The first of the failed candidates, with their reasons."""
    failed = search.table.filter(pc.field("status") == "failed").slice(0, LISTED)
    return failed.select(["number", "reason"]).to_pylist()  # type: ignore[no-any-return]


def cost(run: Overview) -> dict[str, Any]:
    """What the search took, and how busy each worker was with it."""
    fresh = _fresh(run.rows("search"))
    grouped = fresh.group_by("worker").aggregate([("total", "sum")])
    seconds = {name: float(pc.sum(fresh[name]).as_py() or 0.0) for name in ("materialise", "forward", "total")}
    workers = dict(zip(grouped["worker"].to_pylist(), grouped["total_sum"].to_pylist(), strict=True))
    return {
        "workers": {w or "": s or 0.0 for w, s in workers.items()}, "seconds": seconds, "flying": run.flying,
        "guessed": run.guessed, "bill": cost_rows(run.about.config.pool, seconds["total"]),
    }  # fmt: skip


def utilisation(search: Rows) -> dict[str, list[Any]]:
    """The share of the workers that evaluated, over time: ``at`` is the middle of each span, in seconds since 1970."""
    fresh = _fresh(search)
    ends = fresh["time"].cast(pa.int64()).to_numpy() / 1e6
    took = pc.fill_null(fresh["total"], 0.0).to_numpy()
    if not len(ends) or float(took.sum()) == 0.0:
        return {"at": [], "share": []}
    begins, workers = ends - took, max(1, len(set(fresh["worker"].to_pylist())))
    edges = np.linspace(begins.min(), ends.max(), BINS + 1)
    # Of each span of time the seconds that were worked before its end, less those before its begin.
    before = np.asarray([np.clip(edge - begins, 0.0, took).sum() for edge in edges])
    share = np.diff(before) / (np.diff(edges) * workers)
    middle = (edges[1:] + edges[:-1]) / 2
    return {"at": np.round(middle, 3).tolist(), "share": np.round(np.clip(share, 0, 1), 4).tolist()}


def leading(search: Rows) -> list[dict[str, Any]]:
    """The candidates with the highest scores."""
    scores = search.numbers("score")
    order = np.argsort(np.where(np.isnan(scores), np.inf, -scores), kind="stable")[:LISTED]
    shown = ["number", "recipe_id", "proposer", "score", "size", "total", "violation"]
    rows = search.table.select(shown).take(pa.array(order))
    return rows.to_pylist()  # type: ignore[no-any-return]


def settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of a candidate's merges: as its rules say them, and numbers by layer."""
    merges = [node for node in ancestors(recipe) if isinstance(node, Merge)]
    rules = [_rule(node, rule) for node in merges for rule in node.rules]
    depth = max(
        (last for node in merges for rule in node.rules if (last := (rule.place.layers or (0, 0))[1])), default=0
    )
    lines = [line for node in merges for line in _by_layer(node, depth, f"{node.id[:4]} " if len(merges) > 1 else "")]
    return {"recipe": recipe.id, "rules": rules, "depth": depth, "lines": lines}


def _rule(node: Merge, rule: Any) -> dict[str, Any]:
    at = rule.place
    place = "outside the layers" if at.outside else "everywhere"
    if at.layers:
        first, last = at.layers[0], at.layers[1] - 1
        place = f"layer {first}" if first == last else f"layers {first}–{last}"
    rows = f"rows {at.part[0] + 1}/{at.part[1]}" if at.part else ""
    said = ", ".join(filter(None, [place, at.contains, rows]))
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in rule.values}
    return {"method": node.method, "inputs": [i.label for i in node.inputs], "values": values,
            "place": said}  # fmt: skip


def _by_layer(node: Merge, depth: int, prefix: str) -> Iterator[dict[str, Any]]:
    """A line for each number of a merge, over the layers; where rules are for some tensors only, one for each kind.
    Tensors with one name in all layers are of one kind.
    """
    kinds = list(dict.fromkeys(at_layer(rule.place.contains, 0) for rule in node.rules if rule.place.part is None))
    for kind in kinds if depth else ():
        found = [_numbers(node.settings(at_layer(kind, layer), layer), node) for layer in range(depth)]
        for name in dict.fromkeys(name for values in found for name in values):
            label = f"{prefix}{name}" + (f", {kind}" if kind else "")
            yield {"name": label, "values": [values.get(name) for values in found]}


def _numbers(values: Mapping[str, Any], node: Merge) -> dict[str, float]:
    """The numbers among settings, one for each input where a setting has several."""
    out = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    for key, value in values.items():
        if isinstance(value, tuple):
            out |= {f"{key} of {i.label}": v for i, v in zip(node.inputs, value, strict=False)}
    return out


def _of_tasks(rows: Rows, place: int, names: list[str]) -> list[float | None]:
    return [rows.table[f"task {name}"][place].as_py() for name in names]


def _fresh(rows: Rows) -> pa.Table:
    """The results that cost something."""
    return rows.table.filter(pa.array(~rows.flags("reused")))


def _plain(values: Column) -> list[float | None]:
    """For JSON, which knows no infinity."""
    return [v if np.isfinite(v) else None for v in values.tolist()]
