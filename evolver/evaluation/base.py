"""What every kind of evaluation offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from evolver.config import Config, TaskEntry
from evolver.evaluation.items import Item
from evolver.evaluation.scores.metrics import Metric
from evolver.records import Split


@dataclass(frozen=True)
class AskedItem:
    """One item of one task, as the configuration asks for it."""

    entry: TaskEntry
    item: Item


@dataclass
class Scored:
    """What a model said to some items, by their place, and what it took.

    Args:
        answers: judged where the task's metric is the mean of judged items (see ``Metric``).
        tokens: that went through the model, without padding; images count as one.
        truncated: items whose prompt was cut, or whose answer met its limit before its end.
        invalid: items in whose answer no answer was found.
    """

    answers: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    truncated: int = 0
    invalid: int = 0

    def add(self, other: Scored, places: Sequence[int] | None = None) -> None:
        """Take in answers to some of the items; ``places[i]`` is where the other's place i stands, by default i."""
        self.answers.update({p if places is None else places[p]: answer for p, answer in other.answers.items()})
        self.tokens += other.tokens
        self.truncated += other.truncated
        self.invalid += other.invalid

    @property
    def items(self) -> list[float]:
        """The answers in the order of the places."""
        return [self.answers[place] for place in sorted(self.answers)]

    @property
    def counts(self) -> dict[str, float]:
        return {"tokens": float(self.tokens), "truncated": float(self.truncated), "invalid": float(self.invalid)}


class Scorer(Protocol):
    """Scores the live model on items that it was made for; what can be built once is."""

    def score(self, places: Sequence[int]) -> Scored:
        """The answers to the items at ``places``.

        Raises FloatingPointError where the model's outputs are not finite.
        """
        ...


class Judge(Protocol):
    """A kind of task: which items there are, how answers become numbers. Needs no model.

    Args:
        config: of the run.
        numbers: the places of its tasks among those of ``config.evaluation.tasks``.
    """

    def __init__(self, config: Config, numbers: Sequence[int]) -> None: ...

    # The keys of a task that it reads, beside those of ``COMMON_KEYS``; ``judge`` sets them.
    keys: ClassVar[frozenset[str]]
    # What the user should hear before the run.
    warnings: list[str]

    def items(self, entry: TaskEntry, split: Split) -> list[Item] | None:
        """All items that a split can be drawn from; None where the report split is drawn from the dev split's."""
        ...

    def metric(self, entry: TaskEntry) -> Metric:
        """The metric that a task names.

        Raises BadInput for one that this kind of evaluation does not have.
        """
        ...

    def right(self, asked: AskedItem) -> float:
        """The right answer, for metrics that look at all answers together."""
        ...

    def scorer(self, model: Any, asked: Sequence[AskedItem], scored: Iterable[Item]) -> Scorer:
        """A scorer of ``asked``.

        Args:
            model: a LiveModel; lm-eval's tasks take a LaunchedModel, too.
            scored: every item that is scored anywhere in this run: none of them may serve as an example.
        """
        ...


# The keys of a task that have a meaning for every kind of evaluation.
COMMON_KEYS = frozenset({"task", "judge", "metric", "weight", "dev", "report"})
JUDGES: dict[str, type[Judge]] = {}
JudgeType = TypeVar("JudgeType", bound=type[Any])


def judge(name: str, *keys: str) -> Callable[[JudgeType], JudgeType]:
    """Register a kind of evaluation: a task names it by its key ``judge``.

    Args:
        keys: the further keys of a task that it reads; a task of this kind that sets another one is refused.
    """

    def register(kind: JudgeType) -> JudgeType:
        JUDGES[name] = kind
        kind.keys = frozenset(keys)
        return kind

    return register
