"""What can be said of a run's claims before it starts: which differences it can show, and what its experts know."""

from __future__ import annotations

from collections.abc import Iterator

from evolver.driver.prepare import Prepared, overlap_of
from evolver.errors import BadInput
from evolver.records import Result
from evolver.report.claims import overlap_warnings, untrained_sentence
from evolver.report.margin import margin_lines
from evolver.runs.history import read_history
from evolver.storage import Storage


def foresight(prepared: Prepared, run: Storage | None = None) -> list[str]:
    """Sentences on what the select and the report items can show.

    Args:
        run: a folder that may hold the run. If its experts are scored already, the sentences rest on their answers.
    """
    config, tasks = prepared.config, prepared.tasks
    experts = list(_scored_experts(prepared, run)) if run else []
    return margin_lines(experts, tasks.scales, config.worthwhile, config.seed)


def training_lines(prepared: Prepared) -> tuple[list[str], list[str]]:
    """Warnings about experts that were trained on items of the run, and a note on those that were not."""
    found = overlap_of(prepared)
    note = untrained_sentence(found)
    return overlap_warnings(found), [note] if note else []


def _scored_experts(prepared: Prepared, run: Storage) -> Iterator[Result]:
    """The dev results of the experts in the run's folder, if it holds a run on the same items."""
    try:
        history = read_history(run)
    except (BadInput, OSError):
        return
    if history.about.scales.get("dev") == prepared.tasks.scale("dev"):
        yield from (r for c, r in history.stages["baseline"] if c.label in prepared.config.experts)
