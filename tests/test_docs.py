"""What the docs tell a person to type is typed here; what they show as a file is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import toys
import yaml

from evolver.ledger import answers
from evolver.storage import storage_at

DOCS = toys.ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), toys.ROOT / "README.md", *(toys.ROOT / "cluster").rglob("*.md"),
                *(toys.ROOT / "configs").rglob("*.md")])  # fmt: skip


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def home(models, tasks, tmp_path_factory):
    """A folder in which the tutorial is followed, with the toys under the names of its models."""
    home = tmp_path_factory.mktemp("home")
    (home / "models").mkdir()
    for name, toy in {"base": "base", "maths": "a", "code": "b", "safety": "c"}.items():
        (home / "models" / name).symlink_to(models / toy)
    (text,) = blocks("tutorial.md", "yaml")
    config = yaml.safe_load(text)
    config["evaluation"] |= {"include_path": str(tasks), "tasks": [config["evaluation"]["tasks"][0] | {"task": "toy"}]}
    (home / "first.yaml").write_text(yaml.safe_dump(config))
    return home


def call(home, line):
    """A command as typed, in that home, with our ``evolver`` on the path."""
    (home / "bin").mkdir(exist_ok=True)
    script = home / "bin" / "evolver"
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(toys.ROOT)!r})\n"
                      "from evolver.cli import main\nmain()\n")  # fmt: skip
    script.chmod(0o755)
    environment = {**os.environ, "HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-ec", line], cwd=home, env=environment, capture_output=True, text=True, check=False)


def test_the_tutorial_as_typed(home):
    lines = [line for block in blocks("tutorial.md", "sh") for line in block.strip().splitlines()]
    assert len(lines) > 7
    for line in lines:
        if line != "evolver dashboard":  # which ends with a key; tests/test_dashboard.py has it
            done = call(home, line)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (home / "merged" / "model.safetensors").exists()
    assert (home / "adapter" / "adapter_model.safetensors").exists()
    assert (home / "merged.gguf").read_bytes()[:4] == b"GGUF"
    assert (home / "results" / "first" / "report.html").exists()
    assert answers(storage_at(home / "results" / "first")).num_rows > 0
    listing = (DOCS / "runs.md").read_text().split("| in a run's folder")[1].split("\n\n")[0]
    listed = re.findall(r"`([\w.]+/?)`", listing)
    there = {p.name for p in (home / "results" / "first").iterdir()} - {"candidates.csv"}
    assert {name.rstrip("/") for name in listed} >= there


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(toys.ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_example_of_a_function_is_one():
    (text,) = blocks("extending.md", "python")
    names = {}
    exec(text, names)
    assert names["score"](None, [{"text": "short"}, {"text": "x" * 100}]) == [1.0, 0.0]


def test_every_command_is_in_the_docs():
    from evolver.cli import app

    names = {(c.name or c.callback.__name__) for c in app.registered_commands}
    text = "".join(Path(p).read_text() for p in PAGES)
    assert {n for n in names if f"evolver {n}" not in text} == set()
