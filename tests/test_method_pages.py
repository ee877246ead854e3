"""The pages of merge methods: every method stands on one of them, and their tables are those of the registry."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from method_pages import PAGES, kept, methods_of, modules_of, written

from evolver.merging.methods import METHODS

TEXTS = {page.name: page.read_text() for page in PAGES}


@pytest.mark.parametrize("name", TEXTS)
def test_the_tables_are_current(name):
    assert TEXTS[name] == written(TEXTS[name]), "run: make docs"


def test_every_method_stands_on_exactly_one_page():
    standing = Counter(m.name for text in TEXTS.values() for m in methods_of(text))
    missing = sorted(METHODS.keys() - standing.keys())
    assert not missing, f"add the module of {missing} to a line '<!-- methods of … -->' in docs/methods-*.md"
    modules = Counter(module for text in TEXTS.values() for module in modules_of(text))
    twice = sorted(module for module, count in modules.items() if count > 1)
    assert not twice, f"{twice} may be on one page only"


def test_pages_name_no_module_without_methods():
    there = {m.function.__module__.rpartition(".")[2] for m in METHODS.values()}
    assert {module for text in TEXTS.values() for module in modules_of(text)} == there


@pytest.mark.parametrize("name", TEXTS)
def test_every_method_is_explained_on_its_page(name):
    by_hand = TEXTS[name].partition("<!-- methods of")[0]
    missing = [m.name for m in methods_of(TEXTS[name]) if not re.search(rf"\b{m.name}\b", by_hand)]
    assert not missing, f"write the formulas of {missing} in docs/{name}"


def test_a_row_has_paper_settings_costs_and_scores():
    page = "# Page\n\n<!-- methods of sparse -->\n<!-- end of methods -->\nmore\n"
    scored = {"as it is": 0.714, "best": 0.83, "best mass": 2.0, "seeds": 3}
    text = written(page, {"small": {"ties": {"time": 14.2, "memory": 6.04}}}, {"small": {"ties": scored}})
    assert text.startswith("# Page\n\n<!-- methods of sparse -->\n")
    assert text.endswith("\n<!-- end of methods -->\nmore\n")
    (paper, costs) = (line for line in text.splitlines() if line.startswith("| `ties` |"))
    assert "Yadav et al. 2023" in paper
    assert "`density` 1 (0.05 – 1)" in paper
    assert "`trim_scope` tensor (or global)" in paper
    assert costs == "| `ties` | 14 | 6.0 | 0.71, 0.83 at 2 |"
    assert "| `della` | – | – | – |" in text.splitlines()
    assert written(text, {}, {}) == written(page, {}, {})


def test_columns_without_figures_are_left_out():
    page = "<!-- methods of sparse -->\n<!-- end of methods -->\n"
    text = written(page, {}, {})
    assert "| `ties` |" in text
    assert "time" not in text
    failed = {"as it is": None, "best": None, "best mass": None, "seeds": 3}
    assert "| `ties` | failed |" in written(page, {}, {"small": {"ties": failed}})


def test_a_benchmark_that_was_never_run_has_no_figures():
    assert kept("never.json") == {}
