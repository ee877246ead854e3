"""The examples of docs/extending.md, each written to the place that it names, and used in one run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toys
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.whole

PAGE = (toys.ROOT / "docs" / "extending.md").read_text()


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the project with the examples in it."""
    copy = tmp_path_factory.mktemp("project")
    for package in ("evolver", "cluster"):
        shutil.copytree(toys.ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE, re.DOTALL):
        assert not (copy / path).exists()
        (copy / path).write_text(text)
    return copy


def evolver(extended, *arguments):
    code = "from evolver.commands.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=extended, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(extended)},
    )  # fmt: skip


def test_each_example_is_one_file():
    assert len(re.findall(r"```python\n# \S+\.py\n", PAGE)) == 7


def test_what_is_added_is_found(extended):
    for command, name, said in (
        ("methods", "halfway", "Nobody 2026"),
        ("methods", "energy", "It needs statistics of the experts on dev items (input-energy)"),
        ("searches", "hill", "standard deviation of a move"),
    ):
        done = evolver(extended, command, name)
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout


@pytest.mark.parametrize("method", ["halfway", "energy"])
def test_what_is_added_makes_a_run(extended, models, make_config, tmp_path, method):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"the {a} {b} the {a}"}) + "\n" for a in toys.THINGS for b in toys.THINGS)
    )
    base, tuned = (load_file(models / name / "model.safetensors") for name in ("base", "c"))
    (tmp_path / "c").mkdir()
    save_file({name: tensor - base[name] for name, tensor in tuned.items()}, tmp_path / "c" / "delta.safetensors")
    task = {"task": "mine", "judge": "last-token", "data": str(texts), "dev": 12, "report": 12}
    changes = {
        "evaluation.tasks": [task], "search": {"algorithm": "hill", "method": method}, "pool": {"kind": "batches"},
        "experts.c": str(tmp_path / "c"), "budget": {"candidates": 5}, "loggers": {"lines": {"name": "table.csv"}},
    }  # fmt: skip
    done = evolver(extended, "run", make_config(tmp_path, changes), "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    found = toys.rows(Path(tmp_path / "toy"))
    searched = [row for (stage, _), row in found.items() if stage == "search"]
    assert len(searched) == 5
    assert {row["status"] for row in found.values()} == {"ok"}
    assert all(method in row["recipe"] for row in searched)
    assert done.stderr.count("input-energy of") == (3 if method == "energy" else 0)
    assert "hill" in (tmp_path / "toy" / "report.md").read_text()
    head, *lines = (tmp_path / "toy" / "table.csv").read_text().splitlines()
    assert head == "step,candidate,score"
    scores = {number: row["score"] for (stage, number), row in found.items() if stage == "search"}
    assert {int(n): float(score) for _, n, score in (line.split(",") for line in lines)} == scores
    assert [line.split(",")[0] for line in lines] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loggers": {"line": {}}}, "loggers.line: unknown logger; did you mean 'lines'"),
        ({"loggers": {"lines": {"nam": "x"}}}, "loggers.lines.nam: unknown key"),
        ({"pool": {"kind": "batch"}}, "pool.kind: unknown pool 'batch'"),
        ({"evaluation.tasks": [{"task": "mine", "judge": "last-tokens", "dev": 1, "report": 1}]},
         "evaluation.tasks[0].judge: unknown judge 'last-tokens'; did you mean 'last-token'"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_told_with_the_nearest(extended, make_config, tmp_path, changes, said):
    file = make_config(tmp_path, changes)
    done = evolver(extended, "run", file, "--results", tmp_path / "results")
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "results").exists()


LAWS = {
    "test_search.py::test_every_search_is_held_to_the_laws": "the search 'hill' is held to no law; add a",
    "test_judge_laws.py::test_every_judge_has_a_toy": "the judge 'last-token' is held to no law; add to TOYS",
    "test_logger_laws.py::test_every_logger_has_a_toy": "the logger 'lines' is held to no law; add to TOYS",
    "test_format_laws.py::test_every_format_has_a_toy": "the format 'difference' is held to no law",
}


def test_the_laws_say_what_they_need_of_what_is_added(extended):
    shutil.copytree(toys.ROOT / "tests", extended / "tests", dirs_exist_ok=True)
    shutil.copyfile(toys.ROOT / "pyproject.toml", extended / "pyproject.toml")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(f"tests/{law}" for law in LAWS)],
        cwd=extended, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(extended)}, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{len(LAWS)} failed" in done.stdout
    assert [law for law, said in LAWS.items() if said not in done.stdout] == []
