"""Encoder classifiers, scored on texts and labels: one class each, a set of labels each, or a number each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evolver.config import Config, DataSet, TaskEntry, expand
from evolver.errors import BadInput, nearest
from evolver.evaluation.batches import by_length
from evolver.evaluation.data import Row, read_rows
from evolver.evaluation.items import Item, Items, draw, in_order, item_hash
from evolver.evaluation.live import LiveModel
from evolver.evaluation.metrics import CLASS, LABELS, VALUE, Metric
from evolver.evaluation.scoring import Scale
from evolver.records import Split

Labels = Mapping[str, int]
# Sets of labels are kept as the bits of a float64.
MOST_LABELS = 52


class ClassificationTasks:
    """Data sets of one label space, one each (or one for dev and one for report)."""

    def __init__(self, config: Config) -> None:
        self.settings, self.base = config.evaluation, config.model.base
        self._rows: dict[str, list[Row]] = {}
        drawn = [self._draw(i, entry, config.seed) for i, entry in enumerate(self.settings.tasks)]
        self.items = Items(
            in_order((i for d in drawn for i in d.dev), config.seed),
            in_order((i for d in drawn for i in d.report), config.seed),
        )

    def scale(self, split: Split) -> Scale:
        asked = self._asked(split)
        metrics = {a.entry.task: a.metric for a in asked}
        weights = {e.task: e.weight for e in self.settings.tasks}
        right = () if all(m.judged for m in metrics.values()) else tuple(a.right for a in asked)
        return Scale(tuple(a.entry.task for a in asked), weights, metrics, right)

    def scorer(self, model: LiveModel, split: Split) -> ClassificationScorer:
        return ClassificationScorer(model, self._asked(split), self.settings.batch_tokens)

    def _asked(self, split: Split) -> list[_Asked]:
        entries = {_name(e, split): e for e in self.settings.tasks}
        pairs = [(entries[i.task], self._rows[i.task][i.index]) for i in self.items.of(split)]
        return [
            _Asked(entry, _texts(row, entry), _right(row[entry.label], self._labels, entry)) for entry, row in pairs
        ]

    @cached_property
    def _labels(self) -> dict[str, int]:
        """Numbers of the model's labels, by name."""
        from transformers import AutoConfig  # slow, and most tasks need none

        try:
            labels: dict[str, int] = AutoConfig.from_pretrained(expand(self.base)).label2id
        except (OSError, ValueError) as error:
            raise BadInput(
                f"model.base: {self.base} has no readable config.json; give a classifier's folder."
            ) from error
        return labels

    def _draw(self, number: int, entry: TaskEntry, seed: int) -> Items:
        key = f"evaluation.tasks[{number}]"
        known = _known(entry)
        if entry.metric not in known:
            raise BadInput(f"{key}.metric: unknown metric {entry.metric!r}; {nearest(entry.metric, known)}")
        if entry.data is None:
            raise BadInput(f"{key}.data: missing; give the file or the data set of {entry.task}.")
        own = self._read(entry, entry.data, "dev", f"{key}.data")
        report = self._read(entry, entry.report_data, "report", f"{key}.report_data") if entry.report_data else None
        return draw(entry, own, report, seed, key)

    def _read(self, entry: TaskEntry, data: str | DataSet, split: Split, key: str) -> list[Item]:
        rows = read_rows(data, key)
        columns = [entry.text, *([entry.text_pair] if entry.text_pair else []), entry.label]
        for number, row in enumerate(rows, 1):
            for column in columns:
                if row.get(column) is None:
                    raise BadInput(f"{key}: row {number} lacks the key {column!r}; {nearest(column, map(str, row))}")
        name = _name(entry, split)
        self._rows[name] = rows
        return [Item(name, i, item_hash([row[c] for c in columns])) for i, row in enumerate(rows)]


@dataclass(frozen=True)
class _Asked:
    """One item: what is asked, and the right answer."""

    entry: TaskEntry
    texts: tuple[str, ...]
    right: float

    @property
    def metric(self) -> Metric:
        return _known(self.entry)[self.entry.metric]

    def answer(self, logits: Tensor) -> float:
        """What the model says, as it is kept: judged where the metric is the mean of judged items."""
        if self.metric.name in VALUE:
            return logits[0].item()
        if self.entry.threshold is None:
            said = float(logits.argmax())
        else:
            chosen = (logits.sigmoid() > self.entry.threshold).nonzero().flatten().tolist()
            said = float(sum(1 << label for label in chosen))
        return float(said == self.right) if self.metric.judged else said


class ClassificationScorer:
    """One text (or a pair), one row of a forward pass."""

    def __init__(self, model: LiveModel, asked: Sequence[_Asked], batch_tokens: int) -> None:
        self.model, self.asked, self.batch_tokens = model, list(asked), batch_tokens
        tokenise: Callable[..., Any] = model.tokenizer
        self.rows = [tokenise(*a.texts, truncation=True) for a in asked]
        self.pad = model.tokenizer.pad_token_id or 0
        for a in asked:
            self._check(a)

    @torch.inference_mode()
    def score(self, start: int, stop: int) -> list[float]:
        out: dict[int, float] = {}
        for batch in by_length({i: len(self.rows[i]["input_ids"]) for i in range(start, stop)}, self.batch_tokens):
            logits = self.model.module(**self._inputs(batch)).logits.float()
            if not torch.isfinite(logits).all():
                raise FloatingPointError("the model's outputs are not finite")
            for i, row in zip(batch, logits.cpu(), strict=True):
                out[i] = self.asked[i].answer(row)
        return [out[i] for i in range(start, stop)]

    def _inputs(self, batch: Sequence[int]) -> dict[str, Tensor]:
        """The batch's rows, padded at the right, (rows, longest) each."""
        width = max(len(self.rows[i]["input_ids"]) for i in batch)
        filler = {"input_ids": self.pad}
        return {
            name: torch.tensor(
                [[*self.rows[i][name], *[filler.get(name, 0)] * (width - len(self.rows[i][name]))] for i in batch]
            ).to(self.model.device)
            for name in self.rows[batch[0]]
        }

    def _check(self, asked: _Asked) -> None:
        outputs = self.model.module.config.num_labels
        if asked.metric.name in VALUE and outputs != 1:
            raise BadInput(
                f"evaluation: {asked.entry.task} wants a number, and the model names one of {outputs} labels."
            )


def _known(entry: TaskEntry) -> Mapping[str, Metric]:
    return LABELS if entry.threshold is not None else {**CLASS, **VALUE}


def _name(entry: TaskEntry, split: Split) -> str:
    data = (split == "report" and entry.report_data) or entry.data
    return f"{entry.task}:{data if isinstance(data, str) or data is None else data.spelled}"


def _texts(row: Row, entry: TaskEntry) -> tuple[str, ...]:
    return (str(row[entry.text]), *([str(row[entry.text_pair])] if entry.text_pair else []))


def _right(value: Any, labels: Labels, entry: TaskEntry) -> float:
    """The right answer as it is kept."""
    if entry.metric in VALUE:
        try:
            return float(value)
        except ValueError as error:
            raise BadInput(f"evaluation: {entry.task} has {value!r} where a number is wanted.") from error
    if entry.threshold is None:
        return float(_label(value, labels, entry))
    if len(labels) > MOST_LABELS:
        raise BadInput(f"evaluation: {entry.task} has {len(labels)} labels; sets of up to {MOST_LABELS} can be scored.")
    chosen = value if isinstance(value, list) else [v for v in str(value).replace(",", " ").split() if v]
    return float(sum(1 << number for number in {_label(v, labels, entry) for v in chosen}))


def _label(value: Any, labels: Labels, entry: TaskEntry) -> int:
    if isinstance(value, int) and value in labels.values():
        return int(value)
    if isinstance(value, str) and value in labels:
        return labels[value]
    if isinstance(value, str) and value.isdecimal() and int(value) in labels.values():  # a table's cells are texts
        return int(value)
    raise BadInput(
        f"evaluation: {entry.task} has the label {value!r}, which the model lacks; {nearest(str(value), labels)}"
    )
