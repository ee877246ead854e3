"""The pages that people read say what the code says."""

from pathlib import Path

from evolver.merging.methods import METHODS
from evolver.reference import page
from evolver.search import SEARCHES

ROOT = Path(__file__).parent.parent


def test_the_reference_is_current():
    assert (ROOT / "docs/reference.md").read_text() == page(), "run: make docs"


def test_the_reference_names_every_method_and_search_with_its_settings():
    text = page()
    for name in (*METHODS, *SEARCHES):
        assert f"### {name}\n" in text
    assert "| `density` | E numbers | `1.0` | 0.05 – 1 |" in text


def test_the_readme_names_every_method_and_search():
    text = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in text for name in (*METHODS, *SEARCHES))
