"""What a merge method can ask about the tensor it is merging a piece of.

A method sees a tensor piece by piece, so that memory stays bounded however large a tensor is. What it needs to know of
the whole tensor (a norm, a quantile) it asks for through ``Here``. While the answer is not known, the question ends
the call; ``apply`` then sends a pass over all pieces, adds the answer to what is known, and calls the method again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from evolver.merging import random

Kind = Literal["sum", "maximum", "order"]
Counts = Callable[[int], Sequence[Sequence[int]]]


class Asked(Exception):  # not an error: the way out of a call that needs to know more
    """A question about the whole tensor, with what this piece says to it."""

    def __init__(self, kind: Kind, value: Tensor, counts: Counts | None = None, scope: str = "tensor") -> None:
        self.kind, self.value, self.counts, self.scope = kind, value, counts, scope


class Here:
    """A piece of a tensor, and the way to ask about the whole of it.

    Args:
        stack: what the method works on, (E, n) or (E, rows, columns), float32.
        base: the base's scalars in the same place, (n) or (rows, columns), float32.
        known: answers to the questions asked so far, in their order.
        streams: of the random draws, one for each expert, (E, 2) int64.
        first: place of the piece's first scalar in the tensor, int64, ().
        aligned: ``first`` is a multiple of ``random.BLOCK``.
        depth: 0 in the first layer, 1 in the last, (); None outside the layers.
        vector: the tensor has one row only.
    """

    def __init__(
        self,
        stack: Tensor,
        base: Tensor,
        known: Sequence[Tensor],
        streams: Tensor,
        first: Tensor,
        aligned: bool,
        depth: Tensor | None,
        vector: bool,
    ) -> None:
        self.stack, self.base, self.known, self.streams = stack, base, known, streams
        self.first, self.aligned, self.depth, self.vector = first, aligned, depth, vector
        self.asked = 0

    def draws(self, seed: int) -> Tensor:
        """Random numbers in [0, 65536) for the scalars of this piece, shaped like the stack."""
        count = self.base.numel()
        block, skip = self.first // random.BLOCK, 0
        if not self.aligned:
            skip = int(self.first) % random.BLOCK
        blocks = -(-(skip + count) // random.BLOCK)
        rows = [
            random.block_draws(random.words(seed, stream), block, blocks)[skip : skip + count]
            for stream in self.streams.unbind(0)
        ]
        return torch.stack(rows).view_as(self.stack)

    def sum(self, what: Callable[[Tensor, Here], Tensor]) -> Tensor:
        """Σ of ``what(stack, here)`` over all pieces of the tensor, float64.

        ``what`` sums over its piece itself, best in float64, so that the cut in pieces is not seen in the result.
        """
        return self._answer("sum", what)

    def maximum(self, what: Callable[[Tensor, Here], Tensor]) -> Tensor:
        """The largest of ``what(stack, here)``, elementwise over all pieces of the tensor."""
        return self._answer("maximum", what)

    def kth_largest(self, scores: Callable[[Tensor, Here], Tensor], counts: Counts, scope: str = "tensor") -> Tensor:
        """Order statistics of non-negative scores, exact, over the whole tensor or (``scope: global``) the model.

        Args:
            scores: (C, ...) float32 for a piece, not negative.
            counts: from the number of scalars to C lists of K ranks; rank k asks for the k-th largest score, rank 0
                for infinity, a rank as large as the number of scalars for 0 (so that everything is above).

        Returns:
            (C, K) float32.
        """
        return self._answer("order", scores, counts, scope)

    def _answer(
        self, kind: Kind, what: Callable[[Tensor, Here], Tensor], counts: Counts | None = None, scope: str = "tensor"
    ) -> Tensor:
        self.asked += 1
        if self.asked > len(self.known):
            raise Asked(kind, what(self.stack, self), counts, scope)
        return self.known[self.asked - 1]
