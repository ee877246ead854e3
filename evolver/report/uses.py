"""The section of a report on how often its report items were used."""

from __future__ import annotations

from evolver.report.text import escaped
from evolver.runs.outcome import Outcome


def uses_section(outcome: Outcome) -> str:
    """Which runs were scored on the same report items, in their order; nothing where there is no other one."""
    if len(outcome.uses) < 2:
        return ""
    names = ", ".join(escaped(use.run) for use in outcome.uses)
    fresh = "`evolver retarget --fresh-report` and `evolver fork --fresh-report` draw items that no run has used."
    return (
        f"## Report items used {len(outcome.uses)} times\n\nThese runs were scored on the same report items, in this "
        f"order: {names}. Only the first one tests something that was decided without them. {fresh}"
    )
