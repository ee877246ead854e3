"""Log-likelihoods of continuations by the live model, with as few token passes as the answers need.

Requests that repeat are scored once, and the choices of a question share the pass over its context. How they share it
is the architecture's matter: see ``decoder`` and ``encoder_decoder``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from evolver.evaluation.batches import Batches, by_length

TokenIds = tuple[int, ...]
Likelihood = tuple[float, bool]

# Rows of the vocabulary that are normalised at a time on a CPU: what stays in its cache.
CACHED_ROWS = 16


@dataclass(frozen=True)
class Group:
    """The requests of one item: (context, continuation) in tokens. ``rolling``: they are windows of one text."""

    pairs: tuple[tuple[TokenIds, TokenIds], ...]
    rolling: bool = False


@dataclass(frozen=True)
class Row:
    """What shares one context: continuations, each with the requests (group, number) that it answers."""

    context: TokenIds
    continuations: tuple[TokenIds, ...]
    places: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def read(self) -> int:
        """Tokens that the model reads: the last one of a continuation is predicted, never read."""
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)


@dataclass
class Likelihoods:
    """Answers (log-likelihood, whether greedy decoding would say the same) to the requests of every group."""

    answers: dict[int, list[Likelihood]]
    tokens: int = 0
    truncated: set[int] = field(default_factory=set)


BatchType = TypeVar("BatchType")


class Forward(Protocol[BatchType]):
    """How an architecture scores rows."""

    # Most tokens of a row, and whether a row may hold several continuations.
    max_length: int
    shares: bool

    def cut(self, context: TokenIds, continuation: TokenIds) -> TokenIds:
        """The end of the context that fits beside the continuation."""
        ...

    def batch(self, rows: Sequence[Row]) -> BatchType: ...

    def score(self, batch: BatchType) -> list[Likelihood]:
        """The answer to every continuation, row by row."""
        ...


class LogLikelihoods(Generic[BatchType]):
    """Turns groups of requests into answers.

    Args:
        batch_tokens: in a forward pass, padding included.
        batch_size: rows in a forward pass; default: any number.
    """

    def __init__(self, forward: Forward[BatchType], batch_tokens: int, batch_size: int | None) -> None:
        self._forward, self._budget, self._most = forward, batch_tokens, batch_size
        self._ready: dict[tuple[int, ...], tuple[list[Row], Batches[BatchType], set[int]]] = {}

    def __call__(self, groups: Mapping[int, Group]) -> Likelihoods:
        """The answers of every group, in the order of its requests.

        Raises FloatingPointError where a log-likelihood is not finite.
        """
        key = tuple(groups)
        if key not in self._ready:  # the same items come with every candidate: build their tensors once
            self._ready[key] = self._prepare(groups)
        rows, batches, truncated = self._ready[key]
        found: dict[tuple[int, int], Likelihood] = {}
        for numbers, answers in batches.run(self._forward.score):
            places = [p for n in numbers for p in rows[n].places]
            for members, answer in zip(places, answers, strict=True):
                found.update(dict.fromkeys(members, answer))
        said = {g: [found[g, r] for r in range(len(group.pairs))] for g, group in groups.items()}
        return Likelihoods(said, sum(r.read for r in rows), truncated)

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
        """Rows of as many continuations as the model's length, and the budget, have room for."""
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
    """Log-likelihoods (M,) of ``targets`` (M,) by ``logits[rows, columns]``, and whether each is not the likeliest.

    The first tokens of all continuations of a context are predicted at one place, which is normalised once.

    Raises FloatingPointError where one is not finite.
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
    """Answers to ``count`` continuations from their tokens; ``owner`` (M,) says whose each token is."""
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, owner, scores.double().cpu())
    wrong = torch.zeros(count, dtype=torch.int64).index_add_(0, owner, misses.long().cpu())
    return list(zip(sums.tolist(), (wrong == 0).tolist(), strict=True))
