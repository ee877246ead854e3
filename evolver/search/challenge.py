"""What a search asks about a candidate that has to beat the model in whose place it would stand."""

from __future__ import annotations

from evolver.records import Candidate, ItemAnswer, Question, Result, Standing
from evolver.records.order import OWN
from evolver.search.base import Setup


def challenge(setup: Setup, k: int, incumbent: Standing, items: tuple[ItemAnswer, ...]) -> Question:
    """Whether candidate k beats the incumbent, of which it is told the score and, for a race, the answers.

    An incumbent that breaks a constraint can be beaten with any score, so it sets no bar.

    Every race has an order of its own. The incumbent has won along other orders, so this one is a random order for both
    models, as the test assumes.
    """
    violation, score = incumbent
    if not setup.early_stopping or violation < 0:
        return Question()
    if not setup.racing:
        return Question(bar=score)
    return Question(bar=score, rival=items, order=OWN if setup.subset == "fixed" else f"{setup.seed}:race:{k}")


def rejected(candidate: Candidate) -> Result:
    """A made-up result that does not beat the bar, for running ahead."""
    return Result(candidate.number, candidate.recipe.id, "ok", bound=candidate.question.bar, stage=candidate.stage)
