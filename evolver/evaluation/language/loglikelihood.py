"""Log-likelihoods of continuations by the live model, with as few tokens in forward passes as possible.

Equal requests are scored once, and the answer choices of a question share the forward pass over its context. How they
share it depends on the architecture; see the modules ``decoder`` and ``encoder_decoder``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from evolver.evaluation.batches import Batches, PreparedParts, by_length
from evolver.evaluation.examples import Example

TokenIds = tuple[int, ...]
Likelihood = tuple[float, bool]

# Rows of logits that a CPU normalises at a time, so that they stay in its cache.
CACHED_ROWS = 16


@dataclass(frozen=True)
class Group:
    """The requests of one item.

    Attributes:
        pairs: the context and the continuation of each request, in tokens.
        rolling: whether the requests are consecutive windows of one text, whose log-likelihoods are added.
    """

    pairs: tuple[tuple[TokenIds, TokenIds], ...]
    rolling: bool = False


@dataclass(frozen=True)
class Row:
    """Continuations of one context that go through the model together.

    Attributes:
        context: the tokens of the context.
        continuations: the tokens of every continuation.
        places: for every continuation, the requests that it answers, as (group, number of the request).
    """

    context: TokenIds
    continuations: tuple[TokenIds, ...]
    places: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def read(self) -> int:
        """The number of tokens that the model reads. It does not read the last token of a continuation."""
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)


@dataclass
class Likelihoods:
    """The answers to the requests of every group.

    Attributes:
        answers: for every request its log-likelihood, and whether greedy decoding would give the same continuation.
        tokens: number of tokens that the model read.
        truncated: the groups with a context that was cut.
    """

    answers: dict[int, list[Likelihood]]
    tokens: int = 0
    truncated: set[int] = field(default_factory=set)


BatchType = TypeVar("BatchType")


class Forward(Protocol[BatchType]):
    """The interface of an architecture that scores rows."""

    # The most tokens of a row, and whether a row may hold several continuations.
    max_length: int
    shares: bool

    def cut(self, context: TokenIds, continuation: TokenIds) -> TokenIds:
        """The end of the context, as much of it as fits beside the continuation."""
        ...

    def batch(self, rows: Sequence[Row]) -> BatchType: ...

    def example(self, context: TokenIds, continuation: TokenIds) -> Example:
        """A context and a continuation that was observed after it, for gradients."""
        ...

    def score(self, batch: BatchType) -> list[Likelihood]:
        """The answer to every continuation, row by row."""
        ...


class LogLikelihoods(Generic[BatchType]):
    """Answers groups of requests.

    Args:
        forward: scores rows with the live model.
        batch_tokens: the most tokens in a forward pass, padding included.
        batch_size: the most rows in a forward pass; None: any number.
    """

    def __init__(self, forward: Forward[BatchType], batch_tokens: int, batch_size: int | None) -> None:
        self._forward, self._budget, self._most = forward, batch_tokens, batch_size
        self._ready: PreparedParts[tuple[list[Row], Batches[BatchType], set[int]]] = PreparedParts()

    def __call__(self, groups: Mapping[int, Group]) -> Likelihoods:
        """The answers of every group, in the order of its requests.

        Raises FloatingPointError where a log-likelihood is not finite.
        """
        key = tuple(groups)
        if key not in self._ready:  # every candidate is scored on the same items, so their tensors are built once
            self._ready[key] = self._prepare(groups)
        rows, batches, truncated = self._ready[key]
        found: dict[tuple[int, int], Likelihood] = {}
        for numbers, answers in batches.run(self._forward.score):
            places = [p for n in numbers for p in rows[n].places]
            for members, answer in zip(places, answers, strict=True):
                found.update(dict.fromkeys(members, answer))
        said = {g: [found[g, r] for r in range(len(group.pairs))] for g, group in groups.items()}
        return Likelihoods(said, sum(r.read for r in rows), truncated)

    def examples(self, pairs: Iterable[tuple[TokenIds, TokenIds]]) -> Iterator[Example]:
        """Contexts with what was observed after them, for gradients."""
        for context, said in pairs:
            yield self._forward.example(self._forward.cut(context, said), said)

    def _prepare(self, groups: Mapping[int, Group]) -> tuple[list[Row], Batches[BatchType], set[int]]:
        truncated: set[int] = set()
        shared: dict[TokenIds, dict[TokenIds, list[tuple[int, int]]]] = {}
        for number, group in groups.items():
            for request, (context, continuation) in enumerate(group.pairs):
                kept = self._forward.cut(context, continuation)
                if len(kept) < len(context):
                    truncated.add(number)
                shared.setdefault(kept, {}).setdefault(continuation, []).append((number, request))
        rows = [row for context, members in shared.items() for row in self._rows(context, members)]
        keys = by_length({i: row.read for i, row in enumerate(rows)}, self._budget, self._most)
        return rows, Batches(keys, lambda numbers: self._forward.batch([rows[n] for n in numbers])), truncated

    def _rows(self, context: TokenIds, members: Mapping[TokenIds, list[tuple[int, int]]]) -> Iterator[Row]:
        """Rows with as many continuations as fit into the model's length and into ``batch_tokens``."""
        room = min(self._forward.max_length, max(self._budget, len(context) + 1)) if self._forward.shares else 0
        held: list[TokenIds] = []
        size = len(context)
        for continuation in members:
            if held and size + len(continuation) - 1 > room:
                yield _row(context, held, members)
                held, size = [], len(context)
            held.append(continuation)
            size += len(continuation) - 1
        yield _row(context, held, members)


def _row(context: TokenIds, held: Sequence[TokenIds], members: Mapping[TokenIds, list[tuple[int, int]]]) -> Row:
    return Row(context, tuple(held), tuple(tuple(members[c]) for c in held))


def of_tokens(logits: Tensor, rows: Tensor, columns: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The log-likelihoods (M,) of M tokens, and whether each of them (M,) differs from the most likely token.

    The first tokens of all continuations of a context are predicted by the same logits, which are normalised once.

    Args:
        logits: the model's output, (rows, columns, vocabulary).
        rows, columns: where in ``logits`` each token is predicted, (M,).
        targets: the tokens, (M,).

    Raises FloatingPointError where a log-likelihood is not finite.
    """
    places, which = torch.unique(rows * logits.shape[1] + columns, return_inverse=True)
    step = CACHED_ROWS if logits.device.type == "cpu" else len(places)
    totals, likeliest = [], []
    for part in places.split(step):
        there = logits[part // logits.shape[1], part % logits.shape[1]].float()  # (step, vocabulary)
        totals.append(there.logsumexp(1))
        likeliest.append(there.argmax(1))
    found = logits[rows, columns, targets].float() - torch.cat(totals)[which]
    if not torch.isfinite(found).all():
        raise FloatingPointError("the model's log-likelihoods are not finite")
    return found, torch.cat(likeliest)[which] != targets


def summed(scores: Tensor, misses: Tensor, owner: Tensor, count: int) -> list[Likelihood]:
    """The answers to ``count`` continuations.

    Args:
        scores: the log-likelihoods of all their tokens, (M,).
        misses: whether each token differs from the most likely one, (M,).
        owner: the continuation that each token belongs to, (M,).
    """
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, owner, scores.double().cpu())
    wrong = torch.zeros(count, dtype=torch.int64).index_add_(0, owner, misses.long().cpu())
    return list(zip(sums.tolist(), (wrong == 0).tolist(), strict=True))
