"""What a run found, in one sentence or two: the winner against the best expert and against plain merges."""

from __future__ import annotations

from evolver.evaluation.scores.comparison import Comparison, compare
from evolver.evaluation.scores.scoring import Scale
from evolver.report.constraints import kept
from evolver.report.finals import recommendation
from evolver.report.text import signed
from evolver.runs.outcome import Outcome

LEVEL = 0.05


def verdict(outcome: Outcome) -> str:
    """Plain sentences: is the winner better than the best expert, and than the best plain merge, and how surely? And
    which model is recommended, if it is another one?
    """
    expert, plain = outcome.best_expert, outcome.best_plain
    if None in (outcome.winner.report.score, expert.report.score, plain.report.score):
        return "No verdict: the winner, an expert or a plain merge could not be scored on the report set."
    scale = outcome.scales["report"]
    against = compare(outcome.winner.report.items, expert.report.items, scale, outcome.config.seed)
    numbers = _in_words(against, scale)
    if against.difference <= 0:
        first = f"No improvement: the winner does not beat the best expert, {expert.label} ({numbers})."
    elif against.p >= LEVEL:
        first = f"No clear improvement: the winner leads the best expert, {expert.label}, within noise ({numbers})."
    else:
        first = f"Improvement: the winner beats the best expert, {expert.label} ({numbers})."
    sentences = [first, _against_plain(outcome), kept(outcome), recommendation(outcome)]
    return exploratory(outcome, " ".join(filter(None, sentences)))


def exploratory(outcome: Outcome, said: str) -> str:
    """A verdict, called exploratory where earlier runs have used the same report items.

    Whoever has read an earlier report has chosen the new goal, or the new settings, with these items in mind.
    """
    if outcome.use == 1:
        return said
    return f"Exploratory (use {outcome.use} of these report items): {said[0].lower()}{said[1:]}"


def _against_plain(outcome: Outcome) -> str:
    """Whether the search was worth it: the winner against the best merge that needs no search."""
    plain = outcome.best_plain
    scale = outcome.scales["report"]
    against = compare(outcome.winner.report.items, plain.report.items, scale, outcome.config.seed)
    says = "beats" if against.difference > 0 and against.p < LEVEL else "is not clearly better than"
    if against.difference < 0 and against.p < LEVEL:
        says = "is worse than"
    numbers = f"{signed(against.difference, scale)} points, p = {against.p:.3g}"
    return f"It {says} the best merge without a search, {plain.label} ({numbers})."


def _in_words(c: Comparison, scale: Scale) -> str:
    interval = f"95 % interval {signed(c.low, scale)} to {signed(c.high, scale)}"
    return f"{signed(c.difference, scale)} points on {len(scale.tasks)} report items, {interval}, p = {c.p:.3g}"
