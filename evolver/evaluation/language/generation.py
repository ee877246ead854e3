"""Generated answers: prompts of similar length in batches, by the generation of Transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from evolver.config.evaluation import EvaluationSettings
from evolver.evaluation.batches import Batches, PreparedParts, by_length
from evolver.evaluation.language.tokens import Manner, Prompt, Tokens
from evolver.evaluation.live import LiveModel


@dataclass
class WrittenText:
    """The answers to prompts.

    Attributes:
        texts: the answers to each prompt; several where the task samples several.
        tokens: number of tokens that were read or generated.
        truncated: the prompts that were cut, or whose answer reached its limit before its end.
    """

    texts: dict[int, list[str]]
    tokens: int
    truncated: set[int]


@dataclass(frozen=True)
class _Batch:
    """Prompts with the same settings of generation.

    For a decoder they are padded at the left, because it continues them at the right. For an encoder they are padded at
    the right, because its positions may be absolute.
    """

    ids: Tensor  # (B, L)
    mask: Tensor  # (B, L) of 0 and 1
    lengths: tuple[int, ...]
    manner: Manner
    repeats: int
    seed: int


class Generations:
    """Lets the live model generate answers.

    Where a task samples, the random draws depend only on the run's seed and on the batch, so that a candidate always
    gives the same answers.

    Args:
        model: the live model.
        lm: lm-eval's wrapper of the same model.
        settings: the section ``evaluation`` of the configuration.
        seed: seed of the run.
    """

    def __init__(self, model: LiveModel, lm: Tokens, settings: EvaluationSettings, seed: int) -> None:
        self._model, self._lm, self._seed = model, lm, seed
        self._budget, self._most = settings.batch_tokens, settings.batch_size
        self._ready: PreparedParts[list[Batches[_Batch]]] = PreparedParts()

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
        """The texts of every row, the number of tokens read or generated, and the rows that reached their limit."""
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
        """The tokens that were generated for each row."""
        causal = self._lm.backend == "causal"
        said = self._lm._model_generate(
            context=batch.ids, attention_mask=batch.mask, stop=list(batch.manner.until),
            max_length=batch.ids.shape[1] + batch.manner.most,
            logits_processor=LogitsProcessorList([_Finite()]), **batch.manner.settings,
        )  # fmt: skip
        for row, tokens in enumerate(said.tolist()):
            # lm-eval counts the prompt of an encoder–decoder among the tokens that may be generated.
            room = batch.manner.most + (0 if causal else batch.lengths[row])
            kept = tokens[batch.ids.shape[1] :] if causal else self._cut(tokens, room)
            yield _before_padding(kept, self._lm.tokenizer)

    def _cut(self, tokens: list[int], room: int) -> list[int]:
        """The tokens that this row would have got in a batch of its own, with its own limit.

        At its limit, a model with ``forced_eos_token_id`` would have generated that token.
        """
        kept, end = tokens[:room], self._model.module.generation_config.forced_eos_token_id
        if end is not None and len(kept) == room and end not in kept[1:]:
            kept[-1] = end
        return kept

    def _ended(self, tokens: Sequence[int], manner: Manner) -> bool:
        said = self._lm.tokenizer.decode(tokens)
        return tokens[-1] == self._lm.tokenizer.eos_token_id or any(stop and stop in said for stop in manner.until)


class _Finite(LogitsProcessor):
    """Checks that the logits are finite, and changes nothing. Greedy decoding would not notice NaN or infinity.

    A logit of minus infinity is allowed because it forbids a token. It is an error only if all tokens are forbidden.
    """

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        if not torch.isfinite(scores.amax(-1)).all():
            raise FloatingPointError("the model's outputs are not finite")
        return scores


def _before_padding(tokens: list[int], tokenizer: Any) -> list[int]:
    """The tokens without the padding after a row that ended before the other rows did."""
    end = len(tokens)
    while end > 1 and tokens[end - 1] == tokenizer.pad_token_id and tokens[end - 2] == tokenizer.pad_token_id:
        end -= 1
    return tokens[:end]
