"""Anything of a cluster is killed at random moments: driver, workers, raylet. The run ends as if nothing had happened.

``make prove`` runs it; ``EVOLVER_KILLS=50`` is the long form.
"""

from __future__ import annotations

import collections
import os
import random
import signal
import subprocess

import psutil
import pytest
import toys
from toys import all_rows, essence, rows, run_here

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KILLS = int(os.environ.get("EVOLVER_KILLS", "2"))
# Scores follow from the weights, take their time, and every call is written down.
JUDGE = """
import pathlib, random, time

def score(model, items):
    weight = round(float(sum(p.double().sum() for p in model.module.parameters())), 6)
    with (pathlib.Path(__file__).parent / "seen.txt").open("a") as file:
        file.write(f"{weight} {len(items)}\\n")
    time.sleep(0.3)
    draw = random.Random(weight)
    return [float(draw.random() < 0.5) for _ in items]
"""


@pytest.fixture
def configured(make_config, tasks, tmp_path):
    """A sequential search, so that workers run ahead on guesses, too: for Ray, and for this process."""
    (tmp_path / "mine.py").write_text(JUDGE)
    task = {"task": "mine", "function": f"{tmp_path / 'mine.py'}:score", "data": str(tasks / "toy.jsonl")}
    changes = {
        "search.generations": 12, "budget.candidates": 36, "evaluation.block_items": 40,
        "evaluation.tasks": [{**task, "dev": 40, "report": 20}],
    }  # fmt: skip
    ray = {"kind": "ray", "num_workers": 2, "num_cpus": 0.5, "retries": 100}
    return make_config(tmp_path, {**changes, "pool": ray}), make_config(tmp_path, changes, "here.yaml")


def victims(driver, kind):
    """The processes of a driver's own cluster that are of a kind."""
    if kind == "driver":
        return [driver]
    wanted = {"worker": "ray::PopulationWorker", "raylet": "raylet/raylet"}[kind]
    found = []
    for child in psutil.Process(driver.pid).children(recursive=True):
        try:
            if child.cmdline() and wanted in child.cmdline()[0]:
                found.append(child)
        except psutil.Error:
            continue
    return found


def storm(file, results, kinds, seed):
    """Run a configuration to its end, through blows at random moments; how many fell on what."""
    draw, kinds, fallen = random.Random(seed), list(kinds), collections.Counter()
    while True:
        process = subprocess.Popen(toys.command(file, results), cwd=toys.ROOT, stdout=subprocess.PIPE, text=True)
        while True:
            try:
                process.wait(draw.uniform(1.0, 6.0))
                break
            except subprocess.TimeoutExpired:
                found = victims(process, kinds[0]) if kinds else []
                if found:
                    os.kill(draw.choice(found).pid, signal.SIGKILL)
                    fallen[kinds.pop(0)] += 1
        out = process.stdout.read()
        if process.returncode == 0:
            return fallen, out
        assert fallen["driver"] + fallen["raylet"], out  # workers are replaced: nobody calls again


STORMS = {"anything": ["driver", "worker", "raylet"] * max(1, KILLS // 3)}
if "EVOLVER_KILLS" in os.environ:
    STORMS["workers"] = ["worker"] * KILLS


@pytest.mark.parametrize("kinds", STORMS.values(), ids=STORMS.keys())
def test_a_run_through_a_storm_is_the_run_without(configured, tmp_path, kinds):
    there, here = configured
    reference = run_here(here, tmp_path / "here")
    (tmp_path / "seen.txt").unlink()
    fallen, out = storm(there, tmp_path / "there", kinds, seed=7)
    folder = tmp_path / "there" / "toy"
    assert "warning" not in out
    assert essence(folder) == essence(reference)
    assert toys.winner(folder) == toys.winner(reference)
    finished = [row for row in rows(folder).values() if not row["reused"]]
    guessed = all_rows(folder, "guessed")
    seen = len((tmp_path / "seen.txt").read_text().splitlines())
    recorded = {(r["stage"], r["number"], r["recipe_id"]) for r in [*finished, *guessed]}
    # What was recorded was scored once; a blow costs what it hits: one evaluation, or both with driver and raylet.
    again = seen - len(recorded) - 1  # the last model is scored anew when it is exported
    assert 0 <= again <= fallen["worker"] + 2 * (fallen["driver"] + fallen["raylet"]) + 2
    print(f"survived: {dict(fallen)}, {again} evaluations again")
