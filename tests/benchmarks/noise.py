"""Does seeded noise around the best merge find anything? Runs it on a pool, writes results/benchmarks/search-noise.md.

``python tests/benchmarks/noise.py [--seeds 2]``. The pool is emotion-l3 of ``make pools``, with the items, the numbers
of candidates and the computation in bfloat16 of ``tests/benchmarks/searches.py``. Runs are kept, so the script goes on
where it was stopped, and the page is made of all that there are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "configs" / "common")]

from packages import cache_folder  # noqa: E402
from searches import CANDIDATES, config  # noqa: E402

from evolver.report.text import markdown_table  # noqa: E402
from evolver.runs.history import read_history  # noqa: E402
from evolver.storage import storage_at  # noqa: E402

PAGE = ROOT / "results" / "benchmarks" / "search-noise.md"
POOL, SEARCH = "emotion-l3", "evolution_strategy"
# Settings, and with how many seeds they are run.
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "defaults": ({}, 2),
    "sigma 1": ({"sigma": 1.0}, 1),
    "sigma 2": ({"sigma": 2.0}, 1),
    "rank 4": ({"rank": 4}, 1),
}


def main() -> None:
    """Run what is missing, and write the page."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--seeds", type=int, default=2)
    seeds = given.parse_args().seeds
    for seed in range(1, seeds + 1):
        for name, (_, runs) in VARIANTS.items():
            if seed <= runs:
                once(name, seed)
                PAGE.write_text(page())


def once(name: str, seed: int) -> None:
    """One run, or the rest of it."""
    folder = cache_folder() / "searches" / "noise"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "results" / run_of(name, seed) / "summary.json").exists():
        changes = {"run": run_of(name, seed), "search": {"algorithm": SEARCH, **VARIANTS[name][0]}}
        made = config(POOL, "random", seed) | changes | {"start": ["average", "masses"]}
        file = folder / f"{made['run']}.yaml"
        file.write_text(yaml.safe_dump(made, sort_keys=False))
        subprocess.run([sys.executable, "-m", "evolver", "run", str(file)], cwd=folder, check=True)


def run_of(name: str, seed: int) -> str:
    return f"{name.replace(' ', '-')}-{seed}"


def page() -> str:
    """The page, from the runs that there are."""
    rows, verdicts = [], []
    for name, (_, runs) in VARIANTS.items():
        for seed in range(1, runs + 1):
            folder = cache_folder() / "searches" / "noise" / "results" / run_of(name, seed)
            if (folder / "summary.json").exists():
                summary = json.loads((folder / "summary.json").read_text())
                rows.append([name, str(seed), *_cells(summary, folder)])
                verdicts.append(f"- {name}, seed {seed}: {summary['verdict']}")
    head = [
        "settings", "seed", "start, dev", "noise, dev", "best noise, dev", "last mean, dev", "best plain merge, report",
        "winner, report", "seconds",
    ]  # fmt: skip
    said = "\n".join(verdicts)
    return f"{HEAD.format(candidates=CANDIDATES)}\n\n{markdown_table(head, rows)}\n\n{said}\n"


def _cells(summary: dict[str, Any], folder: Path) -> list[str]:
    noise, means = _dev_scores(folder)
    plain = max(v for k, v in summary["report"].items() if k == "average" or "@" in k)
    around = f"{100 * statistics.fmean(noise):.1f} ± {100 * statistics.stdev(noise):.1f}"
    return [
        f"{100 * means[0]:.1f}", around, f"{100 * max(noise):.1f}", f"{100 * means[-1]:.1f}", f"{100 * plain:.1f}",
        f"{100 * summary['winner']['report']:.1f}", f"{summary['seconds']:,.0f}",
    ]  # fmt: skip


def _dev_scores(folder: Path) -> tuple[list[float], list[float]]:
    """The dev scores of the models with noise, and of the means, the earliest first; the first is the start."""
    pairs = read_history(storage_at(str(folder))).stages["search"]
    of = [(c.proposer, r.score) for c, r in pairs if r.score is not None]
    start = max(s for w, s in of if w == "start")
    return [s for w, s in of if w == SEARCH], [start, *(s for w, s in of if w == f"{SEARCH}/mean")]


HEAD = """\
# Noise around the best merge

Made by `python tests/benchmarks/noise.py`. The search `evolution_strategy` has {candidates} candidates on the pool
emotion-l3, with 150 dev items, 150 select items and 500 report items of each of four tasks; each seed draws other
items. Models compute in bfloat16. It starts from the best of the plain merges on dev items: the average, and task
arithmetic with five masses, which are among the candidates. *start* is that model, *noise* the mean and the standard
deviation of all models with noise around a mean, and *last mean* where the last whole generation has led. Scores are in
percent; *winner* is the model that was chosen among the six best candidates on dev and select items, the start
included. *seconds* is the time of its evaluations on one core, which was shared with other work."""


if __name__ == "__main__":
    main()
