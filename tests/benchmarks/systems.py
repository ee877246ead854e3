"""Which merge method is best, and how much of that is step size? Runs all of them on a pool: systems.md.

``python tests/benchmarks/systems.py [--pool emotion-l3] [--seeds 3] [--part masses tuned …]``. Its parts:

- ``masses``: every method with equal weights at its own defaults and at five total masses, scored on many items that
  nothing was chosen by; or ``defaults``, the same without the five masses, for models that take long to score;
- ``tuned``: the twelve best of them, and task arithmetic, tuned by TPE at one equal budget of scored items;
- ``evolver``: Evolver alone and with a merger, the rows of its paper's own table.

``--only METHOD …`` makes runs of their own for methods that were added or changed; their figures replace earlier ones.
Runs are kept, so the script goes on where it was stopped, and the page results/benchmarks/systems.md is made of all
that there are: ``--seeds 0`` only writes it, and systems.json beside it, from which the docs take what each method did.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "configs" / "common"), str(Path(__file__).parent)]

from packages import cache_folder  # noqa: E402
from searches import CANDIDATES, GENERATIONS, POOLS  # noqa: E402

from evolver.config.reading import ConfigText  # noqa: E402
from evolver.driver.prepare import prepare  # noqa: E402
from evolver.merging.maker import RecipeMaker  # noqa: E402
from evolver.merging.methods import METHODS, Method, Range  # noqa: E402
from evolver.records.recipe import Expert, Recipe, dump_recipe  # noqa: E402
from evolver.report.text import markdown_table  # noqa: E402
from evolver.runs.history import History, read_history  # noqa: E402
from evolver.storage import storage_at  # noqa: E402
from evolver.workers.statistics import sample_hash  # noqa: E402

PAGE = ROOT / "results" / "benchmarks" / "systems.md"
FINDINGS = (Path(__file__).parent / "systems.txt").read_text()
# Of sums of task vectors, and of methods in whose papers the best mass grows with the number of experts.
MASSES, WIDE = (0.5, 1.0, 1.5, 2.0, 3.0), (1.0, 2.0, 4.0, 6.0, 10.0)
TUNED, BEST = 40, 12
# Dev items of each task of the first part: as many as leave some for the two other parts of a run.
SCORED, FEWER = 500, {"glue-l6": 250, "smollm2": 150}
PLAIN = "as it is"
MERGERS: dict[str, dict[str, Any]] = {
    "Evolver alone": {},
    "Evolver with simple": {"merger": {"method": "simple"}},
    "Evolver with ties": {"merger": {"method": "ties", "density": 0.2, "weight": 0.25, "lambda": 1.5}},
    "Evolver with fisher": {"merger": {"method": "fisher"}},
    "Evolver with regmean": {"merger": {"method": "regmean"}},
}


def main() -> None:
    """Run what is missing, and write the page."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--pool", choices=POOLS, default="emotion-l3")
    given.add_argument("--seeds", type=int, default=3)
    given.add_argument("--part", nargs="+", choices=PARTS, default=["masses", "tuned", "evolver"])
    given.add_argument("--only", nargs="+", choices=sorted(METHODS), default=())
    asked = given.parse_args()
    for part in asked.part:
        for seed in range(1, asked.seeds + 1):
            for made in PARTS[part](asked.pool, seed, asked.only):
                once(asked.pool, made)
                write()
    write()


def write() -> None:
    """The page, and what of it other pages read."""
    PAGE.write_text(page())
    found = {pool: figures for pool in POOLS if (figures := shares(pool))}
    PAGE.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


def once(pool: str, made: Mapping[str, Any]) -> None:
    """One run, or the rest of it."""
    folder = home(pool)
    if not (folder / "results" / made["run"] / "summary.json").exists():
        file = folder / f"{made['run']}.yaml"
        file.write_text(yaml.safe_dump(dict(made), sort_keys=False))
        subprocess.run([sys.executable, "-m", "evolver", "run", str(file)], cwd=folder, check=True)


def home(pool: str) -> Path:
    found = cache_folder() / "systems" / pool
    found.mkdir(parents=True, exist_ok=True)
    return found


def config(pool: str, run: str, seed: int, sizes: tuple[int, int, int], **more: Any) -> dict[str, Any]:
    """A configuration with so many dev, select and report items of each task."""
    found = {"run": run, "seed": seed, **POOLS[pool][0](pool)}
    for task in found["evaluation"]["tasks"]:
        task |= dict(zip(("dev", "select", "report"), sizes, strict=True))
    return {**found, **more}


# The parts


def masses(pool: str, seed: int, only: Sequence[str]) -> Iterator[dict[str, Any]]:
    """All methods at all masses."""
    yield from _begun(pool, "masses", seed, (*MASSES, *WIDE), only)


def defaults(pool: str, seed: int, only: Sequence[str]) -> Iterator[dict[str, Any]]:
    """All methods as they are."""
    yield from _begun(pool, "defaults", seed, (), only)


def _begun(pool: str, part: str, seed: int, grid: Sequence[float], only: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One run that begins with all methods, also at those of these masses that suit them, and searches no further."""
    sizes = (FEWER.get(pool, SCORED), 5, 5)
    run = "-".join((part, *only, str(seed)))
    plain = config(pool, run, seed, sizes, search={"algorithm": "random"}, budget={"candidates": 1})
    files, made = [], recipes(plain, grid, only)
    for label, recipe in made.items():
        file = home(pool) / "recipes" / f"{label.replace(' ', '_')}-{seed}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(dump_recipe(recipe))
        files.append(str(file))
    (home(pool) / f"{run}.json").write_text(json.dumps({label: recipe.id for label, recipe in made.items()}))
    yield plain | {"start": [{"recipe": f} for f in files], "budget": {"candidates": len(made) + 1}}


def tuned(pool: str, seed: int, only: Sequence[str]) -> Iterator[dict[str, Any]]:
    """TPE over the methods that did best, with the budget that all have."""
    for name in only or ["task_arithmetic", *best_methods(pool)]:
        found = METHODS[name]
        search = {"algorithm": "tpe", "method": name}
        if not {"lambda", "weight"} & set(found.settings) and not any(s.search for s in found.settings.values()):
            continue  # there is nothing to tune
        budget = {"candidates": TUNED}
        yield config(pool, f"tuned-{name}-{seed}", seed, POOLS[pool][1], search=search, budget=budget)


def evolver(pool: str, seed: int, only: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Evolver with each merger, generation by generation."""
    for label, merger in MERGERS.items():
        if only and merger.get("merger", {}).get("method") not in only:
            continue
        search = {**GENERATIONS, **merger}
        run = f"{label.replace(' ', '-')}-{seed}"
        yield config(pool, run, seed, POOLS[pool][1], search=search, budget={"candidates": CANDIDATES})


PARTS = {"masses": masses, "defaults": defaults, "tuned": tuned, "evolver": evolver}


def recipes(given: Mapping[str, Any], grid: Sequence[float], only: Sequence[str]) -> dict[str, Recipe]:
    """Every method of any number of models at its defaults, and at those of its masses that are asked for, by label.

    Args:
        only: the methods that are wanted; none: all.
    """
    ready = prepare(ConfigText(yaml.safe_dump(dict(given)), "systems"))
    opened, count = ready.opened, len(ready.experts)
    maker = RecipeMaker(
        list(ready.config.experts), opened.base.names(), opened.digests(),
        lambda _, expert: sample_hash(ready.config, ready.tasks, expert),
    )  # fmt: skip
    out: dict[str, Recipe] = {}
    for name in sorted(only or METHODS):
        found = METHODS[name]
        if found.takes is not None or found.least > count or any(s.required for s in found.settings.values()):
            continue
        out[f"{name} {PLAIN}"] = maker.merger({"method": name})(maker.experts)
        if "lambda" in found.settings:
            equal = {"weight": 1.0 / count} if "weight" in found.settings else {}
            for mass in sorted(set(of_masses(found)) & set(grid)):
                merger = maker.merger({"method": name, "lambda": mass, **equal})
                out[f"{name} at {mass:g}"] = merger(maker.experts)
    return out


def of_masses(method: Method) -> tuple[float, ...]:
    """The five total masses that a method is tried at."""
    search = method.settings["lambda"].search
    return WIDE if isinstance(search, Range) and search.high > 3 else MASSES


# The page


def measured(pool: str) -> dict[str, list[float]]:
    """Of every label and seed the mean over the tasks of the score divided by that of the task's own expert."""
    out: dict[str, dict[str, float]] = {}
    files = (p for kind in ("masses", "defaults") for p in home(pool).glob(f"{kind}-*.json"))
    for file in sorted(files, key=lambda p: (p.stem.count("-"), p.stem)):  # those of single methods come last
        folder = home(pool) / "results" / file.stem
        if folder.exists():
            history = read_history(storage_at(str(folder)))
            own = _own(history)
            scored = {c.recipe.id: r for c, r in history.stages["search"] if r.complete}
            for label, recipe in json.loads(file.read_text()).items():
                if recipe in scored:
                    shares = [score / own[task] for task, score in scored[recipe].tasks.items()]
                    out.setdefault(label, {})[file.stem.rpartition("-")[2]] = 100 * float(np.mean(shares))
    return {label: list(values.values()) for label, values in out.items()}


def _own(history: History) -> dict[str, float]:
    """Of every task the best score of an expert, which is that of its own in these pools."""
    scores = [r.tasks for c, r in history.stages["baseline"] if isinstance(c.recipe, Expert)]
    return {task: max(s[task] for s in scores) for task in scores[0]}


def best_methods(pool: str) -> list[str]:
    """The methods that were best at any mass, best first."""
    highest: dict[str, float] = {}
    for label, values in measured(pool).items():
        name = label.split()[0]
        highest[name] = max(highest.get(name, -np.inf), float(np.mean(values)))
    ranked = sorted(highest, key=lambda n: -highest[n])
    return [n for n in ranked if n not in ("task_arithmetic", "linear", "simple")][:BEST]


def page() -> str:
    """The page, from the runs that there are."""
    parts = [HEAD, FINDINGS.strip()]
    for pool in POOLS:
        sections = [masses_section(pool), runs_section(pool, "tuned"), runs_section(pool, "Evolver")]
        if any(sections):
            parts += [f"## {pool}", *filter(None, sections)]
    return "\n\n".join(parts) + "\n"


def at_masses(pool: str) -> dict[str, tuple[dict[str, float], int]]:
    """Of every method the mean share over the seeds by what was tried, and the number of seeds; the best method first.

    What was tried is ``as it is``, or a total mass as text.
    """
    out: dict[str, tuple[dict[str, float], int]] = {}
    for label, values in measured(pool).items():
        name, _, tried = label.partition(" ")
        means, seeds = out.get(name, ({}, 0))
        means[tried.removeprefix("at ")] = float(np.mean(values))
        out[name] = means, max(seeds, len(values))
    return dict(sorted(out.items(), key=lambda item: -max(item[1][0].values())))


def shares(pool: str) -> dict[str, dict[str, float | None]]:
    """Of every method its share at its defaults and at its best mass (1: as good as the experts), and that mass."""
    out: dict[str, dict[str, float | None]] = {}
    for name, (means, seeds) in at_masses(pool).items():
        plain, best = means.get(PLAIN), max(means, key=lambda tried: (means[tried], tried != PLAIN))
        out[name] = {
            PLAIN: None if plain is None else round(plain / 100, 4), "best": round(means[best] / 100, 4),
            "best mass": None if best == PLAIN else float(best), "seeds": seeds,
        }  # fmt: skip
    return out


def masses_section(pool: str) -> str:
    """The table of all methods at their defaults and at five masses."""
    rows = []
    for name, (means, seeds) in at_masses(pool).items():
        grid = of_masses(METHODS[name]) if "lambda" in METHODS[name].settings else ()
        best = max((m for m in means if m != PLAIN), key=means.__getitem__, default="")
        rows.append([
            name, f"{means[PLAIN]:.1f}" if PLAIN in means else "failed",
            *(f"{means[m]:.1f}" if m in means else "" for m in (f"{m:g}" for m in grid)),
            *[""] * (len(MASSES) - len(grid)), best, f"{max(means.values()):.1f}", str(seeds),
        ])  # fmt: skip
    if not rows:
        return ""
    columns = (f"{a:g} or {b:g}" for a, b in zip(MASSES, WIDE, strict=True))
    head = ["method", PLAIN, *columns, "best mass", "best", "seeds"]
    items = "\n".join(textwrap.wrap(MASSES_TEXT.format(items=FEWER.get(pool, SCORED)), 120))
    return f"### All methods with equal weights\n\n{items}\n\n{markdown_table(head, rows)}"


def runs_section(pool: str, begin: str) -> str:
    """The winners of the runs whose names begin so, on report items."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((home(pool) / "results").glob(f"{begin}-*/summary.json")):
        name = file.parent.name.removeprefix("tuned-").rpartition("-")[0].replace("-", " ")
        found.setdefault(name, []).append(json.loads(file.read_text()))
    rows = []
    for name, runs in found.items():
        won = np.array([100 * r["winner"]["report"] for r in runs])
        own = np.array([100 * r["report"][r["best_expert"]] for r in runs])
        reach = f" ± {1.96 * won.std(ddof=1) / np.sqrt(len(won)):.1f}" if len(won) > 1 else ""
        cells = [name, str(len(runs)), f"{won.mean():.1f}{reach}", f"{(won - own).mean():+.1f}"]
        rows.append((won.mean(), [*cells, f"{np.mean([r['items'] for r in runs]):,.0f}"]))
    if not rows:
        return ""
    title, text = TITLES[begin]
    head = ["method" if begin == "tuned" else "search", "seeds", "winner", "over the best expert", "dev items"]
    table = markdown_table(head, [row for _, row in sorted(rows, key=lambda pair: -pair[0])])
    return f"### {title}\n\n{text}\n\n{table}"


TITLES = {
    "tuned": (
        "The best methods, tuned at one budget",
        (
            f"TPE over each method's total mass and weights, {TUNED} candidates each, with the items of "
            "[search.md](search.md); *winner* is the mean score on report items, in percent."
        ),
    ),
    "Evolver": (
        "Evolver alone and with a merger",
        (
            f"Five rows of the Evolver paper's table: {CANDIDATES} candidates, generation by generation, with the "
            "items of [search.md](search.md)."
        ),
    ),
}
MASSES_TEXT = """\
{items} items of each task that nothing was chosen by, other ones with each seed. The figures are the mean over the
tasks of the merge's score divided by that of the task's own expert, in percent: 100 is as good as the experts, each on
its own task. *as it is* has the method's own defaults, with weights of 1. The columns with two numbers have weights of
1 ÷ experts and that total mass: the first number for methods whose parts add up, the second for those whose scale in
their papers stands for a sum over the experts. Methods of exactly two models, and those that need numbers of the user,
are left out. Methods with the same figures are the same merge at these settings: they drop nothing by default."""
HEAD = """\
# The published merging systems, side by side

Made by `python tests/benchmarks/systems.py`, on the pools of `make pools` and of the demos. Models compute in
bfloat16."""


if __name__ == "__main__":
    main()
