"""Whether winners that keep a constraint on the dev items keep it on other items, played on a table of answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rules import World

from evolver.config.constraints import Constraint
from evolver.evaluation.scores.feasibility import Guards
from evolver.evaluation.scores.metrics import JUDGED
from evolver.evaluation.scores.scoring import Scale
from evolver.report.text import markdown_table

CANDIDATES, DROP, CONFIDENCES = 100, 10.0, (0.5, 0.8, 0.9, 0.95)
TITLE = f"""\
### Constraints: do feasible winners stay feasible?

Among those of {CANDIDATES} models that keep `{{task: each, drop: {DROP:g}}}` against the best expert of each task on so
many dev items of it, the one with the highest score wins. *Stays*: the share of winners that lose at most {DROP:g}
points of every task on the items that judge. *A task stays*: the same of single constraints. Without a margin, at a
confidence of 0.5, they are kept by chance."""


def guarded_table(worlds: Sequence[World], resamplings: int) -> str:
    """One row for each number of dev items and each confidence."""
    rows = []
    for n in (50, 100, 250, 500):
        if n <= worlds[0].most:
            for confidence in CONFIDENCES:
                found = [_played(worlds[r % len(worlds)], n, confidence, r) for r in range(resamplings)]
                kept = [f for f in found if f is not None]
                share = [np.mean([f.all() for f in kept]), np.mean([f.mean() for f in kept])] if kept else []
                rows.append([
                    str(n), f"{confidence:g}", f"{100 * len(kept) / len(found):.0f} %",
                    *([f"{100 * s:.1f} %" for s in share] or ["–", "–"]),
                ])  # fmt: skip
    head = ["dev items of a task", "confidence", "runs with a feasible model", "stays", "a task stays"]
    return f"{TITLE}\n\n{markdown_table(head, rows)}"


def _played(world: World, n: int, confidence: float, number: int) -> np.ndarray | None:
    """Which tasks a winner keeps on the items that judge, (tasks); None where no model is feasible."""
    rng = np.random.default_rng([number, n])
    chosen = rng.choice(world.free, min(CANDIDATES, len(world.free)), replace=False)
    experts = np.flatnonzero(world.of["baseline"])
    order = np.stack([rng.permutation(world.most)[:n] for _ in range(world.tasks)])
    seen = np.take_along_axis(world.side[[*chosen, *experts]], order[None], axis=2)
    ours, theirs = seen[: len(chosen)], seen[len(chosen) :]
    names = [str(t) for t in range(world.tasks)]
    scale = Scale(tuple(np.repeat(names, n)), dict.fromkeys(names, 1.0), dict.fromkeys(names, JUDGED))
    best = theirs.mean(2).argmax(0)
    guards = Guards(
        [Constraint(task=t, drop=DROP, confidence=confidence) for t in names], scale,
        {t: theirs[best[t]].ravel().tolist() for t in range(world.tasks)},
    )  # fmt: skip
    feasible = [k for k, row in enumerate(ours) if _keeps(guards, row.ravel().tolist())]
    if not feasible:
        return None
    winner = max(feasible, key=lambda k: ours[k].mean())
    lost = world.later[experts[best], np.arange(world.tasks)] - world.later[chosen[winner]]
    return np.asarray(lost <= DROP / 100)


def _keeps(guards: Guards, answers: list[float]) -> bool:
    return all(guards.violation(number, answers) <= 0 for number in guards.references)
