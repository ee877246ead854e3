"""Written answers: prompts of like length side by side, by the generation of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from evolver.config import EvaluationSettings
from evolver.evaluation.batches import Batches, by_length
from evolver.evaluation.language.tokens import Manner, Prompt, Tokens
from evolver.evaluation.live import LiveModel


@dataclass
class WrittenText:
    """Texts of every prompt, as many as it asks for, and which of them met their limit before their end."""

    texts: dict[int, list[str]]
    tokens: int
    truncated: set[int]


@dataclass(frozen=True)
class _Batch:
    """Prompts of one manner: padded at the left for a decoder, which writes on at the right; at the right for an
    encoder, whose positions may be absolute.
    """

    ids: Tensor  # (B, L)
    mask: Tensor  # (B, L) of 0 and 1
    lengths: tuple[int, ...]
    manner: Manner
    repeats: int
    seed: int


class Generations:
    """Lets the live model answer prompts.

    Where a task samples, the draws depend on the run's seed and on the batch only, so that a candidate says the same
    whenever it is asked.
    """

    def __init__(self, model: LiveModel, lm: Tokens, settings: EvaluationSettings, seed: int) -> None:
        self._model, self._lm, self._seed = model, lm, seed
        self._budget, self._most = settings.batch_tokens, settings.batch_size
        self._ready: dict[tuple[int, ...], list[Batches[_Batch]]] = {}

    def __call__(self, prompts: Mapping[int, Prompt]) -> WrittenText:
        """The answers to every prompt.

        Raises FloatingPointError where the model's outputs are not finite.
        """
        key = tuple(prompts)
        if key not in self._ready:
            self._ready[key] = list(self._batches(prompts))
        out = WrittenText({p: [] for p in prompts}, 0, {p for p, prompt in prompts.items() if prompt.truncated})
        for batches in self._ready[key]:
            for numbers, (texts, tokens, cut) in batches.run(self._write):
                out.tokens += tokens
                for place, said in zip(numbers, texts, strict=True):
                    out.texts[place] += said
                out.truncated |= {numbers[row] for row in cut}
        return out

    def _batches(self, prompts: Mapping[int, Prompt]) -> Iterator[Batches[_Batch]]:
        for manner in dict.fromkeys(p.manner for p in prompts.values()):
            lengths = {n: len(p.ids) for n, p in prompts.items() if p.manner == manner}
            yield Batches(
                by_length(lengths, self._budget, self._most),
                lambda numbers: self._batch(numbers, [prompts[n] for n in numbers]),
            )

    def _batch(self, numbers: Sequence[int], prompts: Sequence[Prompt]) -> _Batch:
        width = max(len(p.ids) for p in prompts)
        ids = torch.full((len(prompts), width), self._lm.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            start = width - len(prompt.ids) if self._lm.backend == "causal" else 0
            ids[row, start : start + len(prompt.ids)] = torch.tensor(prompt.ids)
            mask[row, start : start + len(prompt.ids)] = 1
        lengths = tuple(len(p.ids) for p in prompts)
        repeats = max(p.repeats for p in prompts) if prompts[0].manner.settings.get("do_sample") else 1
        device = self._model.device
        return _Batch(ids.to(device), mask.to(device), lengths, prompts[0].manner, repeats, self._seed + numbers[0])

    @torch.inference_mode()
    def _write(self, batch: _Batch) -> tuple[list[list[str]], int, set[int]]:
        """Texts of every row, tokens that were read or written, and rows that were cut short."""
        texts: list[list[str]] = [[] for _ in batch.lengths]
        total, cut = sum(batch.lengths), set()
        torch.manual_seed(batch.seed)
        for _ in range(batch.repeats):
            for row, tokens in enumerate(self._tokens(batch)):
                texts[row].append(self._lm.text(tokens, batch.manner))
                total += len(tokens)
                if len(tokens) >= batch.manner.most and not self._ended(tokens, batch.manner):
                    cut.add(row)
        return texts, total, cut

    def _tokens(self, batch: _Batch) -> Iterator[list[int]]:
        """What each row was continued with."""
        causal = self._lm.backend == "causal"
        said = self._lm._model_generate(
            context=batch.ids, attention_mask=batch.mask, stop=list(batch.manner.until),
            max_length=batch.ids.shape[1] + batch.manner.most,
            logits_processor=LogitsProcessorList([_Finite()]), **batch.manner.settings,
        )  # fmt: skip
        for row, tokens in enumerate(said.tolist()):
            # lm-eval counts the prompt of an encoder–decoder among the tokens that may be written.
            room = batch.manner.most + (0 if causal else batch.lengths[row])
            kept = tokens[batch.ids.shape[1] :] if causal else self._cut(tokens, room)
            yield _before_padding(kept, self._lm.tokenizer)

    def _cut(self, tokens: list[int], room: int) -> list[int]:
        """What alone, with a limit of its own, would have been written: some models are made to end there."""
        kept, end = tokens[:room], self._model.module.generation_config.forced_eos_token_id
        if end is not None and len(kept) == room and end not in kept[1:]:
            kept[-1] = end
        return kept

    def _ended(self, tokens: Sequence[int], manner: Manner) -> bool:
        said = self._lm.tokenizer.decode(tokens)
        return tokens[-1] == self._lm.tokenizer.eos_token_id or any(stop and stop in said for stop in manner.until)


class _Finite(LogitsProcessor):
    """Changes nothing: greedy decoding would make something of outputs that are not numbers.

    Minus infinity is what forbids a token; only where all are forbidden, something is wrong.
    """

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        if not torch.isfinite(scores.amax(-1)).all():
            raise FloatingPointError("the model's outputs are not finite")
        return scores


def _before_padding(tokens: list[int], tokenizer: Any) -> list[int]:
    """Without the padding that stands behind what ended before the other rows did."""
    end = len(tokens)
    while end > 1 and tokens[end - 1] == tokenizer.pad_token_id and tokens[end - 2] == tokenizer.pad_token_id:
        end -= 1
    return tokens[:end]
