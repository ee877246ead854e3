"""The section of a report that says what each search of a portfolio, or of islands, has found."""

from __future__ import annotations

from evolver.config.starts import start_of
from evolver.records import UNKNOWN, Candidate, Result
from evolver.report.text import escaped, markdown_table, score_text
from evolver.runs.outcome import Outcome

# What the row of the models is called that no search has found.
KNOWN = "given by start, found by no search"


def arms_section(outcome: Outcome) -> str:
    """One row for each search, with how far it came by itself; empty for a run of one search."""
    if outcome.config.search["algorithm"] not in ("portfolio", "islands"):
        return ""
    found: dict[str, list[tuple[Candidate, Result]]] = {}
    leader, standing = "", UNKNOWN
    led: dict[str, int] = {}
    for candidate, result in outcome.searched:
        name = KNOWN if start_of(candidate.proposer) is not None else candidate.proposer.split(": ")[0]
        found.setdefault(name, []).append((candidate, result))
        if result.complete and result.standing > standing:
            leader, standing = name, result.standing
            led[name] = led.get(name, 0) + 1
    rows = [_row(name, pairs, led.get(name, 0), name == leader, outcome) for name, pairs in found.items()]
    head = ["search", "candidates", "items", "new best of all", "its best on dev"]
    said = (
        "What each search has found by itself, in the order in which they began. Their scores are those on the dev "
        "items, on which the highest of many is partly the luckiest, so a search with more candidates has an advantage."
    )
    return f"## The searches\n\n{said}\n\n{markdown_table(head, rows)}"


def _row(
    name: str, pairs: list[tuple[Candidate, Result]], led: int, leads: bool, outcome: Outcome
) -> list[str]:  # fmt: skip
    best = max((result for _, result in pairs), key=lambda result: result.standing)
    shown = f"**{escaped(name)}**" if leads else escaped(name)
    items = sum(result.cost for _, result in pairs)
    return [shown, str(len(pairs)), str(items), str(led), score_text(best.score, outcome.scales["dev"])]
