"""What every kind of evaluation offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from evolver.config import Config, TaskEntry
from evolver.evaluation.items import Item
from evolver.evaluation.scores.metrics import Metric
from evolver.records import Split

# Characters that are kept of an answer: generated texts may be long, and a report shows their beginning and end.
SAID_LENGTH = 400


@dataclass(frozen=True)
class AskedItem:
    """One item of one task, as the configuration asks for it."""

    entry: TaskEntry
    item: Item


@dataclass(frozen=True)
class ItemText:
    """An item as people read it: what the model is asked, and the right answer (empty: there is none to show)."""

    prompt: str
    right: str = ""


@dataclass
class Scored:
    """What a model said to some items, by their place, and what it took.

    Args:
        answers: judged where the task's metric is the mean of judged items (see ``Metric``).
        tokens: that went through the model, without padding; images count as one.
        truncated: items whose prompt was cut, or whose answer met its limit before its end.
        invalid: items in whose answer no answer was found.
        said: the answers in words, for the examples of a report. A kind of evaluation whose answers are no words leaves
            it empty.
    """

    answers: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    truncated: int = 0
    invalid: int = 0
    said: dict[int, str] = field(default_factory=dict)

    def add(self, other: Scored, places: Sequence[int] | None = None) -> None:
        """Take in answers to some of the items; ``places[i]`` is where the other's place i stands, by default i."""
        self.answers.update({p if places is None else places[p]: answer for p, answer in other.answers.items()})
        self.said.update({p if places is None else places[p]: text for p, text in other.said.items()})
        self.tokens += other.tokens
        self.truncated += other.truncated
        self.invalid += other.invalid

    @property
    def items(self) -> list[float]:
        """The answers in the order of the places."""
        return [self.answers[place] for place in sorted(self.answers)]

    @property
    def words(self) -> list[str]:
        """The answers in words in the same order, shortened; an empty text where there are none."""
        texts = (shortened(self.said.get(place, ""), SAID_LENGTH) for place in sorted(self.answers))
        return [text.encode(errors="replace").decode() for text in texts]  # half a surrogate pair cannot be stored

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

    # What the user should hear before the run.
    warnings: list[str]

    def items(self, entry: TaskEntry, split: Split) -> list[Item] | None:
        """All items that a split can be drawn from; None where the report split is drawn from the dev split's."""
        ...

    def metric(self, entry: TaskEntry) -> Metric: ...

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


@runtime_checkable
class Shows(Protocol):
    """A judge that can show its items to people, in the examples of a report."""

    def show(self, asked: AskedItem) -> ItemText: ...


JUDGES: dict[str, type[Judge]] = {}
JudgeType = TypeVar("JudgeType", bound=type[Any])


def judge(name: str) -> Callable[[JudgeType], JudgeType]:
    """Register a kind of evaluation: a task names it by its key ``judge``."""

    def register(kind: JudgeType) -> JudgeType:
        JUDGES[name] = kind
        return kind

    return register


def shortened(text: str, length: int) -> str:
    """A text of at most ``length`` characters: of a longer one the middle is left out, and a mark stands there."""
    if len(text) <= length:
        return text
    mark = " […] "
    head = (length - len(mark) + 1) // 2
    return f"{text[:head]}{mark}{text[len(text) - (length - len(mark) - head) :]}"
