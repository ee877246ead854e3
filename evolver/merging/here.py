"""What a merge method can ask about the tensor it is merging a piece of.

A method sees a tensor piece by piece, so that memory stays bounded however large a tensor is. What it needs to know of
the whole tensor (a norm, a quantile) it asks for through ``Here``. While the answer is not known, the question ends
the call; ``apply`` then sends a pass over all pieces, adds the answer to what is known, and calls the method again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Kind = Literal["sum", "maximum", "order"]
Counts = Callable[[int], Sequence[Sequence[int]]]
Stack = Sequence[Tensor]


class Asked(Exception):  # not an error: the way out of a call that needs to know more
    """A question about the whole tensor, with what this piece says to it: one tensor, or C of them for an order."""

    def __init__(self, kind: Kind, value: Stack, counts: Counts | None = None, scope: str = "tensor") -> None:
        self.kind, self.value, self.counts, self.scope = kind, value, counts, scope


@dataclass
class Here:
    """A piece of a tensor, and the way to ask about the whole of it.

    Args:
        inputs: what the method works on: E tensors (n) or (rows, columns), float32.
        base: the base's scalars in the same place, of the same shape, float32.
        known: answers to the questions asked so far, in their order.
        drawn: makes the draws of a seed.
        depth: 0 in the first layer, 1 in the last, (); None outside the layers.
        vector: the tensor has one row only.
        memory: of this piece; None: nothing is remembered.
    """

    inputs: Stack
    base: Tensor
    known: Sequence[Tensor]
    drawn: Callable[[int], Stack]
    depth: Tensor | None
    vector: bool
    memory: dict[str, Sequence[NDArray[np.uint8]]] | None = None
    asked: int = 0

    def remember(self, name: str, masks: Callable[[], Stack]) -> Stack:
        """What ``masks`` (of bools) returned for this piece the last time, as long as its tensor is being merged.

        Where nothing is remembered (in kernels, on GPUs), it is called. A mask takes one bit a scalar.
        """
        if self.memory is None:
            return masks()
        if name not in self.memory:
            found = masks()
            self.memory[name] = [np.packbits(m.numpy()) for m in found]
            return found
        size, shape = self.base.numel(), self.base.shape
        return [torch.from_numpy(np.unpackbits(m, count=size)).view(shape) for m in self.memory[name]]

    def draws(self, seed: int) -> Stack:
        """Random numbers in [0, 65536) for the scalars of this piece, float32, shaped like the inputs."""
        return self.drawn(seed)

    def sum(self, what: Callable[[Stack, Here], Tensor]) -> Tensor:
        """Σ of ``what(inputs, here)`` over all pieces of the tensor, float64.

        ``what`` sums over its piece itself, best in float64, so that the cut in pieces is not seen in the result.
        """
        return self._answer("sum", lambda: [what(self.inputs, self)])

    def maximum(self, what: Callable[[Stack, Here], Tensor]) -> Tensor:
        """The largest of ``what(inputs, here)``, elementwise over all pieces of the tensor."""
        return self._answer("maximum", lambda: [what(self.inputs, self)])

    def kth_largest(self, scores: Callable[[Stack, Here], Stack], counts: Counts, scope: str = "tensor") -> Tensor:
        """Order statistics of non-negative scores, exact, over the whole tensor or (``scope: global``) the model.

        Args:
            scores: C tensors for a piece, float32, shaped like an input, not negative.
            counts: from the number of scalars to C lists of K ranks; rank k asks for the k-th largest score, rank 0
                for infinity, a rank as large as the number of scalars for 0 (so that everything is above).

        Returns:
            (C, K) float32.
        """
        return self._answer("order", lambda: scores(self.inputs, self), counts, scope)

    def _answer(
        self, kind: Kind, what: Callable[[], Stack], counts: Counts | None = None, scope: str = "tensor"
    ) -> Tensor:
        self.asked += 1
        if self.asked > len(self.known):
            raise Asked(kind, what(), counts, scope)
        return self.known[self.asked - 1]
