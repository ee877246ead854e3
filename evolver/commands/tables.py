"""The tables that commands print on a terminal."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # some of them bring torch, which the command line does not import before it needs it
    from evolver.commands.doctor import Finding
    from evolver.config.presets import Preset
    from evolver.dashboard.status import Status
    from evolver.merging.methods import Method
    from evolver.search.base import Algorithm

UNITS_OF_TIME = ((86400, "d"), (3600, "h"), (60, "min"))


def console() -> Console:
    """A console for tables: as wide as the terminal, or 160 columns if the output is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 160)


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal how many there have been, and the name of the last one; elsewhere nothing."""
    with Console(stderr=True).status(f"0 {what}") as shown:
        count = itertools.count(1)
        yield lambda name: shown.update(f"{next(count)} {what}, {escape(name)} was the last")


def statuses_table(found: Iterable[Status]) -> Table:
    """The runs of a folder, with their best scores and how much of their budgets is spent."""
    shown = Table("run", "state", "search", "best dev", "best expert", "candidates", "items", "failed", "last result")
    runs = list(found)
    guarded = any(s.infeasible is not None for s in runs)
    if guarded:
        shown.add_column("break constraints")
    for s in runs:
        score, expert = ("–" if v is None else f"{v:.4f}" for v in (s.best, s.expert))
        spent = [f"{n}" if limit is None else f"{n} of {limit}" for n, limit in zip(s.spent, s.budget, strict=True)]
        age = "–" if s.age is None else f"{_duration(s.age)} ago"
        broken = ["–" if s.infeasible is None else str(s.infeasible)] if guarded else []
        shown.add_row(s.name, s.state, s.algorithm, score, expert, *spent, str(s.failed), age, *broken)
    return shown


def settings_table(algorithm: Algorithm) -> Table:
    """The settings of a search."""
    shown = Table("setting", "default", "meaning")
    for key, field in algorithm.settings.model_fields.items():
        if key != "algorithm":
            default = "" if field.is_required() else repr(field.get_default(call_default_factory=True))
            shown.add_row(key, default, field.description or "")
    return shown


def presets_table(found: Iterable[Preset]) -> Table:
    """Published searches: which parts each of them stands for, and where it comes from."""
    shown = Table("preset", "stands for", "paper")
    for preset in found:
        shown.add_row(preset.name, escape("\n".join(preset.lines)), escape(preset.paper))
    return shown


def findings_table(findings: Iterable[Finding]) -> Table:
    """What a machine offers, and what is missing."""
    shown = Table("", "found", "to do")
    for what, found, remedy in findings:
        shown.add_row(what, escape(found), escape(remedy))
    return shown


def methods_table(methods: Iterable[Method]) -> Table:
    """All merge methods, one in a row."""
    from evolver.commands.words import default_of, searched_of

    shown = Table("method", "settings (default)", "searched", "paper")
    for method in sorted(methods, key=lambda m: m.name):
        settings = method.settings.values()
        searched = [f"{s.name} {searched_of(s)}" for s in settings if searched_of(s)]
        defaults = [f"{s.name}={default_of(s)}" for s in settings]
        shown.add_row(method.name, "\n".join(defaults), "\n".join(searched), method.paper)
    return shown


def method_table(method: Method) -> Table:
    """The settings of one merge method, one in a row."""
    from evolver.commands.words import default_of, kind_of, searched_of

    shown = Table("setting", "value", "default", "searched")
    for s in method.settings.values():
        shown.add_row(s.name, kind_of(s).replace("`", ""), str(default_of(s)), searched_of(s))
    return shown


def _duration(seconds: float) -> str:
    for size, unit in UNITS_OF_TIME:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
