"""Log-likelihoods by an encoder–decoder model such as T5. A context is encoded once for all its continuations.

The first step of the decoder is also computed once for each context. Its cache, which holds the keys and values of the
cross-attention, is then repeated for the continuations, and only their further tokens are decoded. Where gradients are
taken, there is one pass of the module instead, for which the context is repeated for each of its continuations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from evolver.errors import BadInput
from evolver.evaluation.blueprint import Blueprint
from evolver.evaluation.examples import Example, ManyLabels
from evolver.evaluation.language.loglikelihood import Likelihood, Row, TokenIds, of_tokens, summed
from evolver.evaluation.live import LiveModel


@dataclass(frozen=True)
class Encoded:
    """The tensors of a batch of B contexts of at most L tokens, with C continuations of at most K tokens in all."""

    ids: Tensor  # (B, L) contexts, padded at the right
    mask: Tensor  # (B, L) of 0 and 1
    owner: Tensor  # (C,) the context of every continuation
    continuations: Tensor  # (C, K), padded with zeros at the right
    lengths: Tensor  # (C,)


class EncoderDecoder:
    """Scores rows with a sequence-to-sequence language model.

    Args:
        model: the live model.
        max_length: most tokens of a context. Continuations go to the decoder, so they take no room beside it.
    """

    shares = True
    max_length = sys.maxsize  # a row may hold any number of continuations

    def __init__(self, model: LiveModel, max_length: int) -> None:
        self.model, self._longest = model, max_length

    def check(self) -> None:
        """See ``check_start``."""
        check_start(self.model)

    def cut(self, context: TokenIds, continuation: TokenIds) -> TokenIds:
        return context[-self._longest :]

    def batch(self, rows: Sequence[Row]) -> Encoded:
        said = [c for r in rows for c in r.continuations]
        ids, lengths = _padded([r.context for r in rows])
        continuations, sizes = _padded(said)
        owner = torch.tensor([b for b, r in enumerate(rows) for _ in r.continuations])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        tensors = (ids, mask, owner, continuations, sizes)
        return Encoded(*(t.to(self.model.device) for t in tensors))

    def example(self, context: TokenIds, continuation: TokenIds) -> Example:
        """The answers are the tokens of the continuation, which the decoder says."""
        start = self.model.module.config.decoder_start_token_id
        ids = {"input_ids": [context], "decoder_input_ids": [(start, *continuation[:-1])]}
        inputs = {name: torch.tensor(rows, device=self.model.device) for name, rows in ids.items()}
        return Example({**inputs, "use_cache": False}, ManyLabels(range(len(continuation)), continuation))

    @torch.inference_mode()
    def score(self, batch: Encoded) -> list[Likelihood]:
        longest = int(batch.lengths.max())
        said = torch.arange(longest, device=self.model.device) < batch.lengths[:, None]
        if self.model.passing is not None:
            logits = self._at_once(batch, said)
        else:
            with self.model.passes() as at:
                logits = self._in_parts(batch, longest, at)
        rows, columns = said.nonzero().T
        scores, misses = of_tokens(logits, rows, columns, batch.continuations[rows, columns])
        return summed(scores, misses, rows.cpu(), len(batch.owner))

    def _at_once(self, batch: Encoded, said: Tensor) -> Tensor:
        """The logits (C, K, vocabulary) by one pass of the module; ``said`` (C, K) are the places that count."""
        start = torch.full_like(batch.continuations[:, :1], self.model.module.config.decoder_start_token_id)
        ids = torch.cat([start, batch.continuations[:, : said.shape[1] - 1]], 1)
        logits: Tensor = self.model.forward(
            said, input_ids=batch.ids[batch.owner], attention_mask=batch.mask[batch.owner], decoder_input_ids=ids,
            use_cache=False,
        ).logits  # fmt: skip
        return logits

    def _in_parts(self, batch: Encoded, longest: int, at: Callable[..., None]) -> Tensor:
        """The logits (C, K, vocabulary), with each context encoded once.

        Args:
            longest: K.
            at: is told which positions are no padding, see ``LiveModel.passes``. What the decoder reads of the context
                goes through its layers in its first step only.
        """
        module, read = self.model.module, batch.mask.bool()
        at(read)
        encoded = module.get_encoder()(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        start = torch.full_like(batch.ids[:, :1], module.config.decoder_start_token_id)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        at(torch.ones_like(start, dtype=torch.bool), read)
        logits = self._decode(encoded, batch.mask, start, cache)[batch.owner]  # (C, 1, vocabulary)
        if longest == 1:
            return logits
        cache.batch_select_indices(batch.owner)
        places = torch.arange(1, longest, device=logits.device)
        at(places < batch.lengths[:, None])
        rest = self._decode(encoded[batch.owner], batch.mask[batch.owner], batch.continuations[:, : longest - 1], cache)
        return torch.cat([logits, rest], 1)

    def _decode(self, encoded: Tensor, mask: Tensor, ids: Tensor, cache: EncoderDecoderCache) -> Tensor:
        """The decoder's logits (rows, ids, vocabulary) for the tokens ``ids``, which follow those in the cache."""
        logits: Tensor = self.model.module(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded), attention_mask=mask, decoder_input_ids=ids,
            past_key_values=cache, use_cache=True,
        ).logits  # fmt: skip
        return logits


def check_start(model: LiveModel | Blueprint) -> None:
    """Check that every answer starts with the decoder's start token, as the computation here assumes.

    Raises BadInput for a model that has no start token, or that starts an answer with another token.
    """
    module = model.module
    start = getattr(module.config, "decoder_start_token_id", None)
    if start is None:
        raise no_start(model)
    shifted = module.prepare_decoder_input_ids_from_labels(torch.tensor([[5, 6]]))
    if shifted.tolist() != [[start, 5]]:
        raise BadInput(
            f"model.base: {type(module).__name__} begins each answer with a token that names its language, so the "
            "likelihood of an answer cannot be computed; choose tasks with generated answers."
        )


def no_start(model: LiveModel | Blueprint) -> BadInput:
    """What is said of a model whose answers have no first token."""
    return BadInput(
        f"model.base: {model.folder} has no decoder_start_token_id, with which the model begins each answer; write it "
        "into its config.json (for a T5 it is the pad_token_id)."
    )


def _padded(rows: Sequence[TokenIds]) -> tuple[Tensor, Tensor]:
    """The rows as one tensor (R, longest), padded with zeros at the right, and their lengths (R,)."""
    lengths = [len(r) for r in rows]
    out = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for number, row in enumerate(rows):
        out[number, : len(row)] = torch.tensor(row)
    return out, torch.tensor(lengths)
