"""``ray job submit`` as a user types it: a stopped job goes on when it is submitted again under its id."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import httpx
import pytest
import toys
from test_classification import classify  # noqa: F401  # a fixture
from test_descent import configured  # noqa: F401  # a fixture

import cluster.job as job_of
from cluster.command import run_job
from cluster.job import RAY_JOB, submission_id
from cluster.jobs import NO_COMMAND, RayJobs
from evolver.runs.about import Job

pytestmark = [pytest.mark.ray, pytest.mark.whole]

RAY = str(Path(sys.executable).with_name("ray"))
# What docs/cluster.md has a person type: tokens on, a token, a head node, a job.
PAGE = (toys.ROOT / "docs" / "cluster.md").read_text()
EXPORT, TOKEN, START, SUBMIT = map(shlex.split, PAGE.split("```sh\n")[1].split("```")[0].strip().splitlines())
CHANGES = {"search.generations": 12, "budget.candidates": 36, "pool": {"num_workers": 2, "num_cpus": 0.5}}
# Scores follow from the weights. While there is a file named hold, no more than so many models are scored.
JUDGE = """
import pathlib, random, time

def score(model, items):
    here = pathlib.Path(__file__).parent
    with (here / "seen.txt").open("a") as file:
        file.write("x")
    while (here / "hold").exists() and len((here / "seen.txt").read_text()) > 20:
        time.sleep(0.05)
    draw = random.Random(round(float(sum(p.double().sum() for p in model.module.parameters())), 6))
    return [float(draw.random() < 0.5) for _ in items]
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A head node with tokens on: the address of its job API, and the environment in which its token is found."""
    folder = tmp_path_factory.mktemp("head")
    path = f"{Path(RAY).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(folder), "PATH": path, **dict(w.split("=") for w in EXPORT[1:])}
    environment.pop("RAY_ADDRESS", None)
    subprocess.run([RAY, *TOKEN[1:]], env=environment, check=True, capture_output=True)
    address = f"http://127.0.0.1:{toys.free_port()}"
    # All of them free ones: another node of Ray may run on this machine.
    kinds = ("port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "ray-client-server-port",
             "metrics-export-port", "runtime-env-agent-port")  # fmt: skip
    ports = [f"--{kind}={toys.free_port()}" for kind in kinds] + [f"--dashboard-port={address.rpartition(':')[2]}"]
    start = [RAY, *START[1:], "--block", *ports, "--num-cpus=2"]
    with (folder / "head.log").open("w") as log:
        node = subprocess.Popen(
            [*start, "--disable-usage-stats"], env=environment, stdout=log, stderr=log, start_new_session=True
        )

    try:
        while status_of(address, environment, "none") is None:
            assert node.poll() is None, (folder / "head.log").read_text()
            time.sleep(1)
        yield address, environment
    finally:
        node.terminate()  # ends what it started
        node.wait(60)


def status_of(address, environment, name):
    """What the job API says of a job: asked directly, as Ray's command line takes seconds; None: it does not answer."""
    token = (Path(environment["HOME"]) / ".ray" / "auth_token").read_text().strip()
    try:
        said = httpx.get(f"{address}/api/jobs/{name}", headers={"Authorization": f"Bearer {token}"}, timeout=30)
    except httpx.TransportError:
        return None
    return "NONE" if said.status_code == 404 else said.raise_for_status().json()["status"]


def ray_job(address, environment, command, *arguments):
    until = time.monotonic() + 600
    while True:
        done = subprocess.run(
            [RAY, "job", command, "--address", address, *arguments],
            cwd=toys.ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        said = done.stdout + done.stderr
        starting = "No available agent to submit job" in said
        if not starting or time.monotonic() > until:
            return done.returncode, said
        time.sleep(1)


@pytest.fixture
def job(head):
    """``job(command, *arguments)`` calls ``ray job``."""
    return partial(ray_job, *head)


@pytest.fixture
def act(head, tmp_path):
    """``act(action, **given)``: what the dashboard of ``tmp_path`` answers to an action on the run ``night``."""
    command = [sys.executable, "-m", "evolver", "dashboard", str(tmp_path), "--port", "0"]
    served = subprocess.Popen(command, cwd=toys.ROOT, env=head[1], stdout=subprocess.PIPE, text=True)
    with httpx.Client(follow_redirects=True, timeout=120) as browser:
        browser.base_url = browser.get(served.stdout.readline().strip()).url.copy_with(query=None)

        def answer(action, **given):
            return browser.post(f"/api/runs/night/{action}", headers={"x-evolver": "1"}, json=given).json()

        yield answer
    served.terminate()
    served.wait(30)


def submit(job, file, results, *options):
    here = {"python": sys.executable, "configs/demo.yaml": str(file), "~/runs": str(results)}
    assert SUBMIT[:4] == ["ray", "job", "submit", "--address"]
    return job("submit", *options, *(here.get(word, word) for word in SUBMIT[5:]))


def wait(job, until):
    began = time.monotonic()
    while not until():
        assert time.monotonic() - began < 600, job("logs", "night")
        time.sleep(0.1)


def test_a_job_is_stopped_resumed_and_extended_by_the_dashboard(head, job, act, make_config, tasks, tmp_path):
    """It goes on under its id, and comes to what a run here comes to."""

    def is_now(status):
        return status_of(*head, "night") == status

    (tmp_path / "mine.py").write_text(JUDGE)
    task = {"task": "mine", "function": f"{tmp_path / 'mine.py'}:score", "data": str(tasks / "toy.jsonl")}
    changes = {**CHANGES, "evaluation.tasks": [{**task, "dev": 40, "report": 20}], "evaluation.block_items": 40}
    file, night = make_config(tmp_path, changes), tmp_path / "night"  # the run has the job's name
    toys.run_here(make_config(tmp_path, {**changes, "pool": {"kind": "local"}}, "here.yaml"), tmp_path / "here")
    reference = tmp_path / "here" / "toy"
    (tmp_path / "seen.txt").unlink()
    (tmp_path / "hold").touch()

    code, said = submit(job, file, tmp_path, "--no-wait")
    assert code == 0, said
    wait(job, lambda: len(list((night / "ledger").glob("part-*"))) >= 15)
    assert "is running it already" in act("resume")["error"]
    assert act("stop") == {"said": "the run was asked to stop; everything that is finished is kept"}
    wait(job, lambda: not (night / "ledger" / "lease.json").exists())
    wait(job, lambda: is_now("STOPPED"))
    (tmp_path / "hold").unlink()
    said = job("logs", "night")[1]
    assert "stopped; everything that finished is kept" in said, said
    stopped = toys.essence(night)
    assert 10 <= len(stopped) < len(toys.essence(reference))

    assert act("resume") == {"said": "job night is submitted again"}
    wait(job, lambda: (night / "report.html").exists())
    wait(job, lambda: is_now("SUCCEEDED"))
    assert f"report: {night}/report.md" in job("logs", "night")[1]
    assert toys.essence(night) == toys.essence(reference)
    assert stopped.items() <= toys.essence(night).items()
    assert toys.winner(night) == toys.winner(reference)

    more = CHANGES["budget.candidates"] + 2
    assert act("resume", candidates=more) == {"said": "job night is submitted again"}
    wait(job, lambda: json.loads((night / "summary.json").read_text())["candidates"] == more)
    wait(job, lambda: is_now("SUCCEEDED"))
    wait(job, lambda: job("delete", "night")[0] == 0)
    assert "RAY_API_SERVER_ADDRESS" in act("resume")["error"]


def _of_every_search():
    """Settings with which each search runs, by its name."""
    from test_search import CONFIGURATIONS

    return {given["algorithm"]: given for given in reversed(CONFIGURATIONS.values())}


TWO_TASKS = {"evaluation.tasks": [{"task": t, "dev": 16, "report": 8} for t in ("toy", "pair")]}
OF_SEVERAL_TASKS = ("cycleqd", "hi_merging", "nsga2", "nsga3")
OWN_TASKS = {"statistics.tasks": {"a": ["toy"], "b": ["pair"]}}
OF_LABELS = ("adamerging", "fw_merging", "concrete", "defense_aware")


@pytest.fixture
def of_search(make_config, configured, tmp_path):  # noqa: F811
    """``of_search(name, pool)`` writes a configuration on which a search of this name can run."""

    def make(name, pool):
        search, more = _of_every_search()[name], {"budget": {"candidates": 12}, "pool": pool}
        if name in OF_LABELS:
            return configured(search, **more)
        changes = CHANGES | more | {"search": search} | (TWO_TASKS if name in OF_SEVERAL_TASKS else {})
        changes |= OWN_TASKS if name == "hi_merging" else {}
        return make_config(tmp_path, changes, f"{pool['kind']}.yaml")

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(_of_every_search()))
def test_every_search_runs_as_a_job_and_finds_what_it_finds_here(name, job, of_search, tmp_path):
    reference = toys.run_here(of_search(name, {"kind": "local"}), tmp_path)
    file = of_search(name, {"kind": "ray"} | CHANGES["pool"])
    given = ("--submission-id", f"every-{name}", "--working-dir", ".", "--", sys.executable, "evolve.py", str(file))
    code, said = job("submit", *given, "--results", str(tmp_path / "jobs"))
    assert code == 0, said
    done = tmp_path / "jobs" / f"every-{name}"
    assert toys.essence(done) == toys.essence(reference)
    assert toys.winner(done) == toys.winner(reference)


@pytest.mark.parametrize(("raised", "code"), [(job_of.Stopped, 3), (KeyboardInterrupt, 3), (ValueError, None)])
def test_a_signal_inside_of_compiled_code_is_a_signal(raised, code, make_config, tmp_path, monkeypatch):
    def wait(*given):
        raise SystemError("returned a result with an exception set") from raised()

    monkeypatch.setattr(job_of, "run", wait)
    given = [str(make_config(tmp_path)), "--results", str(tmp_path)]
    if code is None:
        with pytest.raises(SystemError):
            run_job(given)
    else:
        assert run_job(given) == code


def test_a_job_that_cannot_run_says_why_and_fails(job, make_config, tmp_path):
    file = make_config(tmp_path, {**CHANGES, "pool": {"num_gpus": 8}})
    given = ("--submission-id", "too-much", "--working-dir", ".")
    code, said = job("submit", *given, "--", sys.executable, "evolve.py", str(file), "--results", str(tmp_path))
    assert code != 0
    assert f"{file}: pool.num_gpus: a worker needs 8 GPU, and the best of 1 nodes has 0" in said
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


def test_a_job_whose_command_is_lost_is_not_submitted_again(monkeypatch):
    """Ray may write the last state of a job after it was deleted; what is left of the job then has no command."""

    class Client:
        def __init__(self, address):
            pass

        def get_job_info(self, name):
            return types.SimpleNamespace(entrypoint=NO_COMMAND)

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Client)
    toys.refused(
        lambda: RayJobs().resume(Job("night", "http://127.0.0.1:9"), []),
        "job night at http://127.0.0.1:9: the cluster no longer knows the job's command", "RAY_API_SERVER_ADDRESS",
    )  # fmt: skip
