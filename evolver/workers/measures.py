"""What a run's constraints say of a model that a worker has built: how far its weights and its predictions are from
those of the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from evolver.config import Config
from evolver.errors import BadInput
from evolver.evaluation.data import read_rows
from evolver.evaluation.live import LiveModel
from evolver.merging.materialise import Materialiser
from evolver.records.depth import layer_origins, name_in_base
from evolver.records.recipe import Expert, Recipe
from evolver.workers.plan import Plan

# Tokens of text, in all, on which divergences are measured: their probabilities of every token are kept in memory.
TOKENS_READ = 512
# Characters that so many tokens certainly have.
CHARACTERS = 16 * TOKENS_READ

Stream = Iterator[tuple[str, Tensor]]


def with_texts(config: Config) -> Config:
    """A copy of the configuration whose constraints on divergences hold the texts themselves, as much as is read.

    Raises BadInput where a file cannot be read or holds no text.
    """
    if all(constraint.kl is None for constraint in config.constraints):
        return config
    found = []
    for number, constraint in enumerate(config.constraints):
        if constraint.kl is not None:
            constraint = constraint.model_copy(update={"kl": _texts(constraint.kl, f"constraints[{number}].kl")})
        found.append(constraint)
    return config.model_copy(update={"constraints": found})


def _texts(given: str | Sequence[str], key: str) -> list[str]:
    rows = [{"text": text} for text in given] if not isinstance(given, str) else read_rows(given, key)
    texts, left = [], CHARACTERS
    for row in rows:
        text = row.get("text")
        if not isinstance(text, str):
            raise BadInput(f"{key}: a row of {given} has no column text; give a text file, or a list of texts.")
        if text.strip() and left > 0:
            texts.append(text[:left])
            left -= len(text)
    if not texts:
        raise BadInput(f"{key}: there is no text in it; give a text file, or a list of texts.")
    return texts


class Measures:
    """Measures every model of one worker.

    Args:
        plan: the plan of the run. Its texts are in the constraints themselves; see ``with_texts``.
        materialiser: builds the models, and the base and the experts that they are compared with.
    """

    def __init__(self, plan: Plan, materialiser: Materialiser) -> None:
        self._constraints = list(enumerate(plan.config.constraints))
        self._build = materialiser
        self._base = Expert("base", plan.digests["base"])
        self._experts = [Expert(name, plan.digests[name]) for name in plan.config.experts]
        self._of_base: dict[int, list[Tensor]] = {}
        self._of_experts: float | None = None
        self._norm = 0.0

    @property
    def weighs(self) -> bool:
        """Whether the norm of a model's difference to the base is asked for."""
        return any(constraint.norm is not None for _, constraint in self._constraints)

    def prepare(self, live: LiveModel) -> None:
        """Let the base predict the texts, which is done once. The weights of the live model are then the base's."""
        asked = [n for n, constraint in self._constraints if constraint.kl is not None and n not in self._of_base]
        if asked:
            live.write(self._build.stream(self._base))
            self._of_base = {number: list(self._predictions(number, live)) for number in asked}

    def watch(self, tensors: Stream, recipe: Recipe) -> Stream:
        """The tensors of a recipe's model, unchanged, whose norm is known when they are all read.

        A layer that stands in another place than in the base is compared with the base's layer that it is one of.
        """
        if not self.weighs:
            yield from tensors
            return
        if self._of_experts is None:
            norms = [self._distance(self._build.stream(expert)) for expert in self._experts]
            self._of_experts = math.fsum(norms) / len(norms)
        squares, layers = [], layer_origins(recipe, self._build.base.layers)
        for name, tensor in tensors:
            squares.append(self._square(name_in_base(name, layers), tensor))
            yield name, tensor
        self._norm = math.sqrt(math.fsum(squares))

    def violations(self, live: LiveModel | None) -> dict[str, float]:
        """By how much the model breaks each constraint that is measured here, by the constraint's number.

        Args:
            live: holds the model that was watched last; None where another class holds it.

        Raises FloatingPointError where its predictions are not finite.
        """
        found = {}
        for number, constraint in self._constraints:
            if constraint.norm is not None:
                ratio = self._norm / self._of_experts if self._of_experts else 0.0
                found[str(number)] = ratio - constraint.norm
            if constraint.kl is not None and constraint.at_most is not None and live is not None:
                found[str(number)] = self._divergence(number, live) - constraint.at_most
        return found

    def _distance(self, tensors: Stream) -> float:
        return math.sqrt(math.fsum(self._square(name, tensor) for name, tensor in tensors))

    def _square(self, name: str, tensor: Tensor) -> float:
        """The sum of the squared differences of a tensor to the base's."""
        base = self._build.sources[self._base.digest].tensor(name)
        if not tensor.is_floating_point() or base.shape != tensor.shape:
            return 0.0
        difference = tensor.float() - base.to(tensor.device, tensor.dtype).float()
        return float((difference * difference).sum(dtype=torch.float64))

    def _divergence(self, number: int, live: LiveModel) -> float:
        """The mean over all tokens of the divergence of the model's predictions from the base's, in nats."""
        total, count = 0.0, 0
        for ours, base in zip(self._predictions(number, live), self._of_base[number], strict=True):
            total += float((base.exp() * (base - ours)).sum(dtype=torch.float64))
            count += len(base)
        if not math.isfinite(total):
            raise FloatingPointError("the model's probabilities of tokens are not finite")
        return max(0.0, total / count)

    def _predictions(self, number: int, live: LiveModel) -> Iterator[Tensor]:
        """The log-probabilities of every next token, (tokens, vocabulary), for each text."""
        left = TOKENS_READ
        for text in self._constraints[number][1].kl or ():
            ids = live.tokenizer(text)["input_ids"][:left]
            left -= len(ids)
            if ids:
                with torch.no_grad():
                    logits = live.forward(None, input_ids=torch.tensor([ids], device=live.device)).logits[0]
                yield torch.log_softmax(logits.float(), dim=-1)
