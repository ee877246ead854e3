"""Which search finds most at an equal budget? Runs them on a pool, and writes results/benchmarks/search.md.

``python tests/benchmarks/searches.py [--pool emotion-l3] [--seeds 8] [--only SEARCH …]``. The pools are those of ``make
pools``, the demo and the language model's demo. Every seed draws other dev, select and report items, the same for all
searches. Runs are kept, so the script goes on where it was stopped, and the page is made of all that there are:
``--seeds 0`` only writes it. ``digits.py`` and ``asking.py`` beside it measure two more sections of the page.

The portfolio is the claim that was named beforehand; the other searches are compared with tuned task arithmetic, too,
and their p-values are corrected by Holm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "configs" / "common"), str(Path(__file__).parent)]

import asking  # noqa: E402
import digits  # noqa: E402
from packages import cache_folder  # noqa: E402

from evolver.report.text import markdown_table  # noqa: E402
from evolver.search.together.portfolio import usual_arms  # noqa: E402

PAGE = ROOT / "results" / "benchmarks" / "search.md"
CANDIDATES, CLAIM, BASELINE = 80, "portfolio", "tuned mass"
# Two seeds may agree by chance, or differ widely, and their interval says nothing.
LEAST = 3
MERGER = {"method": "task_arithmetic", "weight": 0.25, "lambda": 1.5}
SOLVED = {"algorithm": "tpe", "method": "swudi"}
GENERATIONS = {"algorithm": "evolver", "mode": "generational", "generations": 10**6}
SEARCHES: dict[str, dict[str, Any]] = {
    CLAIM: {"algorithm": "portfolio"},
    "portfolio with swudi": {"algorithm": "portfolio", "arms": usual_arms(3) | {"swudi": SOLVED}},
    BASELINE: {"algorithm": "tpe", "tune": ["lambda"]},
    "random": {"algorithm": "random"},
    "cmaes": {"algorithm": "cmaes"},
    "cmaes, 3 groups": {"algorithm": "cmaes", "layer_groups": 3},
    "tpe, 3 groups": {"algorithm": "tpe", "layer_groups": 3},
    "tpe over ties": {"algorithm": "tpe", "method": "ties"},
    "tpe over swudi": SOLVED,
    "gp": {"algorithm": "gp"},
    "evolver": {"algorithm": "evolver", "generations": 10**6},
    "evolver, merger": GENERATIONS | {"merger": MERGER},
    "evolver, merger adapts": GENERATIONS | {"merger": MERGER, "adapt": ["lambda"]},
    "rand/1, merger": GENERATIONS | {"merger": MERGER, "strategy": "rand/1"},
    "shade": {"algorithm": "shade", "population": 8, "generations": 10**6},
    "soup": {"algorithm": "soup", "rounds": 3},
    "m2n2": {"algorithm": "m2n2"},
    "pso": {"algorithm": "pso"},
    "ga": {"algorithm": "ga"},
    "cycleqd": {"algorithm": "cycleqd"},
    "map": {"algorithm": "map"},
    "layers": {"algorithm": "layers"},
}
# The few searches that are run with a language model, for which a candidate takes ten times as long.
FEW = (CLAIM, BASELINE, "cmaes, 3 groups", "evolver, merger")
EMOTIONS = ("tec", "crowdflower", "isear", "dailydialog")
GLUE = ("sst2", "mrpc", "rte", "cola")


def _emotion(pool: str) -> dict[str, Any]:
    experts, data = cache_folder() / "experts" / pool, cache_folder() / "pools/data/emotion"
    return {
        "model": {"base": str(experts / "base"), "kind": "classifier", "compute": "bfloat16"},
        "experts": {n: str(experts / n) for n in EMOTIONS},
        "evaluation": {"threads": 1, "tasks": [{"task": n, "data": str(data / n / "test.jsonl")} for n in EMOTIONS]},
    }


def _demo(pool: str) -> dict[str, Any]:
    names, made, demo = (
        ("tweets", "films", "products", "editorials"),
        ROOT / "configs/demo/experts",
        cache_folder() / pool,
    )
    return {
        "model": {"base": str(demo / "minilm"), "kind": "classifier", "compute": "bfloat16"},
        "experts": {n: str(made / n) for n in names},
        "evaluation": {
            "threads": 1, "tasks": [{"task": n, "data": str(demo / f"data/{n}/report.jsonl")} for n in names],
        },
    }  # fmt: skip


def _smollm2(pool: str) -> dict[str, Any]:
    names, made, demo = (
        ("commonsense", "science", "maths", "sentiment"),
        ROOT / "configs/demo-llm/experts",
        cache_folder() / "demo-llm",
    )
    tasks: list[dict[str, Any]] = [{"task": f"demo_{n}"} for n in names]
    tasks[1]["metric"] = "acc_norm"
    return {
        "model": {"base": str(demo / "base"), "compute": "bfloat16"},
        "experts": {n: str(made / n) for n in names},
        "evaluation": {"threads": 1, "include_path": str(demo / "tasks"), "tasks": tasks},
    }


def _glue(pool: str) -> dict[str, Any]:
    experts, data = cache_folder() / "experts" / pool, cache_folder() / "pools/data/glue"
    tasks: list[dict[str, Any]] = [{"task": n, "data": str(data / n / "test.jsonl")} for n in GLUE]
    for pairs in tasks[1:3]:
        pairs["text_pair"] = "text_pair"
    tasks[3]["metric"] = "mcc"
    return {
        "model": {"base": str(experts / "base"), "kind": "classifier", "compute": "bfloat16", "heads": "apart"},
        "experts": {n: str(experts / n) for n in GLUE},
        "evaluation": {"threads": 1, "tasks": tasks},
    }


# Of each pool its models and tasks, and the number of dev, select and report items of each task.
POOLS: dict[str, tuple[Callable[[str], dict[str, Any]], tuple[int, int, int]]] = {
    "emotion-l3": (_emotion, (150, 150, 500)),
    "demo": (_demo, (150, 150, 400)),
    "emotion-l6": (_emotion, (150, 150, 500)),
    "glue-l6": (_glue, (100, 100, 300)),
    "smollm2": (_smollm2, (60, 60, 200)),
}


def main() -> None:
    """Run what is missing, and write the page."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--pool", choices=POOLS, default="emotion-l3")
    given.add_argument("--seeds", type=int, default=8)
    given.add_argument("--only", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    asked = given.parse_args()
    for seed in range(1, asked.seeds + 1):
        for name in asked.only:
            if asked.pool != "smollm2" or name in FEW:
                once(asked.pool, name, seed)
                PAGE.write_text(page())
    PAGE.write_text(page())


def once(pool: str, name: str, seed: int) -> None:
    """One run, or the rest of it."""
    folder = cache_folder() / "searches" / pool
    folder.mkdir(parents=True, exist_ok=True)
    if not summary_of(pool, name, seed).exists():
        file = folder / f"{run_of(name, seed)}.yaml"
        file.write_text(yaml.safe_dump(config(pool, name, seed), sort_keys=False))
        subprocess.run([sys.executable, "-m", "evolver", "run", str(file)], cwd=folder, check=True)


def run_of(name: str, seed: int) -> str:
    return f"{'-'.join(''.join(c if c.isalnum() else ' ' for c in name).split())}-{seed}"


def summary_of(pool: str, name: str, seed: int) -> Path:
    return cache_folder() / "searches" / pool / "results" / run_of(name, seed) / "summary.json"


def config(pool: str, name: str, seed: int) -> dict[str, Any]:
    """The configuration of one run."""
    models, (dev, select, report) = POOLS[pool]
    found = {"run": run_of(name, seed), "seed": seed, **models(pool)}
    for task in found["evaluation"]["tasks"]:
        task |= {"dev": dev, "select": select, "report": report}
    return {**found, "search": SEARCHES[name], "budget": {"candidates": CANDIDATES}}


def page() -> str:
    """The page, from the runs that there are."""
    parts = [HEAD.format(candidates=CANDIDATES), FINDINGS, *(_pool_section(pool) for pool in POOLS)]
    parts += [made() for file, made in ((digits.KEPT, digits.section), (asking.KEPT, asking.section)) if file.exists()]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _pool_section(pool: str) -> str:
    """A table of the searches that were run on a pool; empty where none was."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in SEARCHES:
        for seed in range(1, 100):
            if (file := summary_of(pool, name, seed)).exists():
                found.setdefault(name, {})[seed] = json.loads(file.read_text())
    if not found:
        return ""
    compared = {name: _against(runs, found.get(BASELINE, {})) for name, runs in found.items()}
    corrected = _holm({n: p for n, (_, _, p, c) in compared.items() if n not in (CLAIM, BASELINE) and c >= LEAST})
    rows = []
    for name, runs in sorted(found.items(), key=lambda pair: -_mean(pair[1], "winner")):
        lead, reach, p, count = compared[name]
        p_text = "" if name == BASELINE or count < LEAST else f"{corrected.get(name, p):.3g}"
        over = "" if name == BASELINE else f"{100 * lead:+.1f}" + (f" ± {100 * reach:.1f}" if count >= LEAST else "")
        rows.append([
            f"**{name}**" if name == CLAIM else name, str(len(runs)), f"{100 * _mean(runs, 'winner'):.1f}",
            f"{100 * (_mean(runs, 'winner') - _mean(runs, 'expert')):+.1f}", over, p_text,
            f"{np.mean([s['items'] for s in runs.values()]):,.0f}",
        ])  # fmt: skip
    rows += _plain(found)
    head = ["search", "seeds", "winner", "over the best expert", f"over {BASELINE}", "p", "dev items"]
    sizes = "{} dev, {} select and {} report items".format(*POOLS[pool][1])
    return f"## {pool}\n\n{sizes} of each of four tasks.\n\n{markdown_table(head, rows)}"


def _plain(found: dict[str, dict[int, dict[str, Any]]]) -> list[list[str]]:
    """Rows of what needs no search: on the report items of all seeds, the best expert, the average, the base."""
    by_seed = {seed: summary for runs in found.values() for seed, summary in runs.items()}
    rows = []
    for name in ("the best expert", "average", "base"):
        scores = [s["report"][s["best_expert"] if name == "the best expert" else name] for s in by_seed.values()]
        rows.append([f"*{name}*", str(len(scores)), f"{100 * float(np.mean(scores)):.1f}", "", "", "", ""])
    return rows


def _score(summary: dict[str, Any], whose: str) -> float:
    label = summary["best_expert"]
    return float(summary["winner"]["report"] if whose == "winner" else summary["report"][label])


def _mean(runs: dict[int, dict[str, Any]], whose: str) -> float:
    return float(np.mean([_score(s, whose) for s in runs.values()]))


def _against(runs: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]]) -> tuple[float, float, float, int]:
    """The mean lead over other runs of the same seeds, its 95 % half width and p by Student's t, and their number."""
    gaps = np.array([_score(runs[s], "winner") - _score(others[s], "winner") for s in runs if s in others])
    if len(gaps) < LEAST or gaps.std() == 0:
        return float(gaps.mean()) if len(gaps) else 0.0, 0.0, 1.0, len(gaps)
    error = gaps.std(ddof=1) / np.sqrt(len(gaps))
    reach = float(stats.t.ppf(0.975, len(gaps) - 1) * error)
    return float(gaps.mean()), reach, float(stats.ttest_1samp(gaps, 0.0).pvalue), len(gaps)


def _holm(given: dict[str, float]) -> dict[str, float]:
    """p-values corrected by Holm (1979)."""
    out, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(given.items(), key=lambda pair: pair[1])):
        highest = max(highest, min(1.0, (len(given) - rank) * p))
        out[name] = highest
    return out


FINDINGS = (Path(__file__).parent / "searches.txt").read_text()
HEAD = """\
# Which search finds most?

Made by `python tests/benchmarks/searches.py`. Every search has {candidates} candidates; each seed draws other items,
the same for all searches. Models compute in bfloat16. *winner* is the mean score of the winners on report items, in
percent; a winner is chosen among the six best candidates, and the baselines, on dev and select items. The lead over
task arithmetic with its total mass tuned (*tuned mass*, a search of as many candidates) is a mean over the seeds that
both have, with 95 % intervals of Student's t over the seeds where these are three or more. The portfolio is the claim
that was named beforehand; the p-values of the others are corrected by Holm. *dev items* are those that the search
scored. Rows in italics need no search."""


if __name__ == "__main__":
    main()
