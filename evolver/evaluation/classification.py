"""Encoder classifiers, scored on JSONL files of texts and labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evolver.config import Config, TaskEntry, expand
from evolver.errors import BadInput, nearest
from evolver.evaluation.batches import by_length
from evolver.evaluation.items import Item, Items, draw, in_order, item_hash
from evolver.evaluation.live import LiveModel
from evolver.evaluation.scoring import Scale
from evolver.records import Split

METRICS = ("acc",)


class ClassificationTasks:
    """Data sets of one label space, one file each (or one for dev and one for report)."""

    def __init__(self, config: Config) -> None:
        self.settings = config.evaluation
        self._rows: dict[str, list[dict[str, Any]]] = {}
        drawn = [self._draw(i, entry, config.seed) for i, entry in enumerate(self.settings.tasks)]
        self.items = Items(
            in_order((i for d in drawn for i in d.dev), config.seed),
            in_order((i for d in drawn for i in d.report), config.seed),
        )

    def scale(self, split: Split) -> Scale:
        names = {self._file_name(e, split): e for e in self.settings.tasks}
        items = self.items.of(split)
        weights = {e.task: e.weight for e in self.settings.tasks}
        return Scale(tuple(names[i.task].task for i in items), weights, best=1.0)

    def scorer(self, model: LiveModel, split: Split) -> ClassificationScorer:
        entries = {self._file_name(e, split): e for e in self.settings.tasks}
        pairs = [(entries[i.task], self._rows[i.task][i.index]) for i in self.items.of(split)]
        labels = model.module.config.label2id
        texts = [row[entry.text] for entry, row in pairs]
        golds = [_label(row[entry.label], labels, entry) for entry, row in pairs]
        return ClassificationScorer(model, texts, golds, self.settings.batch_tokens)

    def _draw(self, number: int, entry: TaskEntry, seed: int) -> Items:
        key = f"evaluation.tasks[{number}]"
        if entry.metric not in METRICS:
            raise BadInput(f"{key}.metric: unknown metric {entry.metric!r}; {nearest(entry.metric, METRICS)}")
        if entry.data is None:
            raise BadInput(f"{key}.data: missing; give the JSONL file of {entry.task}.")
        own = self._read(entry, entry.data, f"{key}.data")
        report = self._read(entry, entry.report_data, f"{key}.report_data") if entry.report_data else None
        return draw(entry, own, report, seed, key)

    def _read(self, entry: TaskEntry, location: str, key: str) -> list[Item]:
        path = Path(expand(location))
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise BadInput(f"{key}: {path} cannot be read ({error}); give a JSONL file.") from error
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or entry.text not in row or entry.label not in row:
                raise BadInput(f"{key}: line {number + 1} of {path} lacks the key {entry.text!r} or {entry.label!r}.")
        name = f"{entry.task}:{location}"
        self._rows[name] = rows
        return [Item(name, i, item_hash([row[entry.text], row[entry.label]])) for i, row in enumerate(rows)]

    def _file_name(self, entry: TaskEntry, split: Split) -> str:
        return f"{entry.task}:{(split == 'report' and entry.report_data) or entry.data}"


class ClassificationScorer:
    """One text, one forward pass row; an item scores 1 where the most probable label is the gold one."""

    def __init__(self, model: LiveModel, texts: Sequence[str], golds: Sequence[int], batch_tokens: int) -> None:
        self.model, self.golds, self.batch_tokens = model, list(golds), batch_tokens
        self.tokens: list[list[int]] = model.tokenizer(list(texts), truncation=True)["input_ids"]
        self.pad = model.tokenizer.pad_token_id or 0

    @torch.inference_mode()
    def score(self, start: int, stop: int) -> list[float]:
        out: dict[int, float] = {}
        for batch in by_length({i: len(self.tokens[i]) for i in range(start, stop)}, self.batch_tokens):
            width = max(len(self.tokens[i]) for i in batch)
            ids = torch.tensor([self.tokens[i] + [self.pad] * (width - len(self.tokens[i])) for i in batch])
            mask = torch.tensor([[1] * len(self.tokens[i]) + [0] * (width - len(self.tokens[i])) for i in batch])
            device = self.model.device
            logits = self.model.module(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()
            if not torch.isfinite(logits).all():
                raise FloatingPointError("the model's outputs are not finite")
            for i, predicted in zip(batch, logits.argmax(-1).tolist(), strict=True):
                out[i] = float(predicted == self.golds[i])
        return [out[i] for i in range(start, stop)]


def _label(value: Any, labels: dict[str, int], entry: TaskEntry) -> int:
    if isinstance(value, int) and value in labels.values():
        return int(value)
    if not isinstance(value, str) or value not in labels:
        raise BadInput(
            f"evaluation: {entry.task} has the label {value!r}, which the model lacks; {nearest(str(value), labels)}"
        )
    return labels[value]
