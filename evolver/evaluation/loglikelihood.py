"""Log-likelihoods of continuations by the live model, with as few token passes as the answers need.

The choices of a question share its context. Where the architecture allows, context and choices go through the model
as one row: every choice sees the context and itself (a block mask), at the positions that it would have alone. The
result is that of separate rows up to rounding, for a fraction of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evolver.evaluation.batches import by_length
from evolver.evaluation.live import LiveModel

Tokens = tuple[int, ...]
Answer = tuple[float, bool]

# Rotary positions from position_ids and full attention in every layer: what packing relies on.
PACKABLE = {"llama", "qwen2", "qwen3", "mistral", "olmo", "olmo2", "phi3", "granite", "smollm3", "stablelm", "gpt_neox"}

# Rows of the vocabulary that are normalised at a time on a CPU: what stays in its cache.
CACHED_ROWS = 16


@dataclass(frozen=True)
class Group:
    """The requests of one item: (context, continuation) in tokens."""

    pairs: tuple[tuple[Tokens, Tokens], ...]


@dataclass(frozen=True)
class _Row:
    """One row of a batch: a shared context, then continuations, each with the place of its answer."""

    context: Tokens
    continuations: tuple[Tokens, ...]
    places: tuple[tuple[int, int], ...]  # (group, request) of every continuation

    @property
    def width(self) -> int:
        # The last token of a continuation is predicted, never read.
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)


@dataclass(frozen=True)
class _Batch:
    """Tensors of a batch, and where the predictions of each continuation stand."""

    ids: Tensor  # (B, L)
    positions: Tensor  # (B, L)
    mask: Tensor  # (B, L) of 0 and 1, or (B, 1, L, L) of booleans where rows are packed
    keep: int  # logits are needed of the last ``keep`` positions
    rows: Tensor  # (M,) row of every predicted token
    columns: Tensor  # (M,) its place among the kept positions
    targets: Tensor  # (M,) the token itself
    owner: Tensor  # (M,) which continuation it belongs to
    places: tuple[tuple[int, int], ...]


class LogLikelihoods:
    """Turns groups of requests into answers (log-likelihood, whether greedy decoding would say the same)."""

    def __init__(self, model: LiveModel, batch_tokens: int, max_length: int) -> None:
        self.model, self.batch_tokens, self.max_length = model, batch_tokens, max_length
        settings = model.module.config
        self.packs = settings.model_type in PACKABLE and not getattr(settings, "sliding_window", None)
        self._prepared: dict[tuple[int, ...], list[_Batch]] = {}

    def __call__(self, groups: Mapping[int, Group]) -> dict[int, list[Answer]]:
        """The answers of every group, in the order of its requests."""
        key = tuple(groups)
        if key not in self._prepared:  # the same items come with every candidate: build their tensors once
            self._prepared[key] = list(self._batches(groups))
        found: dict[tuple[int, int], Answer] = {}
        for batch in self._prepared[key]:
            found.update(zip(batch.places, self._score(batch), strict=True))
        return {g: [found[g, r] for r in range(len(group.pairs))] for g, group in groups.items()}

    @torch.inference_mode()
    def _score(self, batch: _Batch) -> list[Answer]:
        logits = self.model.module(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            logits_to_keep=batch.keep,
            use_cache=False,
        ).logits
        scores, misses = self._of_tokens(logits, batch)
        if not torch.isfinite(scores).all():
            raise FloatingPointError("the model's log-likelihoods are not finite")
        count = len(batch.places)
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, batch.owner, scores.double().cpu())
        misses = torch.zeros(count, dtype=torch.int64).index_add_(0, batch.owner, misses.long().cpu())
        return list(zip(sums.tolist(), (misses == 0).tolist(), strict=True))

    def _of_tokens(self, logits: Tensor, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Log-likelihood (M,) of every predicted token, and whether it is not the most likely one (M,)."""
        total = len(batch.rows)
        step = CACHED_ROWS if logits.device.type == "cpu" else total
        scores, misses = [], []
        for start in range(0, total, step):
            part = slice(start, start + step)
            chosen = logits[batch.rows[part], batch.columns[part]].float()  # (step, vocabulary)
            targets = batch.targets[part]
            scores.append(chosen.gather(1, targets[:, None])[:, 0] - chosen.logsumexp(1))
            misses.append(chosen.argmax(1) != targets)
        return torch.cat(scores), torch.cat(misses)

    def _batches(self, groups: Mapping[int, Group]) -> Iterator[_Batch]:
        rows = [row for number, group in groups.items() for row in self._rows(number, group)]
        for batch in by_length({i: row.width for i, row in enumerate(rows)}, self.batch_tokens):
            yield _batch([rows[i] for i in batch], self.packs, self.model.device)

    def _rows(self, number: int, group: Group) -> Iterator[_Row]:
        shared: dict[Tokens, list[tuple[Tokens, tuple[int, int]]]] = {}
        for request, (context, continuation) in enumerate(group.pairs):
            place = (number, request)
            # As lm-eval does: what exceeds the model's length is cut off at the left.
            context = context[max(0, len(context) + len(continuation) - self.max_length - 1) :]
            shared.setdefault(context, []).append((continuation, place))
        for context, members in shared.items():
            packed = _Row(context, tuple(c for c, _ in members), tuple(p for _, p in members))
            if self.packs and packed.width <= self.max_length:
                yield packed
            else:
                yield from (_Row(context, (c,), (p,)) for c, p in members)


def _batch(rows: Sequence[_Row], packed: bool, device: torch.device) -> _Batch:
    """Rows side by side, padded at the left so that all predictions stand in the last columns."""
    width = max(r.width for r in rows)
    keep = max(1 + r.width - len(r.context) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    visible = torch.zeros(len(rows), width, width, dtype=torch.bool)
    predicted: list[tuple[int, int, int, int]] = []
    places: list[tuple[int, int]] = []
    for b, row in enumerate(rows):
        start = width - row.width
        end = start + len(row.context)
        ids[b, start:end] = torch.tensor(row.context)
        positions[b, start:end] = torch.arange(len(row.context))
        visible[b, start:end, start:end] = _triangle(end - start)
        visible[b, :start].diagonal()[:start] = True  # padding sees itself: an empty row of a softmax is not a number
        at = end
        for continuation, place in zip(row.continuations, row.places, strict=True):
            size = len(continuation) - 1
            stop = at + size
            ids[b, at:stop] = torch.tensor(continuation[:-1])
            positions[b, at:stop] = torch.arange(size) + len(row.context)
            visible[b, at:stop, start:end] = True
            visible[b, at:stop, at:stop] = _triangle(size)
            columns = [end - 1, *range(at, stop)]  # each token is predicted at the place before it
            offset = width - keep
            predicted += [(b, c - offset, t, len(places)) for c, t in zip(columns, continuation, strict=True)]
            places.append(place)
            at = stop
    numbers = torch.tensor(predicted).T
    mask = visible[:, None] if packed else _not_padding(rows, width).long()
    row, column, target = (t.to(device) for t in numbers[:3])
    ids, positions, mask = (t.to(device) for t in (ids, positions, mask))
    return _Batch(ids, positions, mask, keep, row, column, target, numbers[3], tuple(places))


def _triangle(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


def _not_padding(rows: Sequence[_Row], width: int) -> Tensor:
    return torch.tensor([[column >= width - r.width for column in range(width)] for r in rows])
