"""Token classifiers (sequence labelling), scored on words and their tags: names in texts, parts of speech."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from evolver.config.evaluation import DataSet, EvaluationSettings, TaskEntry
from evolver.errors import BadInput
from evolver.evaluation.base import AskedItem, ItemText, judge
from evolver.evaluation.blueprint import ModelFolder
from evolver.evaluation.data import Row
from evolver.evaluation.examples import ManyLabels
from evolver.evaluation.items import Item
from evolver.evaluation.judges.classifier import LabelledRows, Seen, TextScorer, label_number
from evolver.evaluation.live import LiveModel
from evolver.evaluation.scores.metrics import TAGS, Metric, metric_named
from evolver.records import ItemAnswer

# The tag of words outside of every span, and how the tags of words inside begin.
OUTSIDE, BEGINNINGS = "O", ("B-", "I-", "E-", "S-")
# A span: its type, its first word, and the one behind its last word.
Span = tuple[str, int, int]


@judge("token-classifier", "data", "select_data", "report_data", "text", "label", "head")
class Tags(LabelledRows):
    """The judge of data sets of words and tags. An item is a row: a sentence, or any other list of words."""

    def check_model(self, model: ModelFolder | None, asked: Sequence[AskedItem]) -> None:
        """See ``ChecksModel``: a base needs a tokenizer that tells which token belongs to which word, and all tags of
        the data.
        """
        for one in asked:
            self._question(one)
        if model is not None and not model.tokenizer.is_fast:
            raise BadInput(
                f"model.base: the tokenizer of {model.folder} cannot tell which tokens belong to which word; save it "
                "as a fast tokenizer (tokenizer.json)."
            )

    def columns(self, entry: TaskEntry) -> list[str]:
        return [entry.text, entry.label]

    def prepare(self, rows: list[Row], entry: TaskEntry, data: str | DataSet, key: str) -> list[Row]:
        """The rows with lists of words and of tags; a text is cut at its white space."""
        kept = [{**row, entry.text: _list(row[entry.text]), entry.label: _list(row[entry.label])} for row in rows]
        for number, row in enumerate(kept, 1):
            words, tags = len(row[entry.text]), len(row[entry.label])
            if words != tags or not words:
                raise BadInput(
                    f"{key}: row {number} has {words} words in {entry.text!r} and {tags} tags in {entry.label!r}; give "
                    "each word one tag."
                )
        return kept

    def metric(self, entry: TaskEntry) -> Metric:
        key = f"{self.named[entry.task]}.metric"
        found = metric_named(entry.metric, TAGS, key)
        if entry.metric == "f1":
            for name in self._spaces.of(entry):
                if name != OUTSIDE and not name.startswith(BEGINNINGS):
                    raise BadInput(
                        f"{key}: f1 counts spans, and the model has the tag {name!r}, which is neither O nor begins "
                        "with B- or I-; write acc, or name the tags in the model's config.json (id2label)."
                    )
        return found

    def scorer(self, model: LiveModel, asked: Sequence[AskedItem], scored: Iterable[Item]) -> TagScorer:
        return TagScorer(model, [self._question(a) for a in asked], self.settings, self._spaces.seen_of(model))

    def show(self, asked: AskedItem) -> ItemText:
        """See ``Shows``."""
        question = self._question(asked)
        return ItemText(" ".join(question.words), " ".join(question.named(question.right)))

    def _question(self, asked: AskedItem) -> TagQuestion:
        entry, row = asked.entry, self.row(asked)
        labels = self._spaces.of(entry)
        right = tuple(label_number(tag, labels, entry) for tag in row[entry.label])
        return TagQuestion(
            entry, tuple(map(str, row[entry.text])), right, self._spaces.head(entry), self._spaces.names(entry)
        )


@dataclass(frozen=True)
class TagQuestion:
    """One item.

    Attributes:
        words: what is asked.
        right: the number of the right tag of each word.
        head: whose head answers; None: the model's one.
        names: of the tags by number.
        places: of the first token of each word among the item's tokens; None where the model reads none of it.
    """

    entry: TaskEntry
    words: tuple[str, ...]
    right: tuple[int, ...]
    head: str | None
    names: Mapping[int, str]
    places: tuple[int | None, ...] = ()

    def answer(self, logits: Tensor) -> tuple[ItemAnswer, str]:
        """What the model says, as it is kept (the item's own score, and the counts of its metric), and in words.

        Args:
            logits: (tokens, labels).
        """
        best = logits.argmax(-1).tolist()
        said = [None if place is None else int(best[place]) for place in self.places]
        given = self.named(said)
        if self.entry.metric == "acc":
            hits, words = sum(a == b for a, b in zip(said, self.right, strict=True)), len(self.right)
            return (hits / words, float(hits), float(words)), " ".join(given)
        found, right = spans(given), spans(self.named(self.right))
        hits, both = len(found & right), len(found) + len(right)
        own = 2 * hits / both if both else 1.0
        return (own, float(hits), float(len(found)), float(len(right))), " ".join(given)

    def probability(self, logits: Tensor) -> None:
        """The answer to an item is one tag for each of its words, so none is known."""

    def observed(self) -> ManyLabels:
        """The right tags of the words that are read, for gradients."""
        read = [(place, tag) for place, tag in zip(self.places, self.right, strict=True) if place is not None]
        return ManyLabels([place for place, _ in read], [tag for _, tag in read])

    def named(self, numbers: Iterable[int | None]) -> list[str]:
        """The names of tags. A word that was not read is in no span."""
        return [OUTSIDE if n is None else self.names.get(n, str(n)) for n in numbers]


class TagScorer(TextScorer[TagQuestion]):
    """The tag of a word is what the model says at the first of its tokens."""

    def __init__(
        self, model: LiveModel, questions: Sequence[TagQuestion], settings: EvaluationSettings, seen: Seen
    ) -> None:  # fmt: skip
        self._tokenizer = of_words(model.tokenizer)
        super().__init__(model, questions, settings, seen)
        self.questions = [
            replace(q, places=first_tokens(row.word_ids(), len(q.words)))
            for q, row in zip(questions, self.rows, strict=True)
        ]

    def tokenised(self, question: TagQuestion, **options: Any) -> Any:
        return self._tokenizer(list(question.words), is_split_into_words=True, verbose=False, **options)


def of_words(tokenizer: Any) -> Any:
    """A tokenizer that reads words as they stand within a text.

    Tokenizers of bytes, as of RoBERTa and GPT-2, take a word for the beginning of a text unless they are told that a
    space stands before it. Models of tags are trained with this space.
    """
    pieces = tokenizer.backend_tokenizer.pre_tokenizer
    if getattr(pieces, "add_prefix_space", True):
        return tokenizer
    found = copy.deepcopy(tokenizer)
    pieces = found.backend_tokenizer.pre_tokenizer
    pieces.add_prefix_space = True
    found.backend_tokenizer.pre_tokenizer = pieces
    return found


def first_tokens(owners: Sequence[int | None], words: int) -> tuple[int | None, ...]:
    """The place of the first token of each word.

    Args:
        owners: of each token the number of its word, or None.
    """
    first: dict[int, int] = {}
    for place, owner in enumerate(owners):
        if owner is not None:
            first.setdefault(owner, place)
    return tuple(first.get(word) for word in range(words))


def spans(tags: Sequence[str]) -> set[Span]:
    """The spans that tags name. As in conlleval and seqeval, a span ends where the type changes, and a tag I- that goes
    on with no span begins one.
    """
    found: set[Span] = set()
    start, before = 0, (OUTSIDE, "")
    parts = [_parts(tag) for tag in tags]
    for place, (now, after) in enumerate(pairwise([*parts, (OUTSIDE, "")])):
        if not _goes_on(before, now):
            start = place
        if now[0] != OUTSIDE and not _goes_on(now, after):
            found.add((now[1], start, place + 1))
        before = now
    return found


def _parts(tag: str) -> tuple[str, str]:
    """The first letter of a tag, and its type."""
    letter, _, kind = tag.partition("-")
    return letter, kind


def _goes_on(before: tuple[str, str], now: tuple[str, str]) -> bool:
    """Whether a word belongs to the span of the word before it."""
    return before[0] in ("B", "I") and now[0] in ("I", "E") and before[1] == now[1]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else str(value).split()
