"""The section of a report on the front of a run with several objectives: its points, and a paired test of each
objective against the best expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evolver.evaluation.scores.comparison import compare
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Result
from evolver.records.objective import Objective, values_of
from evolver.report.text import escaped, markdown_table, score_text, signed
from evolver.runs.outcome import Finalist, Outcome
from evolver.search.front import hypervolume


def front_section(outcome: Outcome) -> str:
    """The points of the front on the report items; nothing where a run has the score alone."""
    objectives, expert = outcome.about.objectives, outcome.best_expert
    points = [point for point in outcome.front if point.report.score is not None]
    if not objectives or not points:
        return ""
    scale = outcome.scales["report"]
    parts = [scale.of(objective.shares) for objective in objectives]
    names = [escaped(objective.name) for objective in objectives]
    head = ["model", *names, *(f"{name} against {expert.label}" for name in names)]
    rows = [_row(point, outcome, objectives, parts) for point in points]
    if expert.report.score is not None:
        rows.append([expert.label, *_values(expert.report, objectives, parts), *("" for _ in objectives)])
    said = (
        f"{len(points)} candidate{'s are' if len(points) > 1 else ' is'} on the front: on the dev and select items, no "
        "other finalist is at least as good in every objective and better in one. Shown are the objectives on "
        f"the report items, and the difference to the best expert, {expert.label}, with the p-value of a paired "
        f"permutation test. These are {len(points) * len(objectives)} tests, so about one in twenty has p below 0.05 "
        "by chance. "
        f"{_volumes(outcome)}Each model is exported by its number: `evolver export {outcome.config.run} FOLDER "
        f"--candidate {points[0].label.rpartition(' ')[2]}`, and the best one for weights of your own by `--weights "
        f"{','.join(f'{name}={n}' for n, name in zip((2, 1), names, strict=False))}`."
    )
    return f"## The front\n\n{said}\n\n{markdown_table(head, rows)}"


def front_summary(outcome: Outcome) -> list[dict[str, Any]]:
    """The front for programs: the objectives of each point on the report items."""
    return [
        {"candidate": int(point.label.rpartition(" ")[2]), "recipe": point.recipe.id,
         "report": {o.name: o.of(point.report.tasks) for o in outcome.about.objectives}}
        for point in outcome.front
    ]  # fmt: skip


def _row(
    point: Finalist, outcome: Outcome, objectives: tuple[Objective, ...], parts: list[tuple[Scale, list[int]]]
) -> list[str]:  # fmt: skip
    mark = " (winner)" if point.recipe.id == outcome.winner.recipe.id else ""
    tests = []
    for part, places in parts:
        ours, theirs = point.report, outcome.best_expert.report
        if theirs.score is None:
            tests.append("–")
            continue
        found = compare(
            [ours.items[p] for p in places], [theirs.items[p] for p in places], part, outcome.config.seed
        )  # fmt: skip
        tests.append(f"{signed(found.difference, part)} (p = {found.p:.3g})")
    return [f"{point.label}{mark}", *_values(point.report, objectives, parts), *tests]


def _values(
    result: Result, objectives: tuple[Objective, ...], parts: list[tuple[Scale, list[int]]]
) -> list[str]:  # fmt: skip
    return [score_text(o.of(result.tasks), part) for o, (part, _) in zip(objectives, parts, strict=True)]


def _volumes(outcome: Outcome) -> str:
    """A sentence on the hypervolumes, where all objectives are shares."""
    if not outcome.scales["report"].shares:
        return ""
    known: Mapping[str, list[Finalist]] = {"front": list(outcome.front), "others": list(outcome.finalists[:-1])}
    volumes = {}
    for name, models in known.items():
        points = [v for m in models if (v := values_of(outcome.about.objectives, m.report.tasks)) is not None]
        volumes[name] = hypervolume(points) if points else 0.0
    return (
        f"The front dominates a hypervolume of {volumes['front']:.4f}, the base, the experts and the plain merges "
        f"together {volumes['others']:.4f} (from 0 on, on the report items). "
    )
