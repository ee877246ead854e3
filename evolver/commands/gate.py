"""``evolver gate``: is a model worse than another one by more than a margin?

Both are scored block by block until that is clear.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evolver.commands.evaluate import ReadyModels, make_ready
from evolver.errors import BadInput
from evolver.evaluation.scores.course import blocks
from evolver.evaluation.scores.estimates import first_unjudged
from evolver.evaluation.scores.gate import Gate, Passage
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Split
from evolver.report.text import signed

GATE = "evolver gate"
# The exit status for each verdict.
STATUS: dict[Passage | None, int] = {"not worse": 0, "worse": 4, None: 5}


@dataclass(frozen=True)
class Passing:
    """What a gate has found.

    Attributes:
        verdict: on the first model; None: undecided.
        difference: score of the first model minus that of the second, on the items that were scored.
        low, high: bounds of the difference on all items of such tasks, each at the error rate ``alpha``.
        used: the number of items that both models were scored on, of ``items``.
        scale: how items make up the score.
    """

    verdict: Passage | None
    difference: float
    low: float
    high: float
    used: int
    items: int
    margin: float
    alpha: float
    split: Split
    scale: Scale

    @property
    def status(self) -> int:
        """The exit status of the command."""
        return STATUS[self.verdict]


def pass_gate(
    file: str, first: str, second: str, *, split: Split = "report", most: int | None = None, margin: float = 0.01,
    alpha: float = 0.05, warn: Callable[[str], None] = print,
) -> Passing:  # fmt: skip
    """Score two models block by block until it is clear whether the first one is worse than the second one.

    Args:
        file: path of the YAML file of a run, whose tasks, items and base are used.
        first: folder, hub id or URI of the model that is to be let through.
        second: that of the model which it must not be worse than.
        most: the largest number of items; None: all.
        margin: by how much the first model may be worse, as a difference of scores.
        alpha: the error rate of either verdict.
        warn: is called with each warning.

    Raises BadInput where the options or the configuration are wrong or a model cannot be scored, before any weight is
    read.
    """
    if not 0 <= margin < 1:
        raise BadInput(f"--margin: {margin:g} is not usable; write a number from 0 to below 1, such as 0.01.")
    if not 0 < alpha < 0.5:
        raise BadInput(f"--error-rate: {alpha:g} is not usable; write a number above 0 and below 0.5, such as 0.05.")
    ready = make_ready(file, list(dict.fromkeys([first, second])), GATE, warn)
    scale = ready.tasks.scale(split)
    if (task := first_unjudged(scale)) is not None:
        raise BadInput(
            f"{file}: evaluation.tasks: a gate needs a score from 0 to 1 for each item, which the metric of {task} "
            "does not give; leave the task out, or choose another metric."
        )
    count = min(len(scale.tasks), most or len(scale.tasks))
    return _scored(ready, Gate(scale, margin, alpha, count), (first, second), split, count)


def _scored(ready: ReadyModels, gate: Gate, models: tuple[str, str], split: Split, count: int) -> Passing:
    """Score both models until there is a verdict."""
    answers: tuple[list[Any], list[Any]] = ([], [])
    verdict: Passage | None = None
    with contextlib.ExitStack() as stack:
        lives = [stack.enter_context(contextlib.closing(ready.live(model, split))) for model in models]
        scorers = [ready.tasks.scorer(live, split) for live in lives]
        for start, stop in blocks(0, count, ready.config.evaluation.block_items):
            for items, scorer in zip(answers, scorers, strict=True):
                items += scorer.score(start, stop).items
            if (verdict := gate.look(*answers)) is not None:
                break
    scale = gate.scale
    return Passing(
        verdict, gate.difference(*answers), *gate.bounds(*answers), len(answers[0]), len(scale.tasks), gate.margin,
        gate.alpha, split, scale,
    )  # fmt: skip


def gate_text(found: Passing, first: str, second: str) -> str:
    """What the command prints: the verdict, the difference with its bounds, and how many items were used."""
    scale, margin = found.scale, signed(found.margin, found.scale).lstrip("+")
    words = {
        "not worse": f"Not worse: {first} is not worse than {second} by more than {margin} points.",
        "worse": f"Worse: {first} is worse than {second} by more than {margin} points.",
        None: f"Undecided: whether {first} is worse than {second} by more than {margin} points is not clear yet.",
    }
    difference, low, high = (signed(x, scale) for x in (found.difference, found.low, found.high))
    items = f"{found.used} of {found.items} {found.split} items"
    return (
        f"{words[found.verdict]}\nDifference: {difference} points on {items}; "
        f"it is at least {low} and at most {high} points, each at an error rate of {100 * found.alpha:g} %."
    )
