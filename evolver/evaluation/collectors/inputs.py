"""What is found out from the inputs of a model's linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from evolver.evaluation.collectors import SampledItems, collector
from evolver.evaluation.live import LiveModel


@collector("gram")
def input_grams(live: LiveModel, items: SampledItems) -> Iterator[tuple[str, Tensor]]:
    """XᵀX of the inputs X (positions, d) of every linear layer but the one that names tokens, (d, d) float32.

    Positions that are padding are left out. Batches are multiplied in float32 and added in float64.
    """
    with LayerSums(live, live.linear_layers(), lambda rows: (rows.T @ rows).double()) as sums:
        items.score()
    for name, total in sums.totals.items():
        if not total.isfinite().all():
            raise FloatingPointError(f"the inputs of the layer of {name} are not finite")
        yield name, total.float().cpu()


@collector("activation")
def activation(live: LiveModel, items: SampledItems) -> Iterator[tuple[str, Tensor]]:
    """The mean |x| of every input of the linear layers, as those of ``gram``, (d,) float32; padding is left out."""

    def sizes(rows: Tensor) -> Tensor:
        return torch.cat([rows.abs().sum(0).double(), rows.new_tensor([len(rows)], dtype=torch.float64)])

    with LayerSums(live, live.linear_layers(), sizes) as sums:
        items.score()
    for name, total in sums.totals.items():
        if not total.isfinite().all():
            raise FloatingPointError(f"the inputs of the layer of {name} are not finite")
        yield name, (total[:-1] / total[-1].clamp(min=1)).float().cpu()


class LayerSums:
    """Sums over batches of what is made of the inputs of linear layers, while the context is open.

    A pass that does not end, as where memory did not suffice for it, adds nothing.

    Args:
        layers: by the name of their weight in the checkpoint.
        of: from a layer's inputs (M, d), float32, in M positions that are no padding, to what is added.

    Attributes:
        totals: by the same names; layers without inputs are left out.
    """

    def __init__(self, live: LiveModel, layers: Mapping[str, nn.Linear], of: Callable[[Tensor], Tensor]) -> None:
        self._live, self._layers, self._of = live, layers, of
        self._positions: tuple[Tensor | None, ...] = ()
        self._running = False
        self._pass: dict[str, Tensor] = {}
        self.totals: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._live.listener = self
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._live.listener = None
        for hook in self._hooks:
            hook.remove()

    def begin(self) -> None:
        """See ``Listener``."""
        self._running = True
        self._pass.clear()

    def at(self, *positions: Tensor | None) -> None:
        """See ``Listener``."""
        self._positions = positions

    def end(self) -> None:
        """See ``Listener``."""
        for name, more in self._pass.items():
            self.totals[name] = self.totals[name] + more if name in self.totals else more
        self._pass.clear()
        self._running = False

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hear(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            if not self._running:
                raise RuntimeError("a judge called the model without saying which positions are padding")
            more = self._of(_rows(given[0], self._positions, name).float())
            self._pass[name] = self._pass[name] + more if name in self._pass else more

        return hear


def _rows(inputs: Tensor, several: Sequence[Tensor | None], name: str) -> Tensor:
    """The inputs (M, d) in the positions that count.

    Args:
        inputs: (rows, places, d); (rows, d) where a layer sees one place of each row; (rows · places, d).
        several: (rows, places) each, of which the first that fits is taken; None: all count.

    Raises ValueError for inputs of another shape.
    """
    flat = inputs.flatten(0, -2)
    for positions in several:
        if positions is None or inputs.shape[:-1] == positions.shape[:1]:
            return flat
        if inputs.shape[:-1] in (positions.shape, (positions.numel(),)):
            return flat[positions.flatten()]
    shapes = " and ".join(str(tuple(p.shape)) for p in several if p is not None)
    raise ValueError(
        f"the layer of {name} gets inputs {tuple(inputs.shape)} for a batch of {shapes} tokens, so that nobody can "
        "tell which of them are padding"
    )
