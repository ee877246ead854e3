"""A worker in a process of its own: what hangs is killed, what dies is replaced, and the search goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from toys import ROOT, rows

from evolver.errors import BadInput
from evolver.process_pool import ProcessPool
from evolver.records import Candidate
from evolver.run import prepare

# The function knows the candidate by the sum of its weights, which the test writes down.
JUDGE = """
import json, os, pathlib, time

def score(model, items):
    here = pathlib.Path(__file__).parent
    weight = round(float(sum(p.double().sum() for p in model.module.parameters())), 6)
    said = json.loads((here / "said.json").read_text()) if (here / "said.json").exists() else {}
    what = said.get(str(weight))
    (here / "seen.txt").open("a").write(f"{weight}\\n")
    if what == "hang":
        time.sleep(600)
    if what == "die":
        os._exit(7)
    return [0.5 for _ in items]
"""


@pytest.fixture
def configured(make_config, tasks, tmp_path):
    (tmp_path / "mine.py").write_text(JUDGE)
    task = {"task": "mine", "function": f"{tmp_path / 'mine.py'}:score", "data": str(tasks / "toy.jsonl")}
    changes = {"evaluation.tasks": [{**task, "dev": 4, "report": 4}], "pool": {"timeout_s": 5.0, "retries": 1}}
    return make_config(tmp_path, changes)


def evaluate(pool, candidate):
    pool.submit(candidate)
    assert pool.free() == 0
    (result,) = pool.wait()
    return result


def test_what_hangs_is_killed_what_dies_is_tried_again_and_the_next_one_is_scored(configured, tmp_path):
    ready = prepare(str(configured))
    pool = ProcessPool(ready.plan, "dev")
    try:
        candidates = [Candidate(n, e, "test") for n, e in enumerate(ready.experts)]
        first = evaluate(pool, candidates[0])
        assert (first.status, first.items) == ("ok", (0.5,) * 4)
        evaluate(pool, candidates[1])
        a, b = (tmp_path / "seen.txt").read_text().split()
        (tmp_path / "said.json").write_text(json.dumps({a: "hang", b: "die"}))
        began = time.monotonic()
        hung = evaluate(pool, candidates[0])
        assert (hung.status, hung.reason) == ("failed", "timed out after 5 s")
        assert time.monotonic() - began < 60
        dead = evaluate(pool, candidates[1])
        assert (dead.status, dead.reason) == ("failed", "its worker died with status 7; tried 2 times")
        assert (tmp_path / "seen.txt").read_text().split().count(b) == 3
        third = evaluate(pool, candidates[2])
        assert (third.status, third.items) == ("ok", (0.5,) * 4)
    finally:
        pool.close()


def test_a_worker_that_cannot_be_built_is_one_sentence(configured):
    ready = prepare(str(configured))
    ready.plan.digests["base"] = "another"
    pool = ProcessPool(ready.plan, "dev")
    pool.submit(Candidate(0, ready.experts[0], "test"))
    with pytest.raises(BadInput, match="finds other weights than the driver"):
        pool.wait()
    pool.close()


def test_the_process_ends_with_its_driver(configured):
    code = (
        "import os, sys; from evolver.run import prepare; from evolver.process_pool import ProcessPool\n"
        "if __name__ == '__main__':\n"
        f"    p = ProcessPool(prepare({str(configured)!r}).plan, 'dev'); p._start()\n"
        "    print(p._process.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    driver = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    worker = int(driver.stdout)
    until = time.monotonic() + 20
    while time.monotonic() < until and _alive(worker):
        time.sleep(0.2)
    assert not _alive(worker)


def _alive(pid):
    try:
        return "Z" not in open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_whole_run_with_a_timeout(configured, tmp_path):
    command = [sys.executable, "evolve.py", str(configured), "--results", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "results" / "toy").values()
    assert {r["worker"] for r in found if r["items"]} == {"process"}
