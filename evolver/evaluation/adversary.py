"""An adversary finds the disturbance of a task's inputs that turns most predictions away from what they were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from evolver.evaluation.disturbance import disturbed, no_disturbance
from evolver.evaluation.losses import autograd_input, batch_name, mean_of_items


class Attack:
    """Learns one disturbance p for all items of a task: Adam makes the mean over them of CE(f(x + p), f(x)) large.

    f(x) are the model's own predictions on the items as they are. All batches of the items pass through it, and then
    ``step`` is called, as often as the adversary may.

    Args:
        items: how many there are in all batches together.
        labels: whether every label is chosen by itself, so that the cross-entropies of all of them are added.
        rate: learning rate of Adam, in the unit of the inputs, see ``no_disturbance``.

    Attributes:
        by: p, as ``disturbed`` takes it; None before the first batch.
    """

    def __init__(self, items: int, labels: bool, rate: float) -> None:
        self.by: Tensor | None = None
        self._items, self._labels, self._rate, self._unit = items, labels, rate, 1.0
        self._free: Tensor | None = None
        self._said: dict[str, Tensor] = {}

    def __call__(self, module: Any, positions: Tensor | None, inputs: dict[str, Any]) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            given = {name: autograd_input(value) for name, value in inputs.items()}
            free = self._begun(module, given)
            said = self._predicted(batch_name(inputs), module, given)
            with disturbed(module, given, free * self._unit) as changed:
                outputs = module(**changed)
            loss = mean_of_items(self._contrary(outputs.logits.float(), said), autograd_input(positions), self._items)
            (found,) = torch.autograd.grad(loss, [free])
        if not found.isfinite().all():
            raise FloatingPointError("the model's outputs are not finite")
        free.grad = found if free.grad is None else free.grad.add_(found)
        return type(outputs)(logits=outputs.logits.detach())

    def step(self) -> None:
        """Move p by the gradient over the batches that have passed since the last step."""
        assert self._free is not None
        with torch.inference_mode(False):
            self._adam.step()
            self._adam.zero_grad()
            self.by = self._free.detach() * self._unit

    def _begun(self, module: Any, given: dict[str, Any]) -> Tensor:
        """The numbers that Adam moves, which begin at 0."""
        if self._free is None:
            zeros, self._unit = no_disturbance(module, given)
            self._free = zeros.requires_grad_(True)
            self._adam = torch.optim.Adam([self._free], lr=self._rate, maximize=True)
        return self._free

    def _predicted(self, batch: str, module: Any, given: dict[str, Any]) -> Tensor:
        """What the model says of a batch as it is: a label for each prediction, or of every label whether it holds."""
        if batch not in self._said:
            with torch.no_grad():
                logits = module(**given).logits
            self._said[batch] = (logits > 0).float() if self._labels else logits.argmax(-1)
        return self._said[batch]

    def _contrary(self, logits: Tensor, said: Tensor) -> Tensor:
        """The cross-entropy of each prediction with what was said, (rows,) or (rows, places)."""
        if self._labels:
            return binary_cross_entropy_with_logits(logits, said, reduction="none").sum(-1)
        return cross_entropy(logits.movedim(-1, 1), said, reduction="none")
