"""Writes the tables of the pages of merge methods: ``python tests/method_pages.py``, which ``make docs`` calls.

A page docs/methods-*.md has the line ``<!-- methods of MODULE … -->``, with modules of evolver/merging/methods. What
stands between it and ``<!-- end of methods -->`` is made of the registry, and of what benchmarks measured: the time and
the memory that results/benchmarks/methods_cost.json holds, and the scores of results/benchmarks/systems.json. Where one
of these files is missing, its columns are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evolver.commands.words import default_of, searched_of
from evolver.merging.methods import METHODS, Method, Setting
from evolver.report.text import markdown_table

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("methods-*.md"))
FIGURES = ROOT / "results" / "benchmarks"
PART = re.compile(r"(<!-- methods of ([\w ]+) -->\n).*?(<!-- end of methods -->)", re.DOTALL)
ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
Figures = Mapping[str, Mapping[str, Mapping[str, Any]]]

SETTINGS_TEXT = """\
Made by `make docs` from the code. Behind a setting stands its default, and in brackets what a search may choose;
[the reference](reference.md) lists settings one by one."""
COSTS_TEXT = """\
*time* is how often the base, the experts and the merge could be copied in memory while the method merges them, with
nothing in a cache. *memory* is the peak, in copies of the largest tensor in float32; the experts' own tensor is among
them, once for each. [The figures](../results/benchmarks/methods_cost.md) say on which models and on which machine."""
SCORES_TEXT = """\
The columns with names of pools say what the merge did there: the mean over the tasks of its score divided by that of
the task's own expert, so that 1 is as good as the experts, each on its own task. First the method as it is by default,
then the best of several total masses, and that mass ([the runs](../results/benchmarks/systems.md))."""


def kept(name: str) -> Figures:
    """The figures of a benchmark: by pool and method; none where the file is missing."""
    file = FIGURES / name
    return json.loads(file.read_text()) if file.exists() else {}


def modules_of(page: str) -> list[str]:
    """The modules whose methods stand on a page."""
    return [module for _, modules, _ in PART.findall(page) for module in modules.split()]


def methods_of(page: str) -> list[Method]:
    """The methods that stand on a page, module by module."""
    modules = modules_of(page)
    found = [m for m in METHODS.values() if _module(m) in modules]
    return sorted(found, key=lambda m: (modules.index(_module(m)), m.name))


def written(page: str, costs: Figures | None = None, scores: Figures | None = None) -> str:
    """The page with its tables made anew, of these figures or of those that are kept."""
    costs = kept("methods_cost.json").get("pools", {}) if costs is None else costs
    scores = kept("systems.json") if scores is None else scores
    parts = "\n\n".join(tables(methods_of(page), costs, scores))
    return PART.sub(lambda found: f"{found[1]}\n{parts}\n\n{found[3]}", page)


def tables(methods: Sequence[Method], costs: Figures, scores: Figures) -> list[str]:
    """What is said of these methods: their papers and settings, and beneath what was measured."""
    rows = [[f"`{m.name}`", linked(m.paper), settings_of(m)] for m in methods]
    parts = [SETTINGS_TEXT, markdown_table(["method", "paper", "settings"], rows)]
    asked = [("time", costs, time_of), ("memory", costs, memory_of), ("scores", scores, scores_of)]
    columns = [
        (f"{what}, {pool}", _reader(found, said))
        for what, figures, said in asked
        for pool, found in figures.items()
        if any(m.name in found for m in methods)
    ]
    if columns:
        rows = [[f"`{m.name}`", *(said(m.name) for _, said in columns)] for m in methods]
        parts += [*[COSTS_TEXT] * bool(costs), *[SCORES_TEXT] * bool(scores)]
        parts.append(markdown_table(["method", *(head for head, _ in columns)], rows))
    return parts


def linked(paper: str) -> str:
    """A paper, with a link where it is in arXiv."""
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def settings_of(method: Method) -> str:
    """The settings of a method in one line."""
    return ", ".join(map(setting_of, method.settings.values())) or "none"


def setting_of(setting: Setting) -> str:
    """A setting with its default, and what a search may choose."""
    if setting.options:
        others = [_plain(option) for option in setting.options if option != setting.default]
        return f"`{setting.name}` {_plain(setting.default)} (or {', '.join(others)})"
    searched = searched_of(setting)
    return f"`{setting.name}` {_plain(default_of(setting))}" + (f" ({searched})" if searched else "")


def time_of(figures: Mapping[str, Any]) -> str:
    """How many copies a merge takes as long as."""
    return _short(figures["time"]) if "time" in figures else "–"


def memory_of(figures: Mapping[str, Any]) -> str:
    """How many copies of the largest tensor a merge holds at most."""
    return _short(figures["memory"])


def scores_of(figures: Mapping[str, Any]) -> str:
    """The score of the method as it is, and at its best mass."""
    plain, best = figures.get("as it is"), figures.get("best")
    said = ["failed" if plain is None else f"{plain:.2f}"]
    if best is not None and figures.get("best mass") is not None:
        said.append(f"{best:.2f} at {figures['best mass']:g}")
    return ", ".join(said)


def _reader(figures: Mapping[str, Mapping[str, Any]], said: Callable[[Mapping[str, Any]], str]) -> Callable[[str], str]:
    return lambda name: said(figures[name]) if name in figures else "–"


def _plain(value: object) -> str:
    shown = str(value).lower() if isinstance(value, bool) else value
    return f"{value:g}" if isinstance(value, float) else f"{shown}"


def _short(value: float) -> str:
    """Two digits, as more of them differ from run to run."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _module(method: Method) -> str:
    return method.function.__module__.rpartition(".")[2]


if __name__ == "__main__":
    for file in PAGES:
        file.write_text(written(file.read_text()))
