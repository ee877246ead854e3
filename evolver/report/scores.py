"""Every model × task score of a run: raw, and normalised by the expert of the task; as tables and as rows of CSV.

The normalised score of a model on a task is its metric divided by that of the task's reference expert on the same
items, as in the literature on merging. The reference expert is the one that was trained for the task, by its name, or
else the expert with the best metric on the dev items.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from evolver.config import Config
from evolver.config.evaluation import TaskEntry
from evolver.evaluation.scores.metrics import FITNESS
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Result, Split
from evolver.report.text import escaped, listed, markdown_table, of_task, score_text
from evolver.runs.outcome import Outcome

NORMALISED = (
    "The normalised score of a model on a task is 100 × its metric / the metric of the task's reference expert on the "
    "same items, so the reference expert has 100. The mean weighs tasks as the score does."
)


@dataclass(frozen=True)
class Reference:
    """The expert by which a task's scores are normalised.

    Attributes:
        expert: its name.
        own: whether the task is its own one, by its name.
    """

    expert: str
    own: bool


def is_own(expert: str, task: str, entry: TaskEntry | None = None) -> bool:
    """Whether an expert was trained for a task, as far as names say: the task has its name or ends in ``_`` and it, or
    the task's ``head`` is the expert's.
    """
    return expert in (task, entry.head if entry else None) or task.endswith(f"_{expert}")


def references(outcome: Outcome) -> dict[str, Reference]:
    """The reference expert of every task of the report set for which there is one."""
    config, found = outcome.config, {}
    experts = {f.label: f for f in outcome.finalists if f.label in config.experts}
    for task in outcome.scales["report"].weights:
        own = [name for name in experts if is_own(name, task, _entry(config, task))]
        scored = {n: f.dev.tasks[task] for n, f in experts.items() if f.dev.score is not None and task in f.dev.tasks}
        if own:
            found[task] = Reference(max(own, key=len), True)
        elif scored:
            found[task] = Reference(max(scored, key=lambda name: scored[name]), False)
    return found


BOTH = ", the means of the items' scores and of the probabilities of their right answers"


def scores_section(outcome: Outcome) -> str:
    """The section of a report."""
    parts = [
        "## All scores",
        formula(outcome),
        _raw_table(outcome),
        _own_table(outcome),
        _normalised_table(outcome),
    ]
    return "\n\n".join(filter(None, parts))


def formula(outcome: Outcome) -> str:
    """How the score is computed from the metrics of the tasks, as a sentence."""
    scale = outcome.scales["report"]
    weights = scale.weights if len(scale.weights) > 1 else dict.fromkeys(scale.weights, 1.0)
    terms = [
        f"{'−' if scale.metrics[t].negative else ''}{'' if w == 1 else f'{w:.4g} × '}"
        f"{escaped(t)} ({escaped(_metric_name(outcome, t, scale))})"
        for t, w in weights.items()
    ]
    said = terms[0] if len(terms) == 1 else f"({' + '.join(terms)}) / {math.fsum(weights.values()):.4g}"
    negative = any(m.negative for m in scale.metrics.values())
    return f"The score of a model is {said.replace('+ −', '− ')}." + (
        " A metric of which lower values are better counts with the opposite sign." if negative else ""
    )


def _metric_name(outcome: Outcome, task: str, scale: Scale) -> str:
    """The metric as the configuration names it; of a task in a group, and of what a search sees instead, its kind."""
    entry, metric = _entry(outcome.config, task), scale.metrics[task]
    return entry.metric if entry and metric not in FITNESS.values() else metric.name


def score_rows(outcome: Outcome) -> Iterator[dict[str, Any]]:
    """A row for each model, split and task, and for each score of all tasks, for CSV. Values are not in percent."""
    for split, scale in outcome.scales.items():
        results = dict(_results(outcome, split))
        for name, result in results.items():
            same = {"model": name, "recipe_id": result.recipe_id, "split": split}
            yield {**same, "task": "", "items": len(scale.tasks), "value": result.score}
            for row in _task_rows(result, results, references(outcome), scale):
                named = {"metric": _metric_name(outcome, row["task"], scale), "own": row["own"] == name}
                yield same | row | named


def _task_rows(
    result: Result, results: Mapping[str, Result], reference: Mapping[str, Reference], scale: Scale
) -> Iterator[dict[str, Any]]:
    """One model's rows; ``own`` is the expert whose own task it is."""
    for task, weight in scale.weights.items():
        metric, expert = scale.metrics[task], reference.get(task)
        value = result.tasks.get(task) if result.score is not None else None
        yield {
            "task": task, "metric": "", "weight": weight, "items": len(scale.places[task]),
            "value": -value if metric.negative and value is not None else value,
            "reference": expert.expert if expert else "", "own": expert.expert if expert and expert.own else "",
            "normalised": _normalised(task, result, results, reference, scale),
        }  # fmt: skip


def _results(outcome: Outcome, split: Split) -> Iterator[tuple[str, Result]]:
    for finalist in outcome.finalists:
        found = {"dev": finalist.dev, "select": finalist.select, "report": finalist.report}[split]
        if found is not None:
            yield finalist.label, found


def _entry(config: Config, task: str) -> TaskEntry | None:
    return next((entry for entry in config.evaluation.tasks if entry.task == task), None)


def _normalised(
    task: str, result: Result, results: Mapping[str, Result], reference: Mapping[str, Reference], scale: Scale
) -> float | None:  # fmt: skip
    """A normalised score, 1 being that of the reference expert; None where there is none: without a reference, of a
    metric that is no share, and where the reference expert has 0 or less.
    """
    if task not in reference or not scale.metrics[task].share:
        return None
    theirs = results.get(reference[task].expert)
    if theirs is None or None in (theirs.score, result.score) or theirs.tasks[task] <= 0:
        return None
    return result.tasks[task] / theirs.tasks[task]


def _raw_table(outcome: Outcome) -> str:
    """The metrics on the dev items; those on the report items are in the first table of the report."""
    scale = outcome.scales["dev"]
    head = ["model", "dev", *map(escaped, scale.weights)]
    rows = [
        [name, score_text(r.score, scale), *(of_task(r.tasks.get(t), scale.metrics[t]) for t in scale.weights)]
        for name, r in _results(outcome, "dev")
    ]
    seen = {"score": "", "probability": ", the mean probabilities of the right answers", "both": BOTH}
    return f"On the dev items{seen[outcome.config.evaluation.fitness]}:\n\n{markdown_table(head, rows)}"


def _own_table(outcome: Outcome) -> str:
    """Each expert on the task that it was trained for, beside base and winner."""
    scale, models = outcome.scales["report"], {f.label: f for f in outcome.finalists}
    rows = []
    for task, reference in references(outcome).items():
        if reference.own:
            shown = (models[reference.expert], models["base"], outcome.winner)
            cells = [of_task(f.report.tasks.get(task), scale.metrics[task]) for f in shown]
            rows.append([escaped(reference.expert), escaped(task), *cells])
    if not rows:
        return ""
    head = ["expert", "its own task", "the expert", "base", "winner"]
    return f"Each expert on its own task, on the report items:\n\n{markdown_table(head, rows)}"


def _normalised_table(outcome: Outcome) -> str:
    """Every model × task on the report items, normalised."""
    scale, reference = outcome.scales["report"], references(outcome)
    results, rows = dict(_results(outcome, "report")), list[list[str]]()
    for name, result in results.items():
        found = {t: _normalised(t, result, results, reference, scale) for t in scale.weights}
        rows.append([name, _percent(_mean(found, scale)), *map(_percent, found.values())])
    if all(cell == "–" for row in rows for cell in row[1:]):
        return ""
    own = [escaped(f"{r.expert} for {t}") for t, r in reference.items()]
    head = ["model", "mean", *map(escaped, scale.weights)]
    return (
        f"Normalised scores on the report items. {NORMALISED} Reference experts are {listed(own)}"
        f"{_chosen(reference)}.\n\n{markdown_table(head, rows)}"
    )


def _chosen(reference: Mapping[str, Reference]) -> str:
    others = [escaped(task) for task, r in reference.items() if not r.own]
    if not others:
        return ""
    return f"; no expert has the name of {listed(others)}, so the expert that is best there on the dev items was taken"


def _mean(found: Mapping[str, float | None], scale: Scale) -> float | None:
    known = [v for v in found.values() if v is not None]
    if len(known) < len(found):
        return None
    weights = scale.weights
    return math.fsum(weights[t] * (v or 0.0) for t, v in found.items()) / math.fsum(weights.values())


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
