"""Examples: what a model is given of one item alone, and what of its output is an answer, for gradients.

A score says how good an answer is; a gradient needs the log-probability that the model gives to answers. An answer
turns the model's logits into terms, pairs of a weight c and a scalar s, and what is asked for is Σ c·(∂s/∂θ)². The
terms of ``expected`` are those of the Fisher information E_{y~p}[(∂ log p(y|x)/∂θ)²], those of ``empirical`` have the
label that was observed for y; ``loss`` is -log p of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

GradientTerm = tuple[float, Tensor]


class ExampleAnswer(Protocol):
    """What a model answers to one example."""

    def expected(self, logits: Tensor, seed: int) -> list[GradientTerm]:
        """The terms of the Fisher information; draws, where there are too many answers to sum over, have the seed."""
        ...

    def empirical(self, logits: Tensor) -> list[GradientTerm]:
        """The term of the observed answer; none where the model has no such label."""
        ...

    def loss(self, logits: Tensor) -> Tensor | None:
        """-log p of the observed answer, (); None where the model has no such label."""
        ...


@dataclass(frozen=True)
class Example:
    """One example of an item.

    Attributes:
        inputs: of the module by name, one row each.
        answer: what its logits say.
        head: whose classification head answers; None: the model's own.
    """

    inputs: Mapping[str, Any]
    answer: ExampleAnswer
    head: str | None = None


@runtime_checkable
class GivesExamples(Protocol):
    """A scorer that also gives its items as examples."""

    def examples(self, places: Sequence[int]) -> Iterator[Example]:
        """Of the items at ``places``; an item may be several."""
        ...


class _Observed:
    """The common part of answers: what is observed has one term."""

    def loss(self, logits: Tensor) -> Tensor | None:
        raise NotImplementedError  # every answer below says its own

    def empirical(self, logits: Tensor) -> list[GradientTerm]:
        loss = self.loss(logits)
        return [] if loss is None else [(1.0, loss)]


@dataclass(frozen=True)
class OneLabel(_Observed):
    """One of L labels, with logits (1, L). The expectation is the sum over all labels."""

    label: int

    def expected(self, logits: Tensor, seed: int) -> list[GradientTerm]:
        logs = logits[0].float().log_softmax(-1)
        return list(zip(logs.detach().exp().tolist(), logs.unbind(), strict=True))

    def loss(self, logits: Tensor) -> Tensor | None:
        return -logits[0].float().log_softmax(-1)[self.label] if 0 <= self.label < logits.shape[-1] else None


@dataclass(frozen=True)
class LabelSet(_Observed):
    """A set of L labels, each of which is chosen by itself, with logits z (1, L).

    Choices are independent, and the mean of every ∂ log p is 0, so squares add up: Σ p(1 - p)·(∂z)², exactly.
    """

    labels: frozenset[int]

    def expected(self, logits: Tensor, seed: int) -> list[GradientTerm]:
        chosen = logits[0].detach().double().sigmoid()
        return list(zip((chosen * (1 - chosen)).tolist(), logits[0].unbind(), strict=True))

    def loss(self, logits: Tensor) -> Tensor | None:
        signs = torch.tensor([1.0 if n in self.labels else -1.0 for n in range(logits.shape[-1])])
        return -logsigmoid(logits[0].float() * signs.to(logits.device)).sum()


@dataclass(frozen=True)
class OneNumber(_Observed):
    """A number, with logits (1, 1): the mean of a normal distribution of variance 1, whose Fisher term is (∂z)²."""

    number: float

    def expected(self, logits: Tensor, seed: int) -> list[GradientTerm]:
        return [(1.0, logits.reshape(()))]

    def loss(self, logits: Tensor) -> Tensor | None:
        return (logits.reshape(()).float() - self.number).square() / 2


@dataclass(frozen=True)
class ManyLabels(_Observed):
    """One label at each of M places, with logits (1, places, L): words with tags, or the next tokens of a text.

    There are too many answers to sum over, so one is drawn: of each place one label from the model's own distribution.
    The square of the gradient of Σ log p is then an unbiased estimate, as labels of different places are independent
    given what the model reads.

    Attributes:
        places: (M,) which of the places answer.
        labels: (M,) what is observed there.
    """

    places: Sequence[int]
    labels: Sequence[int]

    def expected(self, logits: Tensor, seed: int) -> list[GradientTerm]:
        logs = logits[0, list(self.places)].float().log_softmax(-1)
        draws = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(logs.detach().cpu().double().exp(), 1, generator=draws)
        return [(1.0, logs.gather(1, drawn.to(logs.device)).sum())]

    def loss(self, logits: Tensor) -> Tensor | None:
        logs = logits[0, list(self.places)].float().log_softmax(-1)
        known = [(row, label) for row, label in enumerate(self.labels) if 0 <= label < logits.shape[-1]]
        if not known:
            return None
        rows, labels = torch.tensor(known, device=logs.device).T
        return -logs[rows, labels].sum()
