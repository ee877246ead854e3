"""Texts of random tokens, for statistics of a model without any data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evolver.evaluation.examples import Example, ExampleAnswer, ManyLabels, OneLabel
from evolver.evaluation.live import LiveModel

# Tokens of a text, and texts of a forward pass.
RANDOM_LENGTH, RANDOM_ROWS = 64, 16


@dataclass(frozen=True)
class RandomTokens:
    """Texts of tokens that are drawn with equal chances, without the special ones; see ``SampledItems``.

    Attributes:
        live: the model that reads them.
        count: how many texts.
        seed: of the draws.
        head: whose classification head answers; None: the model's own.
        advance: is told how many texts are done.
    """

    live: LiveModel
    count: int
    seed: int
    head: str | None = None
    advance: Callable[[int], None] = lambda _: None

    @property
    def tokens(self) -> int:
        """How many tokens the texts have."""
        return self.count * min(RANDOM_LENGTH, int(self.live.tokenizer.model_max_length))

    def score(self) -> None:
        """Forward passes over all texts, none of which has padding."""
        with torch.inference_mode():
            for start in range(0, self.count, RANDOM_ROWS):
                stop = min(self.count, start + RANDOM_ROWS)
                self.live.forward(None, **self._inputs(start, stop))
                self.advance(stop)

    def examples(self) -> Iterator[Example]:
        """The texts one by one; no answer to one is right."""
        for number in range(self.count):
            inputs = self._inputs(number, number + 1)
            yield Example(inputs, self._answer(inputs), self.head)
            self.advance(number + 1)

    def _inputs(self, start: int, stop: int) -> dict[str, Tensor]:
        module = self.live.module
        texts = torch.stack([self._text(2 * number) for number in range(start, stop)])
        inputs = {"input_ids": texts.to(self.live.device)}
        if module.config.is_encoder_decoder and module.can_generate():
            said = torch.stack([self._text(2 * number + 1) for number in range(start, stop)])
            inputs["decoder_input_ids"] = said.to(self.live.device)
        return inputs

    def _text(self, number: int) -> Tensor:
        """The tokens of one text, (RANDOM_LENGTH)."""
        size = self.live.module.get_input_embeddings().num_embeddings
        special = set(self.live.tokenizer.all_special_ids)
        usual = torch.tensor([token for token in range(min(size, len(self.live.tokenizer))) if token not in special])
        length = min(RANDOM_LENGTH, self.live.tokenizer.model_max_length)
        draws = torch.Generator().manual_seed(self.seed * 2**32 + number)
        return usual[torch.randint(len(usual), (length,), generator=draws)]

    def _answer(self, inputs: dict[str, Tensor]) -> ExampleAnswer:
        """Of a model that writes the next tokens; of a classifier its label. None is known to be right."""
        if self.live.module.can_generate() or "TokenClassification" in type(self.live.module).__name__:
            places = range(next(reversed(inputs.values())).shape[1])
            return ManyLabels(places, [-1] * len(places))
        return OneLabel(-1)
