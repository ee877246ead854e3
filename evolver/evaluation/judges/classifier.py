"""Encoder classifiers, scored on texts and labels: one class each, a set of labels each, or a number each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from evolver.config import Config
from evolver.config.evaluation import EvaluationSettings, TaskEntry
from evolver.errors import BadInput, nearest
from evolver.evaluation.base import AskedItem, ItemText, Scored, judge
from evolver.evaluation.batches import Batches, PreparedParts, by_length
from evolver.evaluation.blueprint import ModelFolder
from evolver.evaluation.data import Row
from evolver.evaluation.examples import Example, ExampleAnswer, LabelSet, OneLabel, OneNumber
from evolver.evaluation.items import Item
from evolver.evaluation.live import LiveModel
from evolver.evaluation.rows import RowJudge
from evolver.evaluation.scores.metrics import CLASS, LABELS, VALUE, Metric, metric_named
from evolver.records import ItemAnswer
from evolver.storage.paths import expand
from evolver.storage.references import parts_of

Labels = Mapping[str, int]
# What the logits of a model are seen as.
Seen = Callable[[Tensor], Tensor]
# Sets of labels are kept as the bits of a float64.
MOST_LABELS = 52


def as_they_are(logits: Tensor) -> Tensor:
    """Logits of a model whose labels have the numbers of the tasks' labels."""
    return logits


class LabelledRows(RowJudge):
    """The common part of the judges of rows that the models' heads answer."""

    def __init__(self, config: Config, numbers: Sequence[int]) -> None:
        super().__init__(config, numbers)
        self._spaces = LabelSpaces(config)

    def tells_padding(self, entry: TaskEntry) -> bool:
        return True

    def gives_examples(self, entry: TaskEntry) -> bool:
        return True


@judge("classifier", "data", "select_data", "report_data", "text", "text_pair", "label", "threshold", "head")
class Classification(LabelledRows):
    """The judge of data sets of texts and labels, one each (or one for dev and one for report)."""

    def check_model(self, model: ModelFolder | None, asked: Sequence[AskedItem]) -> None:
        """See ``ChecksModel``: a base needs a tokenizer for its texts, and several labels to choose one."""
        if model is not None:
            _ = model.tokenizer
        for entry in {a.entry.task: a.entry for a in asked}.values():
            if entry.metric in CLASS and entry.threshold is None and len(self._spaces.of(entry)) == 1:
                raise BadInput(
                    f"{self.named[entry.task]}.metric: {entry.metric} asks for one of several labels, and the model "
                    "gives a single number; write pearson, or judge: reranking for queries with documents."
                )

    def columns(self, entry: TaskEntry) -> list[str]:
        return [entry.text, *([entry.text_pair] if entry.text_pair else []), entry.label]

    def metric(self, entry: TaskEntry) -> Metric:
        return named_metric(entry, self.named[entry.task])

    def right(self, asked: AskedItem) -> float:
        return right_answer(self.row(asked)[asked.entry.label], self._spaces.of(asked.entry), asked.entry)

    def scorer(self, model: LiveModel, asked: Sequence[AskedItem], scored: Iterable[Item]) -> ClassificationScorer:
        questions = [
            TextQuestion(
                a.entry, _texts(self.row(a), a.entry), self.right(a), self._spaces.head(a.entry),
                self._spaces.names(a.entry),
            )
            for a in asked
        ]  # fmt: skip
        return ClassificationScorer(model, questions, self.settings, self._spaces.seen_of(model))

    def probable(self, entry: TaskEntry) -> bool:
        """See ``Probable``: a number has no probability."""
        return entry.metric not in VALUE

    def show(self, asked: AskedItem) -> ItemText:
        """See ``Shows``."""
        right = label_text(self.right(asked), asked.entry, self._spaces.names(asked.entry))
        return ItemText("\n\n".join(_texts(self.row(asked), asked.entry)), right)


@dataclass(frozen=True)
class TextQuestion:
    """One item: what is asked, the right answer, whose head answers (None: the model's one), its labels' names."""

    entry: TaskEntry
    texts: tuple[str, ...]
    right: float
    head: str | None = None
    names: Mapping[int, str] = field(default_factory=dict)

    @property
    def metric(self) -> Metric:
        return _known(self.entry)[self.entry.metric]

    def answer(self, logits: Tensor) -> tuple[float, str]:
        """What the model says, as it is kept (judged where the metric is the mean of judged items), and in words."""
        if self.metric.name in VALUE:
            said = logits[0].item()
        elif self.entry.threshold is None:
            said = float(logits.argmax())
        else:
            chosen = (logits.sigmoid() > self.entry.threshold).nonzero().flatten().tolist()
            said = float(sum(1 << label for label in chosen))
        words = label_text(said, self.entry, self.names)
        return (float(said == self.right) if self.metric.judged else said), words

    def observed(self) -> OneNumber | OneLabel | LabelSet:
        """The right answer, for gradients."""
        if self.metric.name in VALUE:
            return OneNumber(self.right)
        if self.entry.threshold is None:
            return OneLabel(int(self.right))
        return LabelSet(frozenset(n for n in range(MOST_LABELS) if int(self.right) >> n & 1))

    def probability(self, logits: Tensor) -> float | None:
        """How probable the model finds the right answer: the right class, or the right set of labels, each of which is
        chosen by itself; None for a number.
        """
        if self.metric.name in VALUE:
            return None
        if self.entry.threshold is None:
            right = int(self.right)
            return logits.softmax(-1)[right].item() if 0 <= right < len(logits) else 0.0
        wanted = torch.tensor([int(self.right) >> label & 1 for label in range(len(logits))], dtype=torch.bool)
        return torch.where(wanted, logits.sigmoid(), (-logits).sigmoid()).prod().item()


@dataclass(frozen=True)
class _Batch:
    """What the model is given, (rows, longest) each, and which positions are no padding."""

    inputs: dict[str, Tensor]
    positions: Tensor


class Answerable(Protocol):
    """One item of a judge of texts."""

    @property
    def head(self) -> str | None: ...
    def answer(self, logits: Tensor) -> tuple[ItemAnswer, str]: ...
    def probability(self, logits: Tensor) -> float | None: ...
    def observed(self) -> ExampleAnswer: ...


Asked = TypeVar("Asked", bound=Answerable)


class TextScorer(ABC, Generic[Asked]):
    """One text (or a pair), one row of a forward pass."""

    def __init__(
        self, model: LiveModel, questions: Sequence[Asked], settings: EvaluationSettings, seen: Seen
    ) -> None:  # fmt: skip
        self.model, self.settings, self.questions, self._seen = model, settings, questions, seen
        whole = [self.tokenised(q) for q in questions]
        self.whole = [len(row["input_ids"]) for row in whole]
        most = model.tokenizer.model_max_length
        self.rows = [
            self.tokenised(q, truncation=True) if length > most else row
            for q, row, length in zip(questions, whole, self.whole, strict=True)
        ]
        self.pad = model.tokenizer.pad_token_id or 0
        self._ready: PreparedParts[Batches[_Batch]] = PreparedParts()

    @abstractmethod
    def tokenised(self, question: Asked, **options: Any) -> Any:
        """What the tokenizer makes of a question, with further options of its own."""

    def score(self, places: Sequence[int]) -> Scored:
        return by_head(self.model, self.questions, places, self._score)

    def _score(self, places: Sequence[int]) -> Scored:
        key, lengths = tuple(places), {p: len(self.rows[p]["input_ids"]) for p in places}
        if key not in self._ready:
            keys = by_length(lengths, self.settings.batch_tokens, self.settings.batch_size)
            self._ready[key] = Batches(keys, self._batch)
        out = Scored(tokens=sum(lengths.values()), truncated=sum(map(self.is_cut, places)))
        for numbers, logits in self._ready[key].run(self._forward):
            take_in(out, self.questions, numbers, self._seen(logits))
        return out

    def examples(self, places: Sequence[int]) -> Iterator[Example]:
        """See ``GivesExamples``."""
        for place in places:
            question = self.questions[place]
            yield Example(self._batch([place]).inputs, question.observed(), question.head)

    def is_cut(self, place: int) -> bool:
        """Whether the model does not read all of a text, as it is too long."""
        return self.whole[place] > len(self.rows[place]["input_ids"])

    @torch.inference_mode()
    def _forward(self, batch: _Batch) -> Tensor:
        """Logits, (rows, labels) or (rows, longest, labels)."""
        logits: Tensor = self.model.forward(batch.positions, **batch.inputs).logits.float()
        if not torch.isfinite(logits).all():
            raise FloatingPointError("the model's outputs are not finite")
        return logits.cpu()

    def _batch(self, batch: Sequence[int]) -> _Batch:
        """The batch's rows, padded at the right."""
        lengths = torch.tensor([len(self.rows[i]["input_ids"]) for i in batch])
        width = int(lengths.max())
        filler = {"input_ids": self.pad}
        inputs = {
            name: torch.tensor(
                [[*self.rows[i][name], *[filler.get(name, 0)] * (width - len(self.rows[i][name]))] for i in batch]
            ).to(self.model.device)
            for name in self.rows[batch[0]]
        }
        return _Batch(inputs, (torch.arange(width) < lengths[:, None]).to(self.model.device))


class ClassificationScorer(TextScorer[TextQuestion]):
    """One answer to each text."""

    def __init__(
        self, model: LiveModel, questions: Sequence[TextQuestion], settings: EvaluationSettings, seen: Seen
    ) -> None:  # fmt: skip
        super().__init__(model, questions, settings, seen)
        for question in questions:
            self._check(question)

    def tokenised(self, question: TextQuestion, **options: Any) -> Any:
        return self.model.tokenizer(*question.texts, verbose=False, **options)

    def _check(self, asked: TextQuestion) -> None:
        outputs = self.model.outputs(asked.head)
        if asked.metric.name in VALUE and outputs != 1:
            raise BadInput(
                f"evaluation: {asked.entry.task} asks for a number, but the model gives one of {outputs} labels."
            )


def by_head(
    model: LiveModel, questions: Sequence[Answerable], places: Sequence[int], score: Callable[[Sequence[int]], Scored]
) -> Scored:
    """The answers of each head to its own questions."""
    out = Scored()
    for head in dict.fromkeys(questions[p].head for p in places):
        if head is not None:
            model.use(head)
        out.add(score([p for p in places if questions[p].head == head]))
    return out


def take_in(out: Scored, questions: Sequence[Answerable], places: Sequence[int], logits: Tensor) -> None:
    """Add the answers to the items at ``places``, given their logits, the first dimension of which are these items."""
    for place, row in zip(places, logits, strict=True):
        out.answers[place], out.said[place] = questions[place].answer(row)
        if (probability := questions[place].probability(row)) is not None:
            out.probabilities[place] = probability


class LabelSpaces:
    """Which labels a task's answers are among, and whose head says them."""

    def __init__(self, config: Config) -> None:
        self._model, self._experts = config.model, config.experts
        self._known: dict[str, Labels] = {}

    def head(self, entry: TaskEntry) -> str | None:
        """The expert whose head scores the task; None where the model has one head."""
        return (entry.head or entry.task) if self._model.heads == "apart" else None

    def of(self, entry: TaskEntry) -> Labels:
        """Numbers of the labels by name.

        Raises BadInput where a folder says nothing of them.
        """
        if self._model.heads == "union":
            return self._of_all()
        head = self.head(entry)
        return self._of(self._model.base if head is None else self._experts[head])

    def seen_of(self, model: LiveModel) -> Seen:
        """How the logits of a model become those of the labels of all experts, where tasks ask for these.

        A model that is scored as it is has a head for its own labels only. It never says a label that it lacks, and it
        is never right with one that the experts lack.
        """
        own = [str(name) for _, name in sorted(model.module.config.id2label.items())]
        if self._model.heads != "union" or own == [*(all_labels := self._of_all())]:
            return as_they_are
        wanted = [*all_labels, *(name for name in own if name not in all_labels)]

        def seen(logits: Tensor) -> Tensor:
            out = logits.new_full((*logits.shape[:-1], len(wanted)), -torch.inf)
            out[..., [wanted.index(name) for name in own]] = logits
            return out

        return seen

    def names(self, entry: TaskEntry) -> dict[int, str]:
        """Names of the labels by number; raises as ``of`` does."""
        return {} if entry.metric in VALUE else {number: name for name, number in self.of(entry).items()}

    def _of_all(self) -> Labels:
        names = dict.fromkeys(n for e in self._experts for n in self._of(self._experts[e]))
        return {name: number for number, name in enumerate(names)}

    def _of(self, location: str) -> Labels:
        if location not in self._known:
            key = next((f"experts.{n}" for n, place in self._experts.items() if place == location), "model.base")
            found = labels_of(parts_of(location)[0], key)
            self._known[location] = dict(sorted(found.items(), key=lambda pair: pair[1]))
        return self._known[location]


def labels_of(location: str, key: str) -> dict[str, int]:
    """Numbers of a classifier's labels, by name.

    Raises BadInput that names ``key`` where its folder says nothing of them.
    """
    from transformers import AutoConfig  # slow, and most tasks need none

    place = expand(location)
    name, _, revision = (place, "", "") if Path(place).exists() else place.partition("@")
    try:
        labels: dict[str, int] = AutoConfig.from_pretrained(name, revision=revision or "main").label2id
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{key}: {location} has no readable config.json, which names the labels of a classifier; give a "
            "classifier's folder, or write MODEL+ADAPTER with a model that names them."
        ) from error
    return labels


def named_metric(entry: TaskEntry, key: str) -> Metric:
    """The metric that an entry names.

    Raises BadInput for an unknown one.
    """
    return metric_named(entry.metric, _known(entry), f"{key}.metric")


def _known(entry: TaskEntry) -> Mapping[str, Metric]:
    return LABELS if entry.threshold is not None else {**CLASS, **VALUE}


def _texts(row: Row, entry: TaskEntry) -> tuple[str, ...]:
    return (str(row[entry.text]), *([str(row[entry.text_pair])] if entry.text_pair else []))


def label_text(answer: float, entry: TaskEntry, names: Mapping[int, str]) -> str:
    """A class, a set of labels or a number, as it is kept, for people."""
    if entry.metric in VALUE:
        return f"{answer:.4g}"
    if entry.threshold is None:
        return names.get(int(answer), str(int(answer)))
    chosen = [n for n in range(int(answer).bit_length()) if int(answer) >> n & 1]
    return ", ".join(names.get(n, str(n)) for n in chosen) or "no label"


def right_answer(value: Any, labels: Labels, entry: TaskEntry) -> float:
    """The right answer as it is kept."""
    if entry.metric in VALUE:
        try:
            return float(value)
        except ValueError as error:
            raise BadInput(f"evaluation: {entry.task} has {value!r} where a number is expected.") from error
    if entry.threshold is None:
        return float(label_number(value, labels, entry))
    if len(labels) > MOST_LABELS:
        raise BadInput(f"evaluation: {entry.task} has {len(labels)} labels; sets of up to {MOST_LABELS} can be scored.")
    chosen = value if isinstance(value, list) else [v for v in str(value).replace(",", " ").split() if v]
    return float(sum(1 << number for number in {label_number(v, labels, entry) for v in chosen}))


def label_number(value: Any, labels: Labels, entry: TaskEntry) -> int:
    """The number of a label that data give by its name or number.

    Raises BadInput for one that the model lacks.
    """
    if isinstance(value, int) and value in labels.values():
        return int(value)
    if isinstance(value, str) and value in labels:
        return labels[value]
    if isinstance(value, str) and value.isdecimal() and int(value) in labels.values():  # a table's cells are texts
        return int(value)
    raise BadInput(f"evaluation: {entry.task} has the label {value!r}, which the model lacks; {nearest(value, labels)}")
