"""The section of a report on the models that a search began with: what they cost, and how many items they saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evolver.config.starts import start_of
from evolver.records import Result
from evolver.records.leaders import Rated
from evolver.report.text import escaped, markdown_table, score_text
from evolver.runs.outcome import Outcome


@dataclass(frozen=True)
class Saving:
    """What it was worth to begin with known models, in dev items that were scored for it.

    Attributes:
        best: the best of these models.
        cost: what all of them took.
        reached: the first model that the search found itself and that is as good as the best of them; None: none is.
        spent: what the search's own candidates had taken when it was scored; without it, what they took in all.
    """

    best: Rated
    cost: int
    reached: Rated | None
    spent: int

    @property
    def saved(self) -> int:
        """The items that the search took to get as far by itself, less those that the start took. If it never got
        there, it took more than these.
        """
        return self.spent - self.cost

    def summary(self) -> dict[str, Any]:
        """The numbers, for programs."""
        return {
            "best": self.best[0].number, "cost": self.cost, "spent": self.spent,
            "reached": None if self.reached is None else self.reached[0].number,
            "saved": None if self.reached is None else self.saved,
        }  # fmt: skip


def saving_of(searched: Sequence[Rated]) -> Saving | None:
    """What the start of a search was worth; None where it began with nothing, or nothing of it has a score.

    A model of the start that the search proposes again is not counted as found by the search.
    """
    given = [pair for pair in searched if start_of(pair[0].proposer) is not None]
    best = max((pair for pair in given if pair[1].score is not None), key=_standing, default=None)
    if best is None:
        return None
    cost, known, spent = sum(r.cost for _, r in given), {c.recipe.id for c, _ in given}, 0
    for candidate, result in searched:
        if start_of(candidate.proposer) is not None:
            continue
        spent += result.cost
        new = result.complete and candidate.recipe.id not in known
        if new and result.standing >= best[1].standing:
            return Saving(best, cost, (candidate, result), spent)
    return Saving(best, cost, None, spent)


def starts_section(outcome: Outcome) -> str:
    """A row for each kind of model that the search began with, and what they saved; empty without any."""
    found: dict[str, list[Result]] = {}
    for candidate, result in outcome.searched:
        if (name := start_of(candidate.proposer)) is not None:
            found.setdefault(name, []).append(result)
    if not found:
        return ""
    scale = outcome.scales["dev"]
    rows = []
    for name, results in found.items():
        best, items = max(results, key=lambda result: result.standing), sum(result.cost for result in results)
        rows.append([escaped(name), str(len(results)), str(items), score_text(best.score, scale)])
    table = markdown_table(["start", "models", "items", "the best on dev"], rows)
    return f"## What the search began with\n\n{table}\n\n{_sentences(outcome)}"


def _sentences(outcome: Outcome) -> str:
    saving = saving_of(outcome.searched)
    if saving is None:
        return "None of these models has a score, so they saved nothing."
    (candidate, result), scale = saving.best, outcome.scales["dev"]
    best = (
        f"The best of these models is candidate {candidate.number} ({start_of(candidate.proposer)}), with a score of "
        f"{score_text(result.score, scale)} on the dev items."
    )
    return f"{best} {_worth(saving)}"


def _worth(saving: Saving) -> str:
    """How many items the start saved, in sentences."""
    if saving.reached is None:
        known = f"at least {saving.saved} items" if saving.saved > 0 else "whether it saved any is not known"
        return (
            f"The search's own candidates never reached it, with {saving.spent} items. The models of the start took "
            f"{saving.cost} items, so what the start saved is not known exactly: {known}."
        )
    worth = (
        f"so by this count the start saved {saving.saved} items"
        if saving.saved >= 0
        else f"so by this count the start saved nothing and took {-saving.saved} items more"
    )
    return (
        f"The search first reached it by itself with candidate {saving.reached[0].number}, when its own candidates had "
        f"taken {saving.spent} items; the models of the start took {saving.cost} items, {worth}. The search had learnt "
        "from these models, so they may have saved more: what it takes without them is shown only by a run without "
        "`start`."
    )


def _standing(pair: Rated) -> tuple[float, float]:
    return pair[1].standing
