"""Which search finds most at an equal budget? Runs them on a pool, and writes results/benchmarks/search.md.

``python tests/benchmarks/searches.py [--pool emotion-l3] [--seeds 8] [--only SEARCH …]``. The pools are those of ``make
pools``. Every seed draws other dev, select and report items, the same for all searches. Runs are kept, so the script
goes on where it was stopped, and the page is made of all that there are.

The portfolio is the claim that was named beforehand; the other searches are compared with tuned task arithmetic, too,
and their p-values are corrected by Holm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "configs" / "common")]

from packages import cache_folder  # noqa: E402

from evolver.report.text import markdown_table  # noqa: E402

PAGE = ROOT / "results" / "benchmarks" / "search.md"
CANDIDATES, CLAIM, BASELINE = 80, "portfolio", "tuned mass"
MERGER = {"method": "task_arithmetic", "weight": 0.25, "lambda": 1.5}
GENERATIONS = {"algorithm": "evolver", "mode": "generational", "generations": 10**6}
SEARCHES: dict[str, dict[str, Any]] = {
    CLAIM: {"algorithm": "portfolio"},
    BASELINE: {"algorithm": "tpe", "tune": ["lambda"]},
    "random": {"algorithm": "random"},
    "cmaes": {"algorithm": "cmaes"},
    "cmaes, 3 groups": {"algorithm": "cmaes", "layer_groups": 3},
    "tpe, 3 groups": {"algorithm": "tpe", "layer_groups": 3},
    "tpe over ties": {"algorithm": "tpe", "method": "ties"},
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
POOLS = {"emotion-l3": ("tec", "crowdflower", "isear", "dailydialog")}


def main() -> None:
    """Run what is missing, and write the page."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--pool", choices=POOLS, default="emotion-l3")
    given.add_argument("--seeds", type=int, default=8)
    given.add_argument("--only", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    asked = given.parse_args()
    for seed in range(1, asked.seeds + 1):
        for name in asked.only:
            once(asked.pool, name, seed)
            PAGE.write_text(page(asked.pool))


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
    experts, data = cache_folder() / "experts" / pool, cache_folder() / "pools/data/emotion"
    tasks = [
        {"task": n, "data": str(data / n / "test.jsonl"), "dev": 150, "select": 150, "report": 500} for n in POOLS[pool]
    ]  # fmt: skip
    return {
        "run": run_of(name, seed),
        "seed": seed,
        "model": {"base": str(experts / "base"), "kind": "classifier", "compute": "bfloat16"},
        "experts": {n: str(experts / n) for n in POOLS[pool]},
        "search": SEARCHES[name],
        "budget": {"candidates": CANDIDATES},
        "evaluation": {"threads": 1, "tasks": tasks},
    }


def page(pool: str) -> str:
    """The page, from the runs that there are."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in SEARCHES:
        for seed in range(1, 100):
            if (file := summary_of(pool, name, seed)).exists():
                found.setdefault(name, {})[seed] = json.loads(file.read_text())
    compared = {name: _against(runs, found.get(BASELINE, {})) for name, runs in found.items()}
    corrected = _holm({n: p for n, (_, _, p, _) in compared.items() if n not in (CLAIM, BASELINE)})
    rows = []
    for name, runs in sorted(found.items(), key=lambda pair: -_mean(pair[1], "winner")):
        lead, reach, p, count = compared[name]
        p_text = "" if name == BASELINE or count < 2 else f"{corrected.get(name, p):.3g}"
        over = "" if name == BASELINE else f"{100 * lead:+.1f}" + (f" ± {100 * reach:.1f}" if count > 1 else "")
        rows.append([
            f"**{name}**" if name == CLAIM else name, str(len(runs)), f"{100 * _mean(runs, 'winner'):.1f}",
            f"{100 * (_mean(runs, 'winner') - _mean(runs, 'expert')):+.1f}", over, p_text,
            f"{np.mean([s['items'] for s in runs.values()]):,.0f}",
            f"{np.mean([s['seconds'] for s in runs.values()]):,.0f}",
        ])  # fmt: skip
    head = ["search", "seeds", "winner", "over the best expert", f"over {BASELINE}", "p", "dev items", "seconds"]
    return f"{HEAD.format(candidates=CANDIDATES, pool=pool)}\n\n{markdown_table(head, rows)}\n"


def _score(summary: dict[str, Any], whose: str) -> float:
    label = summary["best_expert"]
    return float(summary["winner"]["report"] if whose == "winner" else summary["report"][label])


def _mean(runs: dict[int, dict[str, Any]], whose: str) -> float:
    return float(np.mean([_score(s, whose) for s in runs.values()]))


def _against(runs: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]]) -> tuple[float, float, float, int]:
    """The mean lead over other runs of the same seeds, its 95 % half width and p by Student's t, and their number."""
    gaps = np.array([_score(runs[s], "winner") - _score(others[s], "winner") for s in runs if s in others])
    if len(gaps) < 2 or gaps.std() == 0:
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


HEAD = """\
# Which search finds most?

Made by `python tests/benchmarks/searches.py`. Every search has {candidates} candidates on the pool {pool}, with 150 dev
items, 150 select items and 500 report items of each of four tasks; each seed draws other items, the same for all
searches. Models compute in bfloat16. *winner* is the mean score of the winners on report items, in percent; a winner is
chosen among the six best candidates on dev and select items. The lead over task arithmetic with its total mass tuned
(*tuned mass*, a search of as many candidates) is a mean over the seeds that both have, with 95 % intervals of Student's
t over the seeds. The portfolio is the claim that was named beforehand; the p-values of the others are corrected by
Holm. *dev items* are those that the search scored, and *seconds* the time of its evaluations on one core, which was
often shared with other work."""


if __name__ == "__main__":
    main()
