"""What the docs tell a person to type is typed here; what they show as a file is one."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import toys
import yaml

from evolver.commands.cli import app
from evolver.ledger import answer_table
from evolver.ledger.retried import ORPHANED, RETRIED
from evolver.storage import storage_at
from evolver.workers.retrying import IN_A_ROW
from evolver.workers.worker import LONGEST_PAUSE_SECONDS

pytestmark = pytest.mark.whole

DOCS = toys.ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), toys.ROOT / "README.md", *(toys.ROOT / "cluster").rglob("*.md"),
                *(toys.ROOT / "configs").rglob("*.md")])  # fmt: skip


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def commands(page):
    return [line for block in blocks(page, "sh") for line in block.strip().splitlines()]


@pytest.fixture(scope="module")
def home(models, tasks, tmp_path_factory):
    """A folder in which the tutorial is followed, with the toys under the names of its models."""
    home = tmp_path_factory.mktemp("home")
    (home / "models").mkdir()
    for name, toy in {"base": "base", "maths": "a", "code": "b", "safety": "c", "code-lora": "lora",
                      "new": "a", "current": "b"}.items():  # fmt: skip
        (home / "models" / name).symlink_to(models / toy)
    (text,) = blocks("tutorial.md", "yaml")
    config = yaml.safe_load(text)
    config["evaluation"] |= {"include_path": str(tasks), "tasks": [config["evaluation"]["tasks"][0] | {"task": "toy"}]}
    for name in ("first", "safer", "other"):
        (home / f"{name}.yaml").write_text(yaml.safe_dump(config | {"run": name}))
    (home / "merge.yml").write_text(next(b for b in blocks("merging.md", "yaml") if "merge_method" in b))
    (text,) = blocks("../README.md", "yaml")
    config = yaml.safe_load(text)
    small = [t | {"task": toy, "metric": "acc", "dev": 20, "report": 10}
             for t, toy in zip(config["evaluation"]["tasks"], ("toy", "pair"), strict=True)]  # fmt: skip
    config["evaluation"] |= {"include_path": str(tasks), "tasks": small}
    (home / "my-first-merge.yaml").write_text(yaml.safe_dump(config | {"budget": {"candidates": 9}}))
    return home


def call(home, line):
    """A command as typed, in that home, with our ``evolver`` on the path."""
    (home / "bin").mkdir(exist_ok=True)
    script = home / "bin" / "evolver"
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(toys.ROOT)!r})\n"
                      "from evolver.commands.cli import main\nmain()\n")  # fmt: skip
    script.chmod(0o755)
    environment = {**os.environ, "HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-ec", line], cwd=home, env=environment, capture_output=True, text=True, check=False)


def type_all(page, home, monkeypatch):
    """Type the commands of a page, in this process."""
    monkeypatch.setenv("HOME", str(home))
    for line in commands(page):
        program, *arguments = shlex.split(line)
        assert program == "evolver"
        if arguments != ["dashboard"]:  # which ends with a key; tests/test_dashboard.py has it
            done = toys.evolver(*map(os.path.expanduser, arguments), cwd=home)
            fine = (0, 4, 5) if arguments[0] == "gate" else (0,)
            assert done.code in fine, f"{line}\n{done.out}\n{done.err}"


def test_the_tutorial_as_typed(home, monkeypatch):
    assert len(commands("tutorial.md")) > 7
    type_all("tutorial.md", home, monkeypatch)
    assert (home / "merged" / "model.safetensors").exists()
    assert (home / "adapter" / "adapter_model.safetensors").exists()
    assert (home / "merged.gguf").read_bytes()[:4] == b"GGUF"
    assert (home / "results" / "first" / "report.html").exists()
    assert (home / "shared" / "index.html").exists()
    assert answer_table(storage_at(home / "results" / "first")).num_rows > 0
    listing = (DOCS / "runs.md").read_text().split("| in a run's folder")[1].split("\n\n")[0]
    listed = re.findall(r"`([\w.]+/?)`", listing)
    there = {p.name for p in (home / "results" / "first").iterdir()}
    assert {name.rstrip("/") for name in listed} >= there


def test_the_readme_as_typed(home):
    """From the configuration that it shows to an exported model."""
    text = (DOCS / "../README.md").read_text()
    lines = [line.partition(" # ")[0].strip() for line in re.findall(r"^\.venv/bin/(.*)$", text, re.MULTILINE)]
    assert [line.split()[1] for line in lines] == ["run", "dashboard", "export"]
    for line in lines:
        if line != "evolver dashboard":
            done = call(home, line)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (home / "my-model" / "model.safetensors").exists()


@pytest.mark.parametrize("page", ["merging.md", "evaluation.md", "searches.md", "runs.md"])
def test_the_other_pages_as_typed(home, page, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    if page == "runs.md" and not (home / "results" / "first").exists():
        assert toys.evolver("run", "first.yaml", cwd=home).code == 0
    type_all(page, home, monkeypatch)


def test_no_command_is_left_out():
    """What is typed stands in ``sh`` blocks of the pages above; cluster.md is typed by tests/test_job.py."""
    typed = {"tutorial.md", "merging.md", "evaluation.md", "searches.md", "runs.md", "cluster.md"}
    assert {p.name for p in DOCS.glob("*.md") if commands(p.name)} <= typed
    for page in DOCS.glob("*.md"):
        assert not re.search(r"```\n(evolver|python|ray|make) ", page.read_text()), page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(toys.ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(toys.ROOT)))
def test_paths_of_the_project_lead_somewhere(page):
    folders = "evolver|cluster|configs|tests|docs|merging|evaluation|workers|checkpoints"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text()):
        assert (toys.ROOT / path).exists() or (toys.ROOT / "evolver" / path).exists(), path


def test_the_example_of_a_function_is_one():
    (text,) = (b for b in blocks("extending.md", "python") if not b.startswith("# "))  # the others are files
    names = {}
    exec(text, names)
    assert names["score"](None, [{"text": "short"}, {"text": "x" * 100}]) == [1.0, 0.0]


def test_every_command_is_in_the_docs():
    names = {(c.name or c.callback.__name__) for c in app.registered_commands}
    text = "".join(Path(p).read_text() for p in PAGES)
    assert {n for n in names if f"evolver {n}" not in text} == set()


def test_the_docs_say_how_failed_candidates_are_tried_again():
    """The numbers and words are those of the code."""
    runs = " ".join((DOCS / "runs.md").read_text().split())
    assert IN_A_ROW == 3
    assert "three candidates in a row" in runs
    assert f"up to {LONGEST_PAUSE_SECONDS:g} seconds" in runs
    assert {word for word in (RETRIED, ORPHANED) if f"`{word}`" not in runs} == set()
    for page in ("runs.md", "kept.md", "cluster.md"):
        assert "`--retry-failed`" in (DOCS / page).read_text(), page
