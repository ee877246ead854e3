"""Log-likelihoods by a decoder-only model, with a context and its answer choices in one row.

Where the architecture allows it, a context and all its continuations go through the model as one row. A block mask lets
every continuation see the context and itself only, and its position ids are those that it would have alone. The results
are those of separate rows up to rounding, for a fraction of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evolver.evaluation.examples import Example, ManyLabels
from evolver.evaluation.language.loglikelihood import Likelihood, Row, TokenIds, of_tokens, summed
from evolver.evaluation.live import LiveModel

# Architectures with rotary positions from position_ids and full attention in every layer, which packing relies on.
PACKABLE = {"llama", "qwen2", "qwen3", "mistral", "olmo", "olmo2", "phi3", "granite", "smollm3", "stablelm", "gpt_neox"}
PADDING, CONTEXT = -1, 0  # parts of a row; the continuations are 1, 2, …


@dataclass(frozen=True)
class Packed:
    """The tensors of a batch of B rows of L tokens, and the places of the M predicted tokens."""

    ids: Tensor  # (B, L)
    positions: Tensor  # (B, L)
    parts: Tensor  # (B, L): padding, context, or which continuation
    keep: int  # logits are needed of the last ``keep`` positions
    rows: Tensor  # (M,) row of every predicted token
    columns: Tensor  # (M,) its place among the kept positions
    targets: Tensor  # (M,) the token itself
    owner: Tensor  # (M,) which continuation it belongs to
    count: int  # continuations


class DecoderOnly:
    """Scores rows with a causal language model."""

    def __init__(self, model: LiveModel, max_length: int) -> None:
        self.model, self.max_length = model, max_length
        settings = model.module.config
        self.shares = settings.model_type in PACKABLE and not getattr(settings, "sliding_window", None)

    def cut(self, context: TokenIds, continuation: TokenIds) -> TokenIds:
        # As in lm-eval, the left end of a context that exceeds the model's length is cut off.
        return context[max(0, len(context) + len(continuation) - self.max_length - 1) :]

    def batch(self, rows: Sequence[Row]) -> Packed:
        """The tensors of some rows, padded at the left so that all predictions stand in the last columns."""
        width = max(r.read for r in rows)
        keep = max(1 + r.read - len(r.context) for r in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        positions, parts = torch.zeros_like(ids), torch.full_like(ids, PADDING)
        predicted: list[tuple[int, int, int, int]] = []
        count = 0
        for b, row in enumerate(rows):
            start = width - row.read
            end = at = start + len(row.context)
            ids[b, start:end], positions[b, start:end] = torch.tensor(row.context), torch.arange(end - start)
            parts[b, start:end] = CONTEXT
            for part, continuation in enumerate(row.continuations, 1):
                stop = at + len(continuation) - 1
                ids[b, at:stop] = torch.tensor(continuation[:-1])
                positions[b, at:stop], parts[b, at:stop] = torch.arange(stop - at) + len(row.context), part
                columns = [end - 1, *range(at, stop)]  # each token is predicted by the logits at the place before it
                offset = width - keep
                predicted += [(b, c - offset, t, count) for c, t in zip(columns, continuation, strict=True)]
                at, count = stop, count + 1
        numbers = torch.tensor(predicted).T
        row_, column, target = (t.to(self.model.device) for t in numbers[:3])
        ids, positions, parts = (t.to(self.model.device) for t in (ids, positions, parts))
        return Packed(ids, positions, parts, keep, row_, column, target, numbers[3], count)

    def example(self, context: TokenIds, continuation: TokenIds) -> Example:
        """The answers are the next tokens at every place of the text, those of the context among them."""
        text = (*context, *continuation)
        ids = torch.tensor([text[:-1]], device=self.model.device)
        return Example({"input_ids": ids, "use_cache": False}, ManyLabels(range(len(text) - 1), text[1:]))

    @torch.inference_mode()
    def score(self, batch: Packed) -> list[Likelihood]:
        logits = self.model.forward(batch.parts != PADDING, **self.inputs(batch)).logits
        scores, misses = of_tokens(logits, batch.rows, batch.columns, batch.targets)
        return summed(scores, misses, batch.owner, batch.count)

    def inputs(self, batch: Packed) -> dict[str, object]:
        """The keyword arguments of the model's forward pass."""
        mask = visible(batch.parts)[:, None] if self.shares else (batch.parts != PADDING).long()
        return {
            "input_ids": batch.ids, "attention_mask": mask, "position_ids": batch.positions,
            "logits_to_keep": batch.keep, "use_cache": False,
        }  # fmt: skip


def visible(parts: Tensor) -> Tensor:
    """The attention mask, (B, L, L): whether a place (second axis) sees another one (third axis).

    A place sees the context and its own continuation, both up to itself. Padding sees only itself.
    """
    one, other = parts[:, :, None], parts[:, None, :]
    causal = torch.ones(parts.shape[1], parts.shape[1], dtype=torch.bool, device=parts.device).tril()
    seen = ((other == CONTEXT) & (one != PADDING)) | (one == other)
    return (seen & causal) | torch.eye(parts.shape[1], dtype=torch.bool, device=parts.device)
