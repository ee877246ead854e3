"""The pages that people read say what the code says."""

from pathlib import Path

import typer
from typer.testing import CliRunner

from evolver.commands.cli import app
from evolver.commands.reference import reference_page
from evolver.merging.methods import METHODS
from evolver.search import SEARCHES

ROOT = Path(__file__).parent.parent


def test_the_reference_is_current():
    assert (ROOT / "docs/reference.md").read_text() == reference_page(), "run: make docs"


def test_the_reference_names_every_method_and_search_with_its_settings():
    text = reference_page()
    for name in (*METHODS, *SEARCHES):
        assert f"### {name}\n" in text
    assert "| `density` | one number per expert | `1.0` | 0.05 – 1 |" in text


def test_the_pages_name_every_method_and_search():
    merging, searches = ((ROOT / "docs" / name).read_text() for name in ("merging.md", "searches.md"))
    assert all(f"`{name}`" in merging for name in METHODS)
    assert all(f"`{name}`" in searches for name in SEARCHES)


def test_every_command_has_a_page_of_help():
    runner = CliRunner()
    for name, command in typer.main.get_command(app).commands.items():
        said = runner.invoke(app, [name, "--help"], env={"COLUMNS": "120"})
        assert said.exit_code == 0
        assert len(said.output.splitlines()) < 50, name
        assert command.help
        assert all(p.help for p in command.params), name
        assert f"### `evolver {name}" in reference_page()
