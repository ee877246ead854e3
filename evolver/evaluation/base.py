"""The interface of a kind of evaluation (a judge), and the registry of all kinds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from evolver.config import Config
from evolver.config.evaluation import TaskEntry
from evolver.evaluation.items import Item
from evolver.evaluation.scores.metrics import Metric
from evolver.records import ItemAnswer, Split

# Characters that are kept of an answer: generated texts may be long, and a report shows their beginning and end.
SAID_LENGTH = 400


@dataclass(frozen=True)
class AskedItem:
    """An item, with the task of the configuration that it is scored for."""

    entry: TaskEntry
    item: Item


@dataclass(frozen=True)
class ItemText:
    """An item as people read it: what the model is asked, and the right answer (empty: there is none to show)."""

    prompt: str
    right: str = ""


@dataclass
class Scored:
    """A model's answers to some items, and what they took.

    Args:
        answers: the answer to each item, by the item's place in its split. Where the task's metric is the mean of
            judged items (see ``Metric``), an answer is the item's score already; see also ``ItemAnswer``.
        tokens: number of tokens that went through the model, without padding; an image counts as one.
        truncated: number of items whose prompt was cut, or whose generated answer reached its limit before its end.
        invalid: number of items in whose generated text lm-eval's filters found no answer.
        said: the answers in words, for the examples of a report. A kind of evaluation whose answers are no words leaves
            it empty.
        probabilities: how probable the model finds the right answer, where the kind of evaluation knows it.
    """

    answers: dict[int, ItemAnswer] = field(default_factory=dict)
    tokens: int = 0
    truncated: int = 0
    invalid: int = 0
    said: dict[int, str] = field(default_factory=dict)
    probabilities: dict[int, float] = field(default_factory=dict)

    def add(self, other: Scored, places: Sequence[int] | None = None) -> None:
        """Add the answers to some other items.

        Args:
            places: ``places[i]`` is the place here of the other's place i; default: i itself.
        """
        self.answers.update({p if places is None else places[p]: answer for p, answer in other.answers.items()})
        self.said.update({p if places is None else places[p]: text for p, text in other.said.items()})
        self.probabilities.update({p if places is None else places[p]: x for p, x in other.probabilities.items()})
        self.tokens += other.tokens
        self.truncated += other.truncated
        self.invalid += other.invalid

    @property
    def items(self) -> list[ItemAnswer]:
        """The answers in the order of the places."""
        return [self.answers[place] for place in sorted(self.answers)]

    @property
    def words(self) -> list[str]:
        """The answers in words in the same order, shortened; an empty text where there are none."""
        texts = (shortened(self.said.get(place, ""), SAID_LENGTH) for place in sorted(self.answers))
        return [text.encode(errors="replace").decode() for text in texts]  # half a surrogate pair cannot be stored

    def probabilities_at(self, places: Sequence[int]) -> list[float]:
        """The probabilities of the right answers to some items, NaN where one is not known, rounded to millionths."""
        return [round(self.probabilities.get(place, math.nan), 6) for place in places]

    @property
    def counts(self) -> dict[str, float]:
        return {"tokens": float(self.tokens), "truncated": float(self.truncated), "invalid": float(self.invalid)}


class Scorer(Protocol):
    """Scores the live model on a fixed list of items. Prompts and tensors are built once, for all candidates."""

    def score(self, places: Sequence[int]) -> Scored:
        """The answers to the items at ``places``, which are indices into the list of items.

        Raises FloatingPointError where the model's outputs are not finite.
        """
        ...


class Judge(Protocol):
    """A kind of evaluation. It knows the items of its tasks and how answers become numbers, and makes the scorers.

    It is made without a model, so that a configuration can be checked before any model is loaded.

    Args:
        config: configuration of the run.
        numbers: indices, in ``config.evaluation.tasks``, of the tasks that this judge is for.
    """

    def __init__(self, config: Config, numbers: Sequence[int]) -> None: ...

    # The keys of a task that it reads, beside those of ``COMMON_KEYS``; ``judge`` sets them.
    keys: ClassVar[frozenset[str]]
    # Sentences that the user should read before the run.
    warnings: list[str]

    def items(self, entry: TaskEntry, split: Split) -> list[Item] | None:
        """All items that a split can be drawn from. None for another split than dev means: from the items of
        the dev split.

        Raises BadInput where the data cannot be read.
        """
        ...

    def metric(self, entry: TaskEntry) -> Metric:
        """The metric that a task names.

        Raises BadInput for one that this kind of evaluation does not have.
        """
        ...

    def right(self, asked: AskedItem) -> float:
        """The right answer to an item, for metrics that look at all answers together."""
        ...

    def tells_padding(self, entry: TaskEntry) -> bool:
        """Whether its scorers call the model by ``LiveModel.forward`` or inside ``LiveModel.passes``, which are told
        the positions that are padding; else nothing can be found out about the model while they score it.

        While something else passes it (``LiveModel.passing``), each batch goes through ``LiveModel.forward`` as one
        pass of the module, so that gradients of a loss can be taken.
        """
        ...

    def gives_examples(self, entry: TaskEntry) -> bool:
        """Whether its scorers give the task's items as examples, see ``GivesExamples``; else no gradients can be taken
        on them.
        """
        ...

    def scorer(self, model: Any, asked: Sequence[AskedItem], scored: Iterable[Item]) -> Scorer:
        """A scorer of the items ``asked``.

        Args:
            model: a LiveModel; lm-eval's tasks also take a LaunchedModel.
            scored: all items that are scored anywhere in this run. None of them may be a few-shot example in a prompt.
        """
        ...


@runtime_checkable
class Grouped(Protocol):
    """A judge one of whose tasks can be a group of tasks."""

    def shares(self, entry: TaskEntry, split: Split, sizes: Mapping[str, int]) -> Mapping[str, float] | None:
        """The tasks whose metrics make up that of a group, and at which shares, which sum to 1; None for one task, and
        where the group's metric is that of all its items.

        Args:
            sizes: how many items of each task were drawn for the split.

        Raises BadInput where a task has none, and its metric counts.
        """
        ...


@runtime_checkable
class Checked(Protocol):
    """A judge that finds out more about its settings once the items are drawn."""

    def check(self, asked: Sequence[AskedItem]) -> None:
        """Look at everything that can be known without a model.

        Args:
            asked: every item of every judge that is scored in this run.

        Raises BadInput for settings that cannot work with these items.
        """
        ...


@runtime_checkable
class ChecksModel(Protocol):
    """A judge that needs more of a model than its weights, such as a tokenizer."""

    def check_model(self, model: Any, asked: Sequence[AskedItem]) -> None:
        """Look at everything that can be known of a model before its weights are read.

        Args:
            model: a Blueprint of the base; a ModelFolder where another class than Transformers' own loads candidates,
                and reads no more of the folder than its tokenizer; None where that class does not even read this.
            asked: every item of this judge.

        Raises BadInput for a model that the items cannot be scored with.
        """
        ...


@runtime_checkable
class Shows(Protocol):
    """A judge that can show its items to people, in the examples of a report."""

    def show(self, asked: AskedItem) -> ItemText: ...


@runtime_checkable
class Probable(Protocol):
    """A judge whose scorers may say how probable a model finds the right answer."""

    def probable(self, entry: TaskEntry) -> bool:
        """Whether they say it of every item of a task."""
        ...


@runtime_checkable
class DrawsExamples(Protocol):
    """A judge whose prompts show examples, drawn from documents that are not scored.

    Attributes:
        example_pool: the hashes of all documents that examples would be drawn from if no item were scored.
    """

    example_pool: set[str]


@runtime_checkable
class ShowsPrompts(Protocol):
    """A judge that can show what exactly a model reads of an item."""

    def prompts(self, model: Any, asked: Sequence[AskedItem], scored: Iterable[Item], count: int) -> list[str]:
        """The prompts of the first items of each task, as texts for people.

        Args:
            model: a Blueprint of the base.
            asked: every item of this judge in the dev split.
            scored: as for ``Judge.scorer``.
            count: how many items of each task are shown.

        Raises BadInput where a prompt cannot be built.
        """
        ...


@runtime_checkable
class Sourced(Protocol):
    """A judge that knows which texts its items come from. Each may be None: nothing is known but the item itself."""

    def document(self, asked: AskedItem) -> Any:
        """The text that an item asks about, such as a passage with several questions. Items that share it are not
        independent of each other.
        """
        ...

    def text(self, asked: AskedItem) -> Any:
        """The text that a model reads of an item, without examples before it. An expert that was trained on this text
        knows the item.
        """
        ...


# The keys of a task that have a meaning for every kind of evaluation.
COMMON_KEYS = frozenset({"task", "judge", "metric", "weight", "dev", "select", "report"})
JUDGES: dict[str, type[Judge]] = {}
JudgeType = TypeVar("JudgeType", bound=type[Any])


def judge(name: str, *keys: str) -> Callable[[JudgeType], JudgeType]:
    """Register a kind of evaluation under ``name``; a task of the configuration chooses it with its key ``judge``.

    Args:
        keys: the further keys of a task that it reads; a task of this kind that sets another one is refused.
    """

    def register(kind: JudgeType) -> JudgeType:
        JUDGES[name] = kind
        kind.keys = frozenset(keys)
        return kind

    return register


def shortened(text: str, length: int) -> str:
    """A text of at most ``length`` characters: of a longer one the middle is left out, and a mark stands there."""
    if len(text) <= length:
        return text
    mark = " […] "
    head = (length - len(mark) + 1) // 2
    return f"{text[:head]}{mark}{text[len(text) - (length - len(mark) - head) :]}"
