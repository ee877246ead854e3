"""Rerankers (cross-encoders): classifiers with one output, scored on how far up they put the right documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evolver.config import Config
from evolver.config.evaluation import DataSet, EvaluationSettings, TaskEntry
from evolver.errors import BadInput
from evolver.evaluation.base import AskedItem, ItemText, Scored, judge
from evolver.evaluation.blueprint import ModelFolder
from evolver.evaluation.data import Row
from evolver.evaluation.examples import Example, LabelSet
from evolver.evaluation.items import Item
from evolver.evaluation.judges.classifier import LabelledRows, TextScorer, as_they_are
from evolver.evaluation.live import LiveModel
from evolver.evaluation.scores.metrics import JUDGED, Metric, metric_named
from evolver.records import own_score

# mrr: the reciprocal of the rank of the best right document.
RANKS = {"mrr": JUDGED}


@judge("reranking", "data", "select_data", "report_data", "text", "text_pair", "label", "head")
class Rankings(LabelledRows):
    """The judge of data sets of queries, each with documents of which some are right. An item is a query."""

    def __init__(self, config: Config, numbers: Sequence[int]) -> None:
        super().__init__(config, numbers)
        for number in numbers:
            if config.evaluation.tasks[number].text_pair is None:
                raise BadInput(
                    f"evaluation.tasks[{number}].text_pair: missing; give the column that holds the list of documents."
                )

    def check_model(self, model: ModelFolder | None, asked: Sequence[AskedItem]) -> None:
        """See ``ChecksModel``: a base needs a tokenizer for its texts."""
        if model is not None:
            _ = model.tokenizer

    def columns(self, entry: TaskEntry) -> list[str]:
        return [entry.text, str(entry.text_pair), entry.label]

    def prepare(self, rows: list[Row], entry: TaskEntry, data: str | DataSet, key: str) -> list[Row]:
        """The rows, checked: each has a list of documents and, for each of them, whether it is right."""
        for number, row in enumerate(rows, 1):
            documents, marks = row[str(entry.text_pair)], row[entry.label]
            if not (isinstance(documents, list) and isinstance(marks, list) and len(documents) == len(marks)):
                raise BadInput(
                    f"{key}: row {number} has no list of documents in {entry.text_pair!r} with a list of as many marks "
                    f"in {entry.label!r}; give a 1 for each right document, and a 0 for each other one."
                )
            if not all(isinstance(mark, int | float) for mark in marks):
                raise BadInput(f"{key}: row {number} has marks in {entry.label!r} that are no numbers; give 1 or 0.")
            if not 0 < sum(mark > 0 for mark in marks) < len(marks):
                raise BadInput(
                    f"{key}: row {number} has no right document, or no wrong one, so every order is as good; leave the "
                    "row out."
                )
        return rows

    def metric(self, entry: TaskEntry) -> Metric:
        key = self.named[entry.task]
        found = metric_named(entry.metric, RANKS, f"{key}.metric")
        if len(labels := self._spaces.of(entry)) != 1:
            raise BadInput(
                f"{key}.judge: reranking needs a model that gives one number for each pair of texts, and this one has "
                f"{len(labels)} labels; give rerankers (num_labels: 1)."
            )
        return found

    def show(self, asked: AskedItem) -> ItemText:
        """See ``Shows``."""
        row, entry = self.row(asked), asked.entry
        pairs = zip(row[str(entry.text_pair)], row[entry.label], strict=True)
        return ItemText(str(row[entry.text]), "\n".join(str(text) for text, mark in pairs if mark > 0))

    def scorer(self, model: LiveModel, asked: Sequence[AskedItem], scored: Iterable[Item]) -> RankingScorer:
        queries = []
        for one in asked:
            row, entry = self.row(one), one.entry
            documents, marks = tuple(map(str, row[str(entry.text_pair)])), tuple(m > 0 for m in row[entry.label])
            queries.append(Query(str(row[entry.text]), documents, marks, self._spaces.head(entry)))
        return RankingScorer(model, queries, self.settings)


@dataclass(frozen=True)
class Query:
    """One item: a text, its documents, which of them are right, and whose head answers."""

    text: str
    documents: tuple[str, ...]
    right: tuple[bool, ...]
    head: str | None = None

    def reciprocal_rank(self, numbers: Sequence[float]) -> float:
        """1 / the rank of the best right document; a wrong one with the same number stands before it."""
        best = max(n for n, right in zip(numbers, self.right, strict=True) if right)
        return 1.0 / (1 + sum(n >= best for n, right in zip(numbers, self.right, strict=True) if not right))


@dataclass(frozen=True)
class Pair:
    """A query and one of its documents, and whether that is right."""

    texts: tuple[str, str]
    head: str | None
    right: bool = False

    def answer(self, logits: Tensor) -> tuple[float, str]:
        return logits[0].item(), ""

    def probability(self, logits: Tensor) -> None:
        """The right answer to a query is an order, of which none is known."""

    def observed(self) -> LabelSet:
        """Whether the document is right, for gradients: rerankers are trained to say that by the sign."""
        return LabelSet(frozenset({0} if self.right else ()))


class PairScorer(TextScorer[Pair]):
    """A number for each pair."""

    def tokenised(self, question: Pair, **options: Any) -> Any:
        return self.model.tokenizer(*question.texts, verbose=False, **options)


class RankingScorer:
    """All pairs of a query and its documents, side by side with those of other queries."""

    def __init__(self, model: LiveModel, queries: Sequence[Query], settings: EvaluationSettings) -> None:
        self.queries, pairs = queries, list[Pair]()
        self._places: list[range] = []
        for query in queries:
            self._places.append(range(len(pairs), len(pairs) + len(query.documents)))
            documents = zip(query.documents, query.right, strict=True)
            pairs += [Pair((query.text, document), query.head, right) for document, right in documents]
        self._pairs = PairScorer(model, pairs, settings, as_they_are)

    def examples(self, places: Sequence[int]) -> Iterator[Example]:
        """See ``GivesExamples``: each pair is one."""
        return self._pairs.examples([pair for place in places for pair in self._places[place]])

    def score(self, places: Sequence[int]) -> Scored:
        found = self._pairs.score([pair for place in places for pair in self._places[place]])
        out = Scored(tokens=found.tokens)
        for place in places:
            query, pairs = self.queries[place], self._places[place]
            numbers = [own_score(found.answers[pair]) for pair in pairs]
            out.answers[place] = query.reciprocal_rank(numbers)
            out.said[place] = query.documents[numbers.index(max(numbers))]
            out.truncated += any(self._pairs.is_cut(pair) for pair in pairs)
        return out
