"""The section of a report on constraints: what the winner was to keep, and whether it does, on dev and report items."""

from __future__ import annotations

from collections.abc import Mapping

from evolver.config.constraints import Constraint
from evolver.evaluation.scores.feasibility import Difference, Guards, compared_with
from evolver.records import Result, Split
from evolver.report.text import escaped, markdown_table
from evolver.runs.outcome import Outcome


def constraints_section(outcome: Outcome) -> str:
    """What the winner was to keep, and what it does; nothing where a run has no constraints."""
    constraints = outcome.config.constraints
    if not constraints:
        return ""
    dev, report = _guards(outcome, "dev"), _guards(outcome, "report")
    head = ["constraint", "winner", "kept", "on the report items"]
    rows = [_row(n, constraint, outcome, dev, report) for n, constraint in enumerate(constraints)]
    known = [r for _, r in outcome.searched if r.complete and r.score is not None]
    broken = sum(not r.feasible for r in known)
    said = (
        f"{broken} of {len(known)} candidates that were scored on all dev items break a constraint. Differences are in "
        "points of the task's metric. In brackets stands the one-sided lower bound at the constraint's confidence, "
        "which decides whether it is kept."
    )
    return f"## Constraints\n\n{said}\n\n{markdown_table(head, rows)}"


def kept(outcome: Outcome) -> str:
    """A sentence for the verdict; nothing where a run has no constraints."""
    if not outcome.config.constraints:
        return ""
    if outcome.finals.winner.dev.feasible:
        return "It keeps all constraints."
    return "No candidate of the search keeps all constraints; the winner is the one that breaks them least."


def _guards(outcome: Outcome, split: Split) -> Guards:
    """The constraints on tasks, with the answers of their reference models to the items of a split."""
    constraints, found = outcome.config.constraints, dict[int, Result]()
    of_dev = {f.label: f.dev for f in outcome.finalists}
    results: Mapping[str, Result] = {f.label: f.report if split == "report" else f.dev for f in outcome.finalists}
    for number, constraint in enumerate(constraints):
        label = compared_with(constraint, of_dev, list(outcome.config.experts)) if constraint.task else None
        if label is not None and results[label].score is not None:
            found[number] = results[label]
    answers = {number: result.items for number, result in found.items()}
    return Guards(constraints, outcome.scales[split], answers, outcome.config.seed)


def _row(number: int, constraint: Constraint, outcome: Outcome, dev: Guards, report: Guards) -> list[str]:
    winner = outcome.winner
    violation = outcome.finals.winner.dev.violations.get(str(number))
    mark = "not measured" if violation is None else "no" if violation > 0 else "yes"
    limit = constraint.at_most if constraint.kl is not None else constraint.norm
    if limit is not None:
        return [constraint.said, "–" if violation is None else f"{violation + limit:.4g}", mark, ""]
    shown = [
        _points(guards, number, guards.difference(number, result.items))
        if number in guards.references and result.score is not None
        else "–"
        for guards, result in ((dev, winner.dev), (report, winner.report))
    ]
    return [escaped(constraint.said), shown[0], mark, shown[1]]


def _points(guards: Guards, number: int, difference: Difference) -> str:
    times = 100 if guards.scale.metrics[str(guards.constraints[number].task)].points else 1
    return f"{times * difference.mean:+.4g} ({times * difference.low:+.4g})"
