"""Rules for choosing among merges, compared on the published tables of answers: writes results/benchmarks/selection.md.

``python tests/benchmarks/selection.py`` (make benchmark-selection). Nothing is scored anew: every rule is played on the
answers in ``results/tables``. ``rules.py`` beside it holds the rules.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# Many small products: threads would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

from guarded import guarded_table  # noqa: E402
from rules import (  # noqa: E402
    Draw,
    Picked,
    World,
    adaptive_search,
    all_models,
    estimated,
    from_truth,
    halved,
    raced,
    seen_as,
    staged,
)
from simulated import simulated  # noqa: E402
from unbiased import bias_table, coverage_table, predictors_table, races_table  # noqa: E402

from evolver.report.text import markdown_table  # noqa: E402

TABLES, PAGE = ROOT / "results" / "tables", ROOT / "results" / "benchmarks" / "selection.md"
CANDIDATES, FEWEST = 100, 20
SLOW, SELDOM = ("racing", "halving", "p-irt", "difference"), 10
Rule = Callable[[Draw], Picked]
# How an adaptive search is told scores: which items its generations meet, and what is made of the answers.
WAYS = (("fixed", "mean"), ("rotate", "mean"), ("fixed", "difference"), ("rotate", "difference"))
# What the page recommends: items a task for all, finalists, items a task more for these.
DEFAULT, LARGE = (15, 6, 285), (50, 8, 450)
# The same where a table has few items.
SMALL = ((10, 6, 40), (10, 6, 65), (10, 12, 65), (15, 6, 60), (25, 6, 50), (25, 12, 50))
# Rules of three stages: how many models go on (None: all), and on how many items more of a task they are scored.
STAGED = (
    ((None, 10), (30, 30), (6, 230)),
    ((None, 10), (30, 30), (4, 350)),
    ((None, 25), (30, 100), (6, 375)),
    ((None, 25), (30, 100), (6, 750)),
)


def rules(most: int) -> dict[str, Rule]:
    """The rules by name; no rule scores more than ``most`` items of a task."""
    found: dict[str, Rule] = {}
    for n in (10, 25, 50, 100, 200, 500, 1000):
        if n <= most:
            found[f"all, {n} a task"] = lambda d, n=n: all_models(d, n)
    for first, count, more in (
        *(SMALL if most < 100 else ()), (10, 6, 90), (10, 6, 290), DEFAULT, (25, 3, 75), (25, 6, 75), (25, 12, 75),
        (25, 6, 175), (25, 12, 175), (25, 3, 275), (25, 6, 275), (25, 6, 475), (50, 6, 50), (50, 6, 150), (50, 6, 450),
        LARGE, (50, 12, 450), (50, 8, 625),
    ):  # fmt: skip
        if first + more <= most:
            for alone in (False, True):
                parts = ((None, first), (count, more))
                found[_name(parts, alone)] = lambda d, p=parts, a=alone: staged(d, p, a)
    for parts in STAGED:
        if sum(more for _, more in parts) <= most:
            for alone in (False, True):
                found[_name(parts, alone)] = lambda d, p=parts, a=alone: staged(d, p, a)
    for count, more in ((6, 75), (6, 275), (3, 475)):
        if more <= most:
            name = f"limit: {more} a task for the {count} truly best"
            found[name] = lambda d, c=count, m=more: from_truth(d, c, m)
    for full in dict.fromkeys((min(100, most), min(500, most))):
        for alpha in (0.05, 0.2):
            found[f"racing at {alpha:.0%}, {full} a task, one order"] = lambda d, f=full, a=alpha: raced(d, f, a, False)
            found[f"racing at {alpha:.0%}, {full} a task, fresh orders"] = lambda d, f=full, a=alpha: raced(
                d, f, a, True
            )
        for kind in ("mean", "p-irt", "difference"):
            found[f"halving from 25 to {full} a task, {kind}"] = lambda d, f=full, k=kind: halved(d, 25, f, k)
            for n in (25, 50):
                if kind != "mean":
                    found[f"{kind}, {n} of {full} a task"] = lambda d, f=full, k=kind, n=n: estimated(d, n, f, k)
    return found


def _name(parts: Sequence[tuple[int | None, int]], alone: bool) -> str:
    (_, first), *later = parts
    steps = [f"{first} a task", *(f"{more} more for the best {count}" for count, more in later)]
    return f"{', then '.join(steps)}, by {'select' if alone else 'dev + select'}"


def main() -> None:
    """Play all rules on all tables and write the page."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--resamplings", type=int, default=1000)
    given.add_argument("--tables", type=Path, default=TABLES)
    given.add_argument("--out", type=Path, default=PAGE)
    asked = given.parse_args()
    parts = []
    for folder in sorted(p for p in asked.tables.iterdir() if (p / "models.parquet").exists()):
        parts.append(section(World.read(folder), asked.resamplings))
    parts.append(section(simulated(), asked.resamplings))
    parts.append("## Races whose incumbents were chosen along the same order\n\n" + races_table(asked.resamplings))
    parts.append(correction_section(asked.tables / "correction.csv"))
    asked.out.write_text("\n\n".join(filter(None, [INTRODUCTION, *parts])) + "\n")


def section(worlds: Sequence[World], resamplings: int) -> str:
    """What a table says of all rules."""
    world = worlds[0]
    if len(world.free) < 2 * FEWEST:
        return f"## {world.name}\n\n{len(world.truth)} models are too few to play rules on."
    said = [f"## {world.name}", world.said()]
    for name, pool in world.pools().items():
        count = min(CANDIDATES, len(pool) * 2 // 3)
        if count >= FEWEST:
            found = played(worlds, name, count, rules(world.most), resamplings)
            said += [f"### {count} of {len(pool)} {name}", figures(found), *filter(None, [goals(found)])]
    if len(worlds[0].sure) >= 2 * FEWEST:
        said.append(likely_section(worlds, resamplings))
    if "coefficients" not in world.of:  # answers of real models, whose tasks differ in how hard they are
        said += filter(None, [guarded_table(worlds, resamplings // 4)])
    if rotated := rotation(worlds, 3 * resamplings // 25):
        said += ["### Fixed or rotating dev items", rotated]
    said += ["### The estimate: predictions", predictors_table(world, resamplings)]
    said += ["### The estimate: bias and intervals", bias_table(world, 10 * resamplings)]
    said.append(coverage_table(world, resamplings))
    return "\n\n".join(said)


def likely_section(worlds: Sequence[World], resamplings: int) -> str:
    """What the probabilities of the right answers are worth, beside the scores."""
    count = min(CANDIDATES, len(worlds[0].sure) * 2 // 3)
    rows: dict[str, Rule] = {}
    for n in (n for n in (5, 10, 25, 50, 100) if n <= worlds[0].most):
        for kind in ("score", "probability", "both"):
            rows[f"{kind}, {n} a task"] = lambda d, k=kind, n=n: seen_as(d, k, n)
    for n, kind in itertools.product((10, 25), ("score", "probability", "both")):
        if n + 75 <= worlds[0].most:
            rows[f"{kind}, {n} a task, then 75 more for the best 6, by select"] = lambda d, k=kind, n=n: seen_as(
                d, k, n, 6, 75
            )
    found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in rows}
    for r in range(resamplings):
        world = worlds[r % len(worlds)]
        draw = world.draw(world.sure, count, np.random.default_rng([r, 23]))
        for name, rule in rows.items():
            found[name].append(draw.judge(rule(draw)))
    table = []
    for name, values in found.items():
        regret, right, items, _ = np.mean(values, axis=0)
        reach = 196 * np.std([v[0] for v in values]) / np.sqrt(resamplings)
        table.append([name, f"{items:,.0f}", f"{100 * regret:.2f} ± {reach:.2f}", f"{100 * right:.1f} %"])
    title = f"### What a search sees: {count} of {len(worlds[0].sure)} models whose probabilities are known"
    return f"{title}\n\n{markdown_table(['rule', 'items', 'regret', 'right decisions'], table)}"


def correction_section(file: Path) -> str:
    """Whether the partial correction comes nearer to the report score than the raw dev score."""
    if not file.exists():
        return ""
    with file.open() as lines:
        rows = [{k: 100 * float(v) for k, v in row.items()} for row in csv.DictReader(lines)]
    # the report items may be easier or harder than the dev items: what the models that nobody chose rise or fall
    shift = np.array([r["others_report"] - r["others_dev"] for r in rows])
    table = []
    for name in ("raw", "corrected"):
        away = np.array([r[name] - r["report"] for r in rows])
        for how, gap in (("", away), (", less the shift of the other models", away + shift)):
            reach = 1.96 * gap.std(ddof=1) / np.sqrt(len(gap))
            table.append([f"{name}{how}", f"{gap.mean():+.2f} ± {reach:.2f}", f"{np.abs(gap).mean():.2f}"])
    nearer = sum(abs(r["corrected"] - r["report"]) < abs(r["raw"] - r["report"]) for r in rows)
    head = ["best dev score", "minus the winner's report score", "mean distance"]
    return f"{CORRECTION.format(runs=len(rows), nearer=nearer)}\n\n{markdown_table(head, table)}"


def played(
    worlds: Sequence[World], pool: str, count: int, asked: Mapping[str, Rule], resamplings: int
) -> dict[str, np.ndarray]:  # fmt: skip
    """For each rule and resampling: regret, right decisions, items and optimism, (resamplings, 4).

    Rules that take long are played in one of ``SELDOM`` resamplings only.
    """
    found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in asked}
    for r in range(resamplings):
        world = worlds[r % len(worlds)]
        draw = world.draw(world.pools()[pool], count, np.random.default_rng([r, 22]))
        for name, rule in asked.items():
            if not name.startswith(SLOW) or r % (SELDOM * len(worlds)) < len(worlds):
                found[name].append(draw.judge(rule(draw)))
    return {name: np.array(values) for name, values in found.items()}


def figures(found: Mapping[str, np.ndarray]) -> str:
    """One row for each rule."""
    rows = []
    for name, values in found.items():
        regret, right, items, optimism = values.mean(0)
        error = values[:, 0].std() / np.sqrt(len(values))
        rows.append([
            name, f"{items:,.0f}", f"{100 * regret:.2f} ± {196 * error:.2f}", f"{100 * right:.1f} %",
            f"{100 * optimism:.2f}", str(len(values)),
        ])  # fmt: skip
    return markdown_table(["rule", "items", "regret", "right decisions", "optimism", "resamplings"], rows)


def goals(found: Mapping[str, np.ndarray]) -> str:
    """Whether the goals of the page are reached, by the rules with fewest regrets among those that are cheap enough."""
    rows = []
    for goal, factor in (("all, 100 a task", 3), ("all, 500 a task", 5)):
        if goal not in found:
            continue
        theirs = found[goal]
        most = theirs[:, 2].mean() / factor
        for stages in (2, 3):
            for way in ("by dev + select", "by select"):
                able = [
                    n for n, v in found.items()
                    if n.endswith(way) and n.count("then") == stages - 1 and v[:, 2].mean() <= most
                ]  # fmt: skip
                if able:
                    rows.append(_goal(goal, min(able, key=lambda n: found[n][:, 0].mean()), found))
    head = ["goal", "the best rule", "regret minus the goal's", "times fewer items", "within 0.1", "optimism", "≤ 0.5"]
    return markdown_table(head, rows) if rows else ""


def _goal(goal: str, name: str, found: Mapping[str, np.ndarray]) -> list[str]:
    mine, theirs = found[name], found[goal]
    gap = 100 * (mine[:, 0] - theirs[:, 0])
    reach, optimism = 1.96 * gap.std() / np.sqrt(len(gap)), 100 * mine[:, 3].mean()
    return [
        f"regret of *{goal}*", name, f"{gap.mean():+.2f} ± {reach:.2f}",
        f"{theirs[:, 2].mean() / mine[:, 2].mean():.1f}", "yes" if gap.mean() <= 0.1 else "no", f"{optimism:.2f}",
        "yes" if optimism <= 0.5 else "no",
    ]  # fmt: skip


def rotation(worlds: Sequence[World], resamplings: int) -> str:
    """Adaptive searches on the table, on fixed and on rotating dev items; empty where the table is too small."""
    rows, world = [], worlds[0]
    generations = min(10, len(world.free) // 15)
    sizes = [n for n in (10, 25) if generations * n + 75 <= world.most]
    for n, (way, kind), final in itertools.product(sizes, WAYS, (0, 75)):
        found = np.array([
            adaptive_search(
                worlds[r % len(worlds)], n, way == "rotate", final, np.random.default_rng([r, 7]), generations, kind
            )
            for r in range(resamplings)
        ])  # fmt: skip
        regret, items, optimism = found.mean(0)
        reach = 196 * found[:, 0].std() / np.sqrt(len(found))
        rows.append([
            f"{n} a task, {way}", kind, f"best six on {final} more" if final else "best on dev", f"{items:,.0f}",
            f"{100 * regret:.2f} ± {reach:.2f}", f"{100 * optimism:.2f}",
        ])  # fmt: skip
    head = ["dev items", "score", "winner", "items", "regret", "optimism"]
    return f"{ROTATION}\n\n{markdown_table(head, rows)}" if rows else ""


INTRODUCTION = (Path(__file__).parent / "selection.txt").read_text().strip()
ROTATION = """\
An adaptive search is played on the table: ten models at random, then in each further generation the ten unscored models
whose coefficients are nearest to the best three so far. *fixed*: all generations are scored on the same items;
*rotate*: each generation on items of its own. The regret is that to the oracle of all models of the table."""


CORRECTION = """\
## The partial correction of the best dev score

{runs} searches of the demo (48 candidates by CMA-ES, 600 dev items, 1,600 report items), each with another seed and
other dev items, by `python tests/benchmarks/correction_runs.py`. In {nearer} of them the corrected score is nearer to
the winner's report score than the raw one."""


if __name__ == "__main__":
    main()
