"""Classification heads that are not merged as they stand: kept apart, or brought into one space of labels.

Apart: the models are merged without their heads, and each task is scored with the head of one expert. Union: every
model is seen with a head over all labels, whose rows are matched by label, not by place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evolver.checkpoints.adapted import model_below, seen_through
from evolver.checkpoints.adapter import Adapter
from evolver.checkpoints.weights import Checkpoint, Source, TensorInfo, digest_of_tensors, is_head
from evolver.errors import BadInput

Head = dict[str, Tensor]


def head_of(source: Source, base: Checkpoint) -> Head:
    """The tensors of a model's own head; that of an adapter without one is the head of the model that it is on.

    Args:
        base: of the run, whose tensors all models get that lack them.

    Raises BadInput where it has none.
    """
    adapter, below = seen_through(source), model_below(source)
    if isinstance(adapter, Adapter):
        own = adapter.saved(is_head)
        found = own if own and below is model_below(base) and source is adapter else {**_saved(below), **own}
    else:
        found = _saved(source)
    if not found:
        raise BadInput(f"{source.key}: {source.path} holds no classification head; give a classifier.")
    rows, labels = list(found.values())[-1].shape[0], labels_in_order(getattr(below, "config", {}))
    if source is adapter and below is not model_below(base) and len(labels) not in (0, rows):
        raise BadInput(
            f"{source.key}: the head of the adapter {source.path} has {rows} rows, and config.json of {below.path} "
            f"names {len(labels)} labels; merge the two with PEFT (merge_and_unload) and give that folder."
        )
    return found


def head_digest(head: Head) -> str:
    """80 bits of the SHA-256 of a head's names, shapes and bytes."""
    return digest_of_tensors(sorted(head.items()))[:20]


def labels_in_order(config: Mapping[str, Any]) -> list[str]:
    """The labels of a classifier's configuration by their number; empty where it names none."""
    found = config.get("id2label") or {}
    return [str(found[k]) for k in sorted(found, key=int)]


def all_labels(experts: Mapping[str, Sequence[str]]) -> list[str]:
    """The labels of all experts, each once, in the order in which they are met."""
    return list(dict.fromkeys(label for labels in experts.values() for label in labels))


def own_labels(source: Source, head: Head) -> list[str]:
    """The labels of a classifier by their number; empty where it names none. An adapter has those of the model that it
    is on, if its head has as many rows.
    """
    below = model_below(source)
    found = labels_in_order(below.config) if isinstance(below, Checkpoint) else []
    fits = below is source or {len(found)} == {tensor.shape[0] for name, tensor in [*head.items()][-1:]}
    return found if fits else []


class Relabelled(Checkpoint):
    """A classifier seen with a head over all labels.

    A row of a label that the model lacks is the base's where the base has it, else the mean of the experts' that do:
    then it adds nothing to a mean of heads, as each label's row is averaged over the models that know it. A tensor
    without such rows that the base lacks, such as a pooler, is the model's own, else the mean of the experts'.

    Args:
        inner: the model, seen without its head.
        name: by which ``heads`` and ``labels`` know it.
        heads: of every model by name; the base may have none.
        labels: of every model by name, in the order of its head's rows.
        target: all labels.
    """

    def __init__(
        self, inner: Source, name: str, heads: Mapping[str, Head], labels: Mapping[str, Sequence[str]],
        target: Sequence[str], base: Checkpoint,
    ) -> None:  # fmt: skip
        self.path, self.key = inner.path, inner.key
        self.inner, self.name, self.heads, self.labels, self.target, self.base = (
            inner,
            name,
            heads,
            labels,
            target,
            base,
        )

    @cached_property
    def headers(self) -> dict[str, TensorInfo]:
        tensors = {n: t for name, head in reversed([*self.heads.items()]) if name != "base" for n, t in head.items()}
        shapes = {n: TensorInfo(self._wanted_shape(n, t), t.dtype) for n, t in tensors.items()}
        return dict(sorted({**self.base.headers, **shapes}.items()))

    @property
    def config(self) -> dict[str, Any]:  # derived here, read from files there
        ids = {str(i): label for i, label in enumerate(self.target)}
        return {**self.base.config, "id2label": ids, "label2id": {label: int(i) for i, label in ids.items()}}

    def files(self) -> list[Path]:
        return self.inner.files()

    def tensor(self, name: str) -> Tensor:
        if name in self.base.headers:
            return self.inner.tensor(name)
        info = self.headers[name]
        if not is_head(name) or info.shape[:1] != (len(self.target),):  # no rows of labels: a pooler, a lower layer
            own = self.heads.get(self.name, {}).get(name)
            return own if own is not None else self._mean([h[name] for h in self.heads.values() if name in h], info)
        return torch.stack([self._row(name, label, info) for label in self.target])

    def digest(self) -> str:
        parts = [
            self.inner.digest(),
            self.name,
            json.dumps([list(self.target), {k: list(v) for k, v in self.labels.items()}]),
        ]
        parts += [f"{n} {head_digest(h)}" for n, h in sorted(self.heads.items())]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:20]

    def _row(self, name: str, label: str, info: TensorInfo) -> Tensor:
        for model in (self.name, "base"):
            if label in self.labels.get(model, ()) and name in self.heads.get(model, {}):
                return self.heads[model][name][list(self.labels[model]).index(label)].to(info.dtype)
        knowing = [m for m, known in self.labels.items() if label in known and name in self.heads.get(m, {})]
        return self._mean([self.heads[m][name][list(self.labels[m]).index(label)] for m in knowing], info)

    def _mean(self, tensors: Sequence[Tensor], info: TensorInfo) -> Tensor:
        return torch.stack([t.float() for t in tensors]).mean(0).to(info.dtype)

    def _wanted_shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        rows = {len(known) for known in self.labels.values()} if is_head(name) else set()
        return (len(self.target), *tensor.shape[1:]) if tensor.shape[0] in rows else tuple(tensor.shape)


def _saved(source: Source) -> Head:
    whole = Checkpoint(source.path, source.key)
    below = source.parts() if isinstance(source, Checkpoint) else {}
    return {**below, **{n: whole.tensor(n) for n in whole.names() if is_head(n)}}
