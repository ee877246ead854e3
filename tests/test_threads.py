"""Threads that wait sleep, in every process that computes; and a run says where it has more of them than cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from toys import ROOT, evolver

from evolver import threads
from evolver.config.reading import config_at
from evolver.threads import SHORT_SPIN, let_threads_sleep, too_many, usable_cores, waiting

pytestmark = pytest.mark.whole


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, SHORT_SPIN),
        ({"HOME": "/"}, SHORT_SPIN),
        ({"GOMP_SPINCOUNT": "7"}, {**SHORT_SPIN, "GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "3"}, {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "3"}),
    ],
)
def test_what_the_user_has_set_stays(given, told):
    assert waiting(given) == told
    environment = dict(given)
    let_threads_sleep(environment)
    assert environment == given | told


def heard(*arguments, **given):
    """What the OpenMP runtime of a process says of itself as it is loaded, which it is with torch."""
    kept = {k: v for k, v in os.environ.items() if k not in {*SHORT_SPIN, "OMP_WAIT_POLICY"}}
    environment = {**kept, "OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT), **given}
    command = [sys.executable, *map(str, arguments)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True).stderr
    return {line.split("'")[1] for line in said.splitlines() if "GOMP_SPINCOUNT" in line}


@pytest.mark.whole
@pytest.mark.parametrize(
    "entry",
    [
        [ROOT / "evolve.py"],
        ["-m", "evolver", "run"],
        ["-m", "evolver", "validate"],
    ],
    ids=lambda entry: str(entry[-1]),
)
def test_the_runtime_of_every_entry_point_has_heard_of_it(entry, make_config, tmp_path):
    """A base that is no model is refused only after torch was imported."""
    (tmp_path / "empty").mkdir()
    config = make_config(tmp_path, {"model.base": str(tmp_path / "empty")})
    assert heard(*entry, config) == {SHORT_SPIN["GOMP_SPINCOUNT"]}


def test_the_runtime_hears_the_user_first():
    assert heard("-m", "evolver", "merge", "missing.yaml", "out", GOMP_SPINCOUNT="123") == {"123"}


JUDGE = """
import json, os, pathlib

def score(model, items):
    file = pathlib.Path(__file__).with_name("seen.json")
    file.write_text(json.dumps({n: os.environ.get(n) for n in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")}))
    return [0.5 for _ in items]
"""


@pytest.mark.parametrize("pool", [{"timeout_s": 100.0}, {"kind": "ray", "num_cpus": 0.5}], ids=["process", "ray"])
def test_workers_elsewhere_have_heard_of_it(pool, make_config, tasks, tmp_path, monkeypatch):
    import ray

    from cluster.job import make_pool
    from evolver.driver.prepare import prepare
    from evolver.records import Candidate

    for name in (*SHORT_SPIN, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "mine.py").write_text(JUDGE)
    task = {"task": "mine", "function": f"{tmp_path / 'mine.py'}:score", "data": str(tasks / "toy.jsonl")}
    ready = prepare(
        config_at(make_config(tmp_path, {"evaluation.tasks": [{**task, "dev": 4, "report": 4}], "pool": pool}))
    )
    made = make_pool(ready.plan, "dev", ready.tasks)
    try:
        made.submit(Candidate(0, ready.base, "test"))
        (result,) = made.wait()
        assert result.status == "ok", result.reason
    finally:
        made.close()
        ray.shutdown()
    assert json.loads((tmp_path / "seen.json").read_text()) == {**SHORT_SPIN, "OMP_WAIT_POLICY": None}


def group(folder, *files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files:
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 64), ("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("?", 64)]
)
def test_cores_are_those_of_mask_and_quota(tmp_path, monkeypatch, quota, cores):
    group(tmp_path, ("cpu.max", quota))
    monkeypatch.setattr(threads, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert usable_cores() == cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert usable_cores() == 1


def test_a_run_with_more_threads_than_cores_says_so(make_config, tmp_path, monkeypatch):
    assert too_many(1) is None
    file = make_config(tmp_path, {"evaluation.threads": 99})
    done = evolver("validate", file)
    assert done.code == 0
    assert "warning: evaluation.threads is 99, but this process may use only" in done.err
    assert "99" not in evolver("validate", make_config(tmp_path)).err
