"""What is learnt from: rows of data as tokens, and the loss of a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from evolver.errors import BadInput
from evolver.evaluation.data import Row
from evolver.evaluation.language.decoder import DecoderOnly
from evolver.evaluation.language.loglikelihood import Row as Request
from evolver.evaluation.language.loglikelihood import of_tokens
from evolver.training.settings import ExpertEntry, PoolConfig

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Learner:
    """A model in training, as the losses see it."""

    module: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.module.parameters()).device
        return found


class Loss(Protocol):
    """How a kind of model learns."""

    def lesson(self, row: Row) -> Any | None:
        """A row in tokens; None where it does not fit."""
        ...

    def __call__(self, learner: Learner, lessons: Sequence[Any]) -> Tensor:
        """The mean loss of a batch."""
        ...


@dataclass(frozen=True)
class Labelled:
    """Cross-entropy of a classifier over its labels."""

    tokenizer: Any
    entry: ExpertEntry
    labels: Sequence[str]
    max_tokens: int

    def lesson(self, row: Row) -> tuple[dict[str, list[int]], int]:
        texts = [str(row[self.entry.text]), *([str(row[self.entry.text_pair])] if self.entry.text_pair else [])]
        encoded = dict(self.tokenizer(*texts, truncation=True, max_length=self.max_tokens))
        return encoded, self.labels.index(str(row[self.entry.label]))

    def __call__(self, learner: Learner, lessons: Sequence[tuple[dict[str, list[int]], int]]) -> Tensor:
        inputs = self.tokenizer.pad([dict(encoded) for encoded, _ in lessons], return_tensors="pt")
        logits = learner.module(**inputs.to(learner.device)).logits
        return cross_entropy(logits.float(), torch.tensor([label for _, label in lessons], device=learner.device))


@dataclass(frozen=True)
class Said:
    """Cross-entropy of an encoder–decoder over the tokens of the label that it is to say."""

    tokenizer: Any
    entry: ExpertEntry
    template: str
    max_tokens: int

    def lesson(self, row: Row) -> tuple[list[int], list[int]]:
        text = self.template.replace("{text}", str(row[self.entry.text]))
        read = self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
        return read, self.tokenizer(str(row[self.entry.label]))["input_ids"]

    def __call__(self, learner: Learner, lessons: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        ids, mask = padded([read for read, _ in lessons], self.tokenizer.pad_token_id or 0)
        labels, _ = padded([said for _, said in lessons], IGNORED_LABEL)
        device = learner.device
        loss: Tensor = learner.module(
            input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)
        ).loss
        return loss


@dataclass(frozen=True)
class Continued:
    """Of a causal language model: cross-entropy of a completion's tokens, or of the right choice over the choices'
    log-likelihoods, which is what accuracy by log-likelihood is decided by.
    """

    tokenizer: Any
    max_tokens: int

    def lesson(self, row: Row) -> tuple[Request, int] | None:
        context = tuple(self.tokenizer(row["prompt"])["input_ids"])
        said = row["choices"] if "choices" in row else [row["completion"]]
        whole = [tuple(self.tokenizer(row["prompt"] + str(c))["input_ids"]) for c in said]
        request = Request(context, tuple(w[len(context) :] for w in whole), ())
        return (request, int(row.get("answer", 0))) if request.read < self.max_tokens else None

    def __call__(self, learner: Learner, lessons: Sequence[tuple[Request, int]]) -> Tensor:
        forward = DecoderOnly(learner, self.max_tokens)  # type: ignore[arg-type]  # it has what is needed of a live model
        batch = forward.batch([row for request, _ in lessons for row in self._rows(request, forward.shares)])
        logits = learner.module(**forward.inputs(batch)).logits
        scores, _ = of_tokens(logits, batch.rows, batch.columns, batch.targets)
        sums = torch.zeros(batch.count, device=scores.device).index_add(0, batch.owner.to(scores.device), scores)
        losses, at = [], 0
        for request, answer in lessons:
            part = sums[at : at + len(request.continuations)]
            at += len(part)
            if len(part) == 1:
                losses.append(-part[0] / len(request.continuations[0]))
            else:
                losses.append(cross_entropy(part, torch.tensor(answer, device=part.device)))
        return torch.stack(losses).mean()

    def _rows(self, request: Request, shares: bool) -> list[Request]:
        """One row, or one a continuation where the architecture cannot tell continuations of a row apart."""
        return [request] if shares else [Request(request.context, (c,), ()) for c in request.continuations]


def loss_of(pool: PoolConfig, name: str, tokenizer: Any, labels: Sequence[str]) -> Loss:
    """How an expert of a pool learns."""
    entry, most = pool.experts[name], pool.training(name).max_tokens
    if pool.kind == "classifier":
        return Labelled(tokenizer, entry, labels, most)
    if pool.kind == "seq2seq":
        return Said(tokenizer, entry, pool.template, most)
    return Continued(tokenizer, most)


def training_text(pool: PoolConfig, entry: ExpertEntry, row: Row) -> str:
    """The text of a row that the model reads; of a pair of texts the first one. See ``Sourced.text``."""
    if pool.kind == "causal-lm":
        return str(row["prompt"])
    text = str(row[entry.text])
    return pool.template.replace("{text}", text) if pool.kind == "seq2seq" else text


def lessons_of(loss: Loss, rows: Sequence[Row], key: str) -> list[Any]:
    """All rows in tokens, those that do not fit left out.

    Raises BadInput for rows that lack a key or have an unknown label, or where nothing is left.
    """
    out = []
    for number, row in enumerate(rows, 1):
        try:
            lesson = loss.lesson(row)
        except (KeyError, ValueError, TypeError) as error:
            raise BadInput(
                f"{key}: row {number} cannot be used for training ({error}); correct the row or the keys."
            ) from error
        if lesson is not None:
            out.append(lesson)
    if not out:
        raise BadInput(f"{key}: no row can be used for training; write a larger max_tokens if it is too small.")
    return out


def padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Rows (R, longest), padded at the right, and where they are not padding."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
