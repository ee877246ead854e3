"""Whether winners that keep a constraint on the dev items keep it on other items, played on a table of answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from rules import SPLITS, World

from evolver.config.constraints import Constraint
from evolver.evaluation.scores.feasibility import Guards
from evolver.evaluation.scores.metrics import JUDGED
from evolver.evaluation.scores.scoring import Scale
from evolver.report.text import markdown_table

CANDIDATES, FINALISTS, DROP, CONFIDENCES = 100, 6, 10.0, (0.5, 0.8, 0.9)
# Dev items and select items of each task.
SETS = ((50, 150), (100, 300), (250, 250))
DECIDED = {"dev": ("dev",), "dev + select": ("dev", "select"), "select": ("select",)}
TITLE = f"""\
### Constraints: do feasible winners stay feasible?

Of {CANDIDATES} models, the best {FINALISTS} that keep `{{task: T, drop: {DROP:g}}}` against the best expert of this
task on the dev items are scored on the select items, too; T is another task in each run. The winner is the best of
those that keep the constraint on the items that *decide*. *Stays*: how many winners keep it on the items that judge,
with 95 % intervals over the runs. Those are about 500, so of models exactly at the limit one half keeps it there."""


def guarded_table(worlds: Sequence[World], resamplings: int) -> str:
    """One row for each number of items, each confidence, and each way to decide; empty where the table is too small."""
    rows = []
    for dev, select in SETS:
        for confidence in CONFIDENCES if dev + select <= worlds[0].most else ():
            played = [_played(worlds[r % len(worlds)], dev, select, confidence, r) for r in range(resamplings)]
            for name in DECIDED:
                kept = np.array([found[name] for found in played if name in found])
                reach = 196 * kept.std() / np.sqrt(max(1, len(kept)))
                stays = f"{100 * kept.mean():.1f} ± {reach:.1f} %" if len(kept) else "–"
                rows.append(
                    [f"{dev}, {select}", f"{confidence:g}", name, f"{100 * len(kept) / len(played):.0f} %", stays]
                )
    head = ["dev, select items of a task", "confidence", "decided by", "runs with a feasible winner", "stays"]
    return f"{TITLE}\n\n{markdown_table(head, rows)}" if rows else ""


def _played(world: World, dev: int, select: int, confidence: float, number: int) -> dict[str, bool]:
    """For each way to decide that finds a feasible winner, whether it keeps the constraint on the items that judge."""
    rng = np.random.default_rng([number, dev])
    chosen = rng.choice(world.free, min(CANDIDATES, len(world.free)), replace=False)
    experts = np.flatnonzero(world.of["baseline"])
    order = np.stack([rng.permutation(world.most)[: dev + select] for _ in range(world.tasks)])
    seen = np.take_along_axis(world.side[[*chosen, *experts]], order[None], axis=2)
    parts = {"dev": seen[:, :, :dev], "select": seen[:, :, dev:]}
    task = number // SPLITS % world.tasks
    best = int(parts["dev"][len(chosen) :, task].mean(1).argmax())
    keeps = {
        name: _guard(np.concatenate([parts[p][:, task] for p in used], axis=1), len(chosen) + best, confidence)
        for name, used in DECIDED.items()
    }  # fmt: skip
    score = parts["dev"][: len(chosen)].mean((1, 2))
    able = [k for k in np.argsort(-score, kind="stable") if keeps["dev"](k)][:FINALISTS]
    whole, found = seen[: len(chosen)].mean((1, 2)), {}
    for name, keep in keeps.items():
        if feasible := [k for k in able if keep(k)]:
            winner = max(feasible, key=lambda k: whole[k])
            lost = world.later[experts[best], task] - world.later[chosen[winner], task]
            found[name] = bool(lost <= DROP / 100)
    return found


def _guard(answers: np.ndarray, reference: int, confidence: float) -> Callable[[int], bool]:
    """Whether a model keeps the constraint on some items of its task.

    Args:
        answers: of the candidates and then of the experts, (models, items).
        reference: the model that they are compared with.
    """
    scale = Scale(("t",) * answers.shape[1], {"t": 1.0}, {"t": JUDGED})
    constraint = Constraint(task="t", drop=DROP, confidence=confidence)
    guards = Guards([constraint], scale, {0: answers[reference].tolist()})
    return lambda k: guards.violation(0, answers[k].tolist()) <= 0
