"""The section of a report on how often its report items were used."""

from __future__ import annotations

from evolver.report.text import escaped
from evolver.runs.outcome import Outcome


def uses_section(outcome: Outcome) -> str:
    """Which runs were scored on the same report items, in their order; nothing where there is no other one.

    After the first use, whoever chooses a goal or settings may have these items in mind, so a test on them no longer
    has its error rate.
    """
    if len(outcome.uses) < 2:
        return ""
    names = ", ".join(escaped(use.run) for use in outcome.uses)
    fresh = "`evolver retarget --fresh-report` and `evolver fork --fresh-report` draw items that no run has used."
    return (
        f"## Report items used {len(outcome.uses)} times\n\nThese runs were scored on the same report items, in this "
        f"order: {names}. Only the first of them was decided on without knowing these items, so the verdicts of the "
        f"others are exploratory: their p-values and intervals are too favourable by an unknown amount. {fresh}"
    )


def goes_on(outcome: Outcome) -> str:
    """A sentence on the run that this one goes on from; empty where there is none."""
    origin = outcome.origin
    if origin is None:
        return ""
    known = f"The first {origin.candidates} candidates are those of the run {escaped(origin.name)}"
    return f"{known}, which this run goes on from (evolver {origin.kind})."
