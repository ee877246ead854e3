"""A worker in a process of its own: what hangs is killed, what dies is replaced, and the search goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from toys import ROOT

from cluster.pools import pool_named
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.records import Candidate
from evolver.workers.crew_pool import CrewPool
from evolver.workers.pools.local import LocalPool
from evolver.workers.process import ProcessCrew

pytestmark = pytest.mark.whole

# The function knows the candidate by the sum of its weights, which the test writes down.
JUDGE = """
import json, multiprocessing, os, pathlib, time

def score(model, items):
    assert not multiprocessing.current_process().daemon  # which could have no children
    here = pathlib.Path(__file__).parent
    weight = round(float(sum(p.double().sum() for p in model.module.parameters())), 6)
    said = json.loads((here / "said.json").read_text()) if (here / "said.json").exists() else {}
    what = said.get(str(weight)) or said.get("all")
    (here / "seen.txt").open("a").write(f"{weight}\\n")
    if what == "hang":
        time.sleep(10_000)  # were it waited for, a test would not end
    if what == "die":
        os._exit(7)
    return [0.5 for _ in items]
"""


@pytest.fixture
def configured(make_config, tasks, tmp_path):
    (tmp_path / "mine.py").write_text(JUDGE)
    task = {"task": "mine", "function": f"{tmp_path / 'mine.py'}:score", "data": str(tasks / "toy.jsonl")}
    changes = {"evaluation.tasks": [{**task, "dev": 4, "report": 4}], "pool": {"timeout_s": 10.0, "retries": 1}}
    return make_config(tmp_path, changes)


def evaluate(pool, candidate):
    pool.submit(candidate)
    assert pool.free() == 0
    (result,) = pool.wait()
    return result


def test_what_hangs_is_killed_what_dies_is_tried_again_and_the_next_one_is_scored(configured, tmp_path):
    ready = prepare(config_at(configured))
    pool = CrewPool(ProcessCrew(ready.plan, "dev"), ready.plan.config.pool, eager=False)
    try:
        candidates = [Candidate(n, e, "test") for n, e in enumerate(ready.experts)]
        first = evaluate(pool, candidates[0])
        assert (first.status, first.items) == ("ok", (0.5,) * 4)
        evaluate(pool, candidates[1])
        a, b = (tmp_path / "seen.txt").read_text().split()
        (tmp_path / "said.json").write_text(json.dumps({a: "hang", b: "die"}))
        hung = evaluate(pool, candidates[0])
        assert (hung.status, hung.reason) == ("failed", "timed out after 10 s")
        dead = evaluate(pool, candidates[1])
        assert (dead.status, dead.reason) == ("failed", "its worker died (status 7); tried 2 times")
        assert (tmp_path / "seen.txt").read_text().split().count(b) == 3
        third = evaluate(pool, candidates[2])
        assert (third.status, third.items) == ("ok", (0.5,) * 4)
    finally:
        pool.close()


def test_a_worker_that_cannot_be_built_is_one_sentence(configured):
    ready = prepare(config_at(configured))
    ready.plan.digests["base"] = "another"
    pool = CrewPool(ProcessCrew(ready.plan, "dev"), ready.plan.config.pool, eager=False)
    pool.submit(Candidate(0, ready.experts[0], "test"))
    with pytest.raises(BadInput, match="finds different weights than the driver"):
        pool.wait()
    pool.close()


# A driver that is killed while an evaluation hangs.
DRIVER = """
import multiprocessing, os, pathlib, sys, threading, time
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.records import Candidate
from evolver.workers.crew_pool import CrewPool
from evolver.workers.process import ProcessCrew

def die():
    while not seen.exists():
        time.sleep(0.1)
    print(multiprocessing.active_children()[0].pid, flush=True)
    os.kill(os.getpid(), 9)

if __name__ == "__main__":
    seen = pathlib.Path(sys.argv[2])
    ready = prepare(config_at(sys.argv[1]))
    pool = CrewPool(ProcessCrew(ready.plan, "dev"), ready.plan.config.pool, eager=False)
    threading.Thread(target=die, daemon=True).start()
    pool.submit(Candidate(0, ready.experts[0], "test"))
    pool.wait()
"""


def test_the_process_ends_with_its_driver_even_while_it_hangs(configured, tmp_path):
    (tmp_path / "said.json").write_text(json.dumps({"all": "hang"}))
    file = tmp_path / "patient.yaml"
    file.write_text(configured.read_text().replace("timeout_s: 10.0", "timeout_s: 500.0"))
    command = [sys.executable, "-c", DRIVER, str(file), str(tmp_path / "seen.txt")]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as driver:
        worker = int(driver.stdout.readline())
        assert driver.wait() == -9
    until = time.monotonic() + 20
    while time.monotonic() < until and _alive(worker):
        time.sleep(0.2)
    left = _alive(worker)
    if left:
        os.kill(worker, 9)
    assert not left


def _alive(pid):
    try:
        return "Z" not in open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_local_worker_has_a_process_of_its_own_where_there_is_a_timeout(configured, make_config, tmp_path):
    for file, kind in ((configured, CrewPool), (make_config(tmp_path, name="plain.yaml"), LocalPool)):
        ready = prepare(config_at(file))
        assert type(pool_named("local")(ready.plan, "dev", ready.tasks)) is kind
