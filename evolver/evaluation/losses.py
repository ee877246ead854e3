"""Losses that need no right answer, and their gradients: what passes through the live model while judges score it.

Judges call the model as they always do. What is put in the place of their forward pass here computes the same outputs
with gradients, takes the loss of the batch, and adds its gradient to a total. A batch that did not fit into memory adds
nothing, and comes again in two halves.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from evolver.evaluation.disturbance import disturbed
from evolver.evaluation.live import LiveModel, PassThrough

# What a batch adds to a loss: of its name, what the module says, which positions of it are no padding, and which ones
# of what an encoder reads before a decoder are none.
BatchLoss = Callable[[str, Any, Tensor | None, Tensor | None], Tensor]


class UnknownBatch(Exception):
    """An expert has not been asked about this batch, as a batch was divided in two since then."""


@dataclass(frozen=True)
class ModelOutputs:
    """What a model says of a batch, float32.

    Attributes:
        logits: (M, labels) in the M positions that count.
        layers: outputs of every layer, (N, d) each, in the N positions that are no padding, those of an encoder before
            those of its decoder; none where they are not compared.
    """

    logits: Tensor
    layers: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(t.numel() * t.element_size() for t in (self.logits, *self.layers))


class ExpertPass:
    """Asks an expert: it keeps what the module says of each batch.

    Args:
        layers: whether outputs of layers are kept as well.

    Attributes:
        said: by the name of the batch.
    """

    def __init__(self, layers: bool) -> None:
        self._layers = layers
        self.said: dict[str, ModelOutputs] = {}

    def __call__(self, module: Any, positions: Tensor | None, inputs: dict[str, Any]) -> Any:
        with torch.no_grad():
            outputs = module(**inputs, **({"output_hidden_states": True} if self._layers else {}))
            found = said_of(outputs, positions, self._layers, inputs.get("attention_mask"))
        with torch.inference_mode(False):  # a tensor of inference mode cannot take part in a gradient later
            kept = ModelOutputs(found.logits.clone(), tuple(layer.clone() for layer in found.layers))
        self.said[batch_name(inputs)] = kept
        return outputs


class Descending:
    """Adds up the gradient of a loss over the batches that judges let through the module.

    Args:
        parameters: those of which gradients are taken.
        layers: whether the loss looks at the outputs of layers.

    Attributes:
        loss: the loss so far.
        gradients: its derivatives, in the places of the parameters; None where it does not depend on one.
    """

    def __init__(self, parameters: Sequence[Tensor], layers: bool) -> None:
        self._parameters, self._layers = parameters, layers
        self._of: BatchLoss | None = None
        self._share = 0.0
        self._by: Tensor | None = None
        self.loss = 0.0
        self.gradients: list[Tensor | None] = [None] * len(parameters)

    def follow(self, loss: BatchLoss, share: float, by: Tensor | None = None) -> None:
        """Take the loss of the batches to come from ``loss``, times ``share``, and disturb their inputs by ``by``."""
        self._of, self._share, self._by = loss, share, by

    def __call__(self, module: Any, positions: Tensor | None, inputs: dict[str, Any]) -> Any:
        assert self._of is not None
        with torch.inference_mode(False), torch.enable_grad():
            given, counted = {name: autograd_input(value) for name, value in inputs.items()}, autograd_input(positions)
            with disturbed(module, given, self._by) as changed:
                outputs = module(**changed, **({"output_hidden_states": True} if self._layers else {}))
            loss = self._of(batch_name(inputs), outputs, counted, given.get("attention_mask")) * self._share
            found = torch.autograd.grad(loss, list(self._parameters), allow_unused=True)
        if not loss.isfinite():
            raise FloatingPointError("the model's outputs are not finite")
        self.loss += float(loss)
        for place, gradient in enumerate(found):
            total = self.gradients[place]
            self.gradients[place] = gradient if total is None else total if gradient is None else total.add_(gradient)
        return type(outputs)(logits=outputs.logits.detach())


@contextlib.contextmanager
def passing(live: LiveModel, through: PassThrough) -> Iterator[None]:
    """While the context is open, batches pass through the live model in another way."""
    live.passing = through
    try:
        yield
    finally:
        live.passing = None


@contextlib.contextmanager
def differentiable(live: LiveModel, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """These parameters of the module, of which alone gradients are taken while the context is open.

    What a checkpoint holds may also be a buffer, such as BART's bias of the vocabulary.
    """
    buffers = live.module.named_buffers(remove_duplicate=False)
    named: dict[str, Tensor] = {name: buffer for name, buffer in buffers if buffer.is_floating_point()}
    named |= dict(live.module.named_parameters(remove_duplicate=False))
    before = [(parameter, parameter.requires_grad) for parameter in named.values()]
    for parameter, _ in before:  # a tied one has several names, some of which are not in the checkpoint
        parameter.requires_grad_(False)
    wanted = [named[name].requires_grad_(True) for name in names]
    try:
        yield wanted
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)


def entropy(items: int, labels: bool = False) -> BatchLoss:
    """The mean entropy of predictions over items, in nats: H(p) = -Σ p log p of one of several labels.

    Of an item with several predictions, such as a text whose words have tags, it is their mean.

    Args:
        items: how many there are in all batches together.
        labels: whether every label is chosen by itself, so that the entropies of all of them are added.
    """

    def of(_: str, outputs: Any, positions: Tensor | None, __: Tensor | None) -> Tensor:
        logits: Tensor = outputs.logits.float()
        if labels:
            each = -(logits.sigmoid() * logsigmoid(logits) + (-logits).sigmoid() * logsigmoid(-logits)).sum(-1)
        else:
            logs = logits.log_softmax(-1)
            each = -(logs.exp() * logs).sum(-1)
        return mean_of_items(each, positions, items)

    return of


def mean_of_items(each: Tensor, positions: Tensor | None, items: int) -> Tensor:
    """What a batch adds to a mean over ``items`` items.

    Args:
        each: (rows,), or (rows, places): of an item with several predictions, their mean counts.
        positions: (rows, places), which places are no padding; None: all.
    """
    if each.dim() > 1 and positions is not None:
        counted = positions.to(each.dtype)
        each = (each * counted).sum(-1) / counted.sum(-1).clamp(min=1)
    return each.sum() / items


def distillation(said: dict[str, ModelOutputs], temperature: float, hidden: float) -> BatchLoss:
    """T²·KL(expert ‖ model) at the temperature T, plus ``hidden`` · Σ over the layers of the mean squared error.

    Both are means over the positions of all batches, so that it does not matter how items are divided into batches.

    Args:
        said: what the expert says of each batch.
    """
    places = sum(len(one.logits) for one in said.values())
    places_of_layers = [sum(map(len, layer)) for layer in zip(*(one.layers for one in said.values()), strict=True)]

    def of(name: str, outputs: Any, positions: Tensor | None, encoded: Tensor | None) -> Tensor:
        if name not in said:
            raise UnknownBatch
        expert, model = said[name], said_of(outputs, positions, hidden > 0, encoded)
        theirs, ours = ((logits / temperature).log_softmax(-1) for logits in (expert.logits, model.logits))
        loss: Tensor = temperature**2 * (theirs.exp() * (theirs - ours)).sum() / places
        for one, other, count in zip(expert.layers, model.layers, places_of_layers, strict=True):
            loss = loss + hidden * (one - other).square().mean(-1).sum() / count
        return loss

    return of


def said_of(
    outputs: Any, positions: Tensor | None, layers: bool, encoded: Tensor | None = None
) -> ModelOutputs:  # fmt: skip
    """What a module has said, in the positions that count.

    Args:
        layers: whether the outputs of its layers are wanted.
        encoded: (rows, places), not 0 in the positions of what an encoder reads that are no padding; None: all count.

    Raises ValueError where it does not give the outputs of its layers, and where they are wanted.
    """
    found: list[tuple[Tensor, Tensor | None]] = []
    if layers:
        parts = {"encoder_hidden_states": None if encoded is None else encoded != 0, "decoder_hidden_states": positions}
        parts = parts if getattr(outputs, "decoder_hidden_states", None) else {"hidden_states": positions}
        # The first one of each part is that of the embedding.
        found = [(one, where) for part, where in parts.items() for one in (getattr(outputs, part, None) or ())[1:]]
        if not found:
            raise ValueError("this architecture does not give the outputs of its layers; write hidden: 0")
    return ModelOutputs(_counted(outputs.logits, positions), tuple(_counted(one, where) for one, where in found))


def _counted(values: Tensor, positions: Tensor | None) -> Tensor:
    """Values (rows, d), or (rows, places, d) in the positions that are no padding, (M, d) float32.

    A model may say something about the last places of each row only.
    """
    flat = values.flatten(0, -2).float()
    if positions is None or values.dim() < 3:
        return flat
    return flat[positions[:, positions.shape[1] - values.shape[1] :].flatten()]


def autograd_input(value: Any) -> Any:
    """A tensor made in inference mode as one that can take part in a gradient; everything else as it is."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def batch_name(inputs: dict[str, Any]) -> str:
    """A name for the contents of a batch."""
    found = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name]
        found.update(f"{name} {tuple(value.shape)} ".encode() if isinstance(value, Tensor) else f"{value}".encode())
        if isinstance(value, Tensor):
            found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
