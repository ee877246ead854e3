"""The Python API, and its example as docs/python.md shows it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import toys
import yaml

import evolver
from evolver.errors import BadInput

pytestmark = pytest.mark.whole


@pytest.fixture
def home(models, make_config, tmp_path, monkeypatch):
    """A folder with what the example names."""
    (tmp_path / "models").symlink_to(models)
    experts = [{"model": str(models / n), "parameters": {"weight": 0.5}} for n in ("a", "b")]
    given = {"merge_method": "task_arithmetic", "base_model": str(models / "base"), "models": experts}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(given))
    make_config(tmp_path, {"budget.candidates": 6}, "first.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_is_one(home, capsys):
    pytest.importorskip("pandas")
    (text,) = re.findall(r"```python\n(.*?)```", (toys.ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    found: dict = {}
    exec(text, found)
    assert (home / "merged" / "model.safetensors").exists()
    assert found["best"]["score"] == max(
        r["score"] or 0 for (s, _), r in toys.rows(home / found["folder"]).items() if s == "search"
    )
    assert set(found["items"].column_names) >= {"stage", "number", "recipe_id", "task", "hash", "answer"}
    said = capsys.readouterr().out
    assert "models/base: 0." in said
    assert "best: 0." in said


def test_a_configuration_may_be_a_mapping_and_a_run_goes_on(home):
    given = yaml.safe_load((home / "first.yaml").read_text())
    folder = evolver.run(given, home / "results", name="again")
    before = evolver.ledger_table(folder)
    assert evolver.run(given, home / "results", name="again") == folder
    assert evolver.ledger_table(folder) == before
    with pytest.raises(BadInput, match=r"^config: serach: unknown key; did you mean 'search'\?"):
        evolver.run({**given, "serach": {}}, home / "results")


def test_all_that_is_offered_is_documented():
    page = (toys.ROOT / "docs" / "python.md").read_text()
    for name in evolver.__all__:
        assert getattr(evolver, name).__doc__
        assert f"| `{name}(" in page
    with pytest.raises(AttributeError, match="has no attribute 'marge'"):
        evolver.marge  # noqa: B018


def test_importing_evolver_brings_nothing_heavy():
    code = "import sys, evolver; print([m for m in ('torch', 'ray', 'transformers', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=toys.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
