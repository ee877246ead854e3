"""The section of a report on the finals: who was scored on the select items, and which model is recommended."""

from __future__ import annotations

from evolver.report.text import markdown_table, score_text, signed
from evolver.runs.finals import Contender, Finals
from evolver.runs.outcome import Outcome


def finals_section(outcome: Outcome) -> str:
    """Everybody in the finals, best first; one sentence where there are no select items."""
    finals = outcome.finals
    if "select" not in outcome.scales:
        return (
            "## The finals\n\nThere are no select items, so the winner is the candidate with the highest dev score. "
            "This score is too high, as it is the highest of many, and some of it is luck."
        )
    head = ["model", "dev", "select", "dev and select"]
    order = sorted(finals.everybody, key=finals.key, reverse=True)
    rows = [_row(contender, finals) for contender in order]
    said = " ".join(filter(None, [_how(finals), _stopped(outcome), _recommended(outcome)]))
    return f"## The finals\n\n{said}\n\n{markdown_table(head, rows)}"


def recommendation(outcome: Outcome) -> str:
    """A sentence on which model is recommended, if it is not the winner of the search."""
    finals = outcome.finals
    if finals.recommended == finals.winner:
        return ""
    ours, theirs = (finals.score(c, "select") for c in (finals.winner, finals.recommended))
    if finals.recommended.dev.violation < finals.winner.dev.violation:
        why = "it breaks the constraints less" if finals.recommended.dev.violation else "it keeps all constraints"
    elif ours is None or theirs is None:
        why = "the winner of the search could not be scored on the select items"
    else:
        scale = outcome.scales["select"]
        why = f"on the select items, which no search saw, it leads the winner by {signed(theirs - ours, scale)} points"
    return f"Recommended is {finals.recommended.label}, which needs no search: {why}."


def _row(contender: Contender, finals: Finals) -> list[str]:
    named = {finals.winner.label: " (winner)", finals.recommended.label: " (recommended)"}
    if finals.winner == finals.recommended:
        named = {finals.winner.label: " (winner, recommended)"}
    mark = named.get(contender.label, "")
    name = f"**{contender.label}**{mark}" if mark else contender.label
    scores = [score_text(finals.score(contender, on), finals.scales["dev"]) for on in ("dev", "select", "both")]
    return [name, *scores]


def _how(finals: Finals) -> str:
    on = "the select items alone" if finals.alone or finals.apart else "the dev and select items together"
    front = ", among them those on the front of its objectives" if finals.objectives else ""
    return (
        f"The {len(finals.searched)} best candidates of the search on the dev items{front}, the experts and the plain "
        f"merges were scored on {len(finals.scales['select'].tasks)} select items, which no search saw. The winner "
        f"is the candidate that leads on {on}. It is recommended unless a plain merge leads it on the select items "
        "alone."
    )


def _stopped(outcome: Outcome) -> str:
    """What is said of candidates that have no full dev score and so could not come to the finals."""
    stopped = {r.recipe_id for _, r in outcome.searched if r.status == "ok" and not r.complete}
    stopped -= {r.recipe_id for _, r in outcome.searched if r.complete}
    if not stopped:
        return ""
    if outcome.config.evaluation.estimate is not None:
        return f"Of {len(stopped)} more candidates, estimates decided that they do not come to the finals."
    return f"{len(stopped)} candidates were stopped before their last dev item, so they were not eligible."


def _recommended(outcome: Outcome) -> str:
    return recommendation(outcome) or "No plain merge leads it."
