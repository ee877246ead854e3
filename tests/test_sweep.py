"""Sweeps: every combination is a run, done ones are left, and the table says what came out."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import toys
import yaml
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from cluster.sweep import gather, load_sweep, run_all
from evolver.commands.cli import app
from evolver.errors import BadInput

pytestmark = pytest.mark.whole

SEARCH = [{"algorithm": "tpe", "startup": 2}, {"algorithm": "evolver", "mode": "generational", "generations": 1}]


@pytest.fixture
def made(make_config, tmp_path, monkeypatch):
    """``made(vary)``: a sweep file beside the configuration that it varies; the working folder is empty."""
    make_config(tmp_path, {"budget.candidates": 3})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(toys.ROOT))

    def write(vary, **more):
        file = tmp_path / "sweep.yaml"
        file.write_text(yaml.safe_dump({"sweep": "grid", "config": "run.yaml", "vary": vary} | more))
        return file

    return write


def test_every_combination_is_a_run_of_its_own(made):
    sweep = load_sweep(made({"search": SEARCH, "seed": [0, 1], "evaluation.tasks.0.dev": [10]}))
    assert [c.values for c in sweep.cells] == [
        {"search": s, "seed": seed, "evaluation.tasks.0.dev": 10} for s in SEARCH for seed in (0, 1)
    ]
    assert len({c.name for c in sweep.cells}) == 4
    for cell in sweep.cells:
        assert cell.config["run"] == cell.name
        assert cell.config["search"] == cell.values["search"]
        assert cell.config["seed"] == cell.values["seed"]
        assert cell.config["evaluation"]["tasks"][0]["dev"] == 10


def test_a_larger_grid_keeps_the_names_of_what_was_in_it(made):
    small = {c.name for c in load_sweep(made({"seed": [1, 2]})).cells}
    large = {c.name for c in load_sweep(made({"seed": [0, 1, 2, 3]})).cells}
    assert small < large


@pytest.mark.parametrize(
    ("vary", "says"),
    [
        ({"seed": []}, "vary.seed: the list is empty"),
        ({"seed": [1, 1]}, "vary: a value is listed twice"),
        ({"sead": [1]}, r"sead: unknown key; .*seed"),
        ({"seed": ["one"]}, r"\(seed one\): seed: 'one' is not usable; write an integer"),
        ({"evaluation.tasks.7.dev": [1]}, "vary.evaluation.tasks.7.dev: the configuration has no such key"),
        ({}, "vary"),
    ],
)
def test_bad_sweeps_are_one_sentence(made, vary, says):
    with pytest.raises(BadInput, match=says) as refused:
        load_sweep(made(vary))
    assert "\n" not in str(refused.value)


def test_a_sweep_is_run_once_and_gathered(made, tmp_path):
    sweep = load_sweep(made({"seed": [0, 1]}))
    said = []
    assert run_all(sweep, "results", 2, None, said.append) == {c.name: 0 for c in sweep.cells}
    table = gather(sweep, "results")
    for cell in sweep.cells:
        summary = json.loads((tmp_path / "results" / cell.name / "summary.json").read_text())
        assert summary["candidates"] == 3
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {cell.name} ")]
        assert f" {summary['winner']['report']:.4f} " in row
        assert f" {summary['against']['difference']:+.4f} " in row
    assert "| all | 2 |" in table
    assert (tmp_path / "results" / "grid.md").read_text() == f"# grid\n\n{table}\n"
    said.clear()
    run_all(sweep, "results", 1, None, said.append)
    assert all("done already" in line for line in said)


class Jobs:
    """Ray's client for jobs, without a cluster: a job runs at once, in the working folder itself."""

    def __init__(self, address):
        self.ended = {}

    def list_jobs(self):
        return []

    def submit_job(self, entrypoint, submission_id, runtime_env):
        first = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        command, folder = shlex.split(entrypoint), runtime_env["working_dir"]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | first, capture_output=True, text=True, check=False
        )  # fmt: skip
        self.ended[submission_id] = done

    def get_job_status(self, name):
        return JobStatus.FAILED if self.ended[name].returncode else JobStatus.SUCCEEDED

    def get_job_logs(self, name):
        return self.ended[name].stderr


def test_a_job_of_a_sweep_needs_no_clone_in_the_working_folder(made, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Jobs)
    monkeypatch.setattr("cluster.sweep.check_dashboard", lambda address: None)  # nothing listens there
    sweep = load_sweep(made({"seed": [0]}))
    assert not (tmp_path / "evolve.py").exists()
    said = []
    assert run_all(sweep, "results", 1, "http://127.0.0.1:8265", said.append) == {sweep.cells[0].name: 0}, said
    assert (tmp_path / "results" / sweep.cells[0].name / "summary.json").exists()


def test_the_command_says_which_run_failed_and_shows_the_others(made, tmp_path):
    file = made(
        {"experts.a": [str(tmp_path / "gone"), yaml.safe_load((tmp_path / "run.yaml").read_text())["experts"]["a"]]}
    )
    done = CliRunner().invoke(app, ["sweep", str(file)])
    assert done.exit_code == 3
    assert "ended with status 2" in done.output
    assert "experts.a: there is no folder" in done.output
    rows = [line for line in done.output.splitlines() if line.startswith("| grid-")]
    assert [" – | – | – " in row for row in rows] == [True, False]
