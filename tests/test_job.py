"""``ray job submit`` as a user types it: a stopped job goes on when it is submitted again under its id."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toys

from cluster.job import RAY_JOB, submission_id

pytestmark = pytest.mark.ray

RAY = str(Path(sys.executable).with_name("ray"))
CHANGES = {"search.generations": 40, "budget.candidates": 120, "pool": {"num_workers": 2, "num_cpus": 0.5}}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """``job(command, *arguments)`` calls ``ray job`` against a head node with tokens on."""
    folder = tmp_path_factory.mktemp("head")
    path = f"{Path(RAY).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(folder), "RAY_AUTH_MODE": "token", "PATH": path}
    environment.pop("RAY_ADDRESS", None)
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    address = f"http://127.0.0.1:{free_port()}"
    dashboard = ("--dashboard-host=127.0.0.1", f"--dashboard-port={address.rpartition(':')[2]}")
    start = [RAY, "start", "--head", "--block", f"--port={free_port()}", *dashboard, "--num-cpus=2"]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            [*start, "--disable-usage-stats"], env=environment, stdout=log, stderr=log, start_new_session=True
        )

    def call(command, *arguments):
        done = subprocess.run(
            [RAY, "job", command, "--address", address, *arguments],
            cwd=toys.ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    try:
        while call("list")[0] != 0:
            assert head.poll() is None, (folder / "head.log").read_text()
            time.sleep(1)
        yield call
    finally:
        head.terminate()  # ends what it started
        head.wait(60)


def submit(job, file, results, *options):
    given = ("--submission-id", "night", "--working-dir", ".", *options)
    return job("submit", *given, "--", sys.executable, "evolve.py", str(file), "--results", str(results))


def test_a_stopped_job_goes_on_under_its_id(job, make_config, tmp_path):
    file = make_config(tmp_path, CHANGES)
    toys.run_here(make_config(tmp_path, {**CHANGES, "pool": {"kind": "local"}}, "here.yaml"), tmp_path / "here")
    reference = tmp_path / "here" / "toy"

    code, said = submit(job, file, tmp_path, "--no-wait")
    assert code == 0, said
    ledger = tmp_path / "night" / "ledger"  # the run has the job's name
    began = time.monotonic()
    while len(list(ledger.glob("part-*"))) < 40:
        assert time.monotonic() - began < 200, job("logs", "night")
        time.sleep(0.05)
    job("stop", "night")
    assert "STOPPED" in job("status", "night")[1].upper()
    assert "stopped; everything that finished is kept" in job("logs", "night")[1]
    stopped = toys.essence(tmp_path / "night")
    assert 15 <= len(stopped) < len(toys.essence(reference))

    code, said = job("delete", "night")  # Ray keeps an id until then
    assert code == 0, said
    code, said = submit(job, file, tmp_path)
    assert code == 0, said
    assert "succeeded" in said
    assert f"report: {tmp_path / 'night'}/report.md" in said
    assert toys.essence(tmp_path / "night") == toys.essence(reference)
    assert stopped.items() <= toys.essence(tmp_path / "night").items()
    assert toys.winner(tmp_path / "night") == toys.winner(reference)


def test_a_job_that_cannot_run_says_why_and_fails(job, make_config, tmp_path):
    file = make_config(tmp_path, {**CHANGES, "pool": {"num_gpus": 8}})
    given = ("--submission-id", "too-much", "--working-dir", ".")
    code, said = job("submit", *given, "--", sys.executable, "evolve.py", str(file), "--results", str(tmp_path))
    assert code != 0
    assert f"{file}: pool.num_gpus: a worker asks for 8 GPU, and the best of 1 nodes has 0" in said
    assert not (tmp_path / "too-much").exists()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, None),
        ('{"metadata": {"job_submission_id": "night"}}', "night"),
        ('{"metadata": {"job_submission_id": "raysubmit_8GDv"}}', None),
        ('{"metadata": {}}', None),
    ],
)
def test_only_an_id_that_somebody_chose_names_a_run(monkeypatch, given, found):
    monkeypatch.delenv(RAY_JOB, raising=False)
    if given:
        monkeypatch.setenv(RAY_JOB, given)
    assert submission_id() == found
