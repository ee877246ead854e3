"""What a merge method can ask about the tensor it is merging a piece of.

A method sees a tensor piece by piece, so that memory stays bounded however large a tensor is. What it needs to know of
the whole tensor (a norm, a quantile) it asks for through ``Here``. While the answer is not known, the question ends
the call; ``apply`` then sends a pass over all pieces, adds the answer to what is known, and calls the method again.
Of a method on whole tensors, each tensor is its own only piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

AnswerKind = Literal["sum", "maximum", "order"]
Counts = Callable[[int], Sequence[Sequence[int]]]
Stack = Sequence[Tensor]


class NeedsAnswer(Exception):  # not an error: the way out of a call that needs to know more
    """A question about the whole tensor, with what this piece says to it: one tensor, or C of them for an order."""

    def __init__(
        self, kind: AnswerKind, value: Stack, counts: Counts | None, scope: str, given: Sequence[Tensor]
    ) -> None:  # fmt: skip
        self.kind, self.value, self.counts, self.scope, self.given = kind, value, counts, scope, given


class PieceSource(Protocol):
    """Where a piece lies, its draws, and what a method wants made once for it."""

    def depth(self) -> Tensor | None: ...
    def draws(self, seed: int) -> Stack: ...
    def once(self, make: Callable[[], Stack]) -> Stack: ...


@dataclass
class PieceView:
    """A piece of a tensor, and the way to ask about the whole of it.

    Args:
        inputs: what the method works on: E tensors (n) or (rows, columns), float32.
        base: the base's scalars in the same place, of the same shape, float32.
        known: answers to the questions asked so far, in their order.
        sources: of what else there is for a piece.
        vector: the tensor has one row only.
    """

    inputs: Stack
    base: Tensor
    known: Sequence[Tensor]
    sources: PieceSource
    vector: bool
    asked: int = 0

    @property
    def depth(self) -> Tensor | None:
        """0 in the first layer, 1 in the last, (); None outside the layers."""
        return self.sources.depth()

    def draws(self, seed: int) -> Stack:
        """Random numbers in [0, 65536) for the scalars of this piece, float32, shaped like the inputs."""
        return self.sources.draws(seed)

    def once(self, make: Callable[[], Stack]) -> Stack:
        """What ``make`` returns for this piece: tensors shaped like the inputs. A method may ask for it once a call.

        For what no kernel can do, such as sorting: it is made in plain code and handed to kernels, for which all else
        that a method on rows does must be the same scalar by scalar. Tensors of bools are remembered, a bit a scalar,
        as long as the tensor is being merged.
        """
        return self.sources.once(make)

    def sum(
        self, what: Callable[[Stack, PieceView], Tensor], scope: str = "tensor", given: Sequence[Tensor] = ()
    ) -> Tensor:
        """Σ of ``what(inputs, here)`` over all pieces of the tensor or (``scope: global``) of the model, float64.

        ``what`` sums over its piece itself, best in float64, so that the cut in pieces is not seen in the result. Of
        the whole model it may use earlier answers about the model, and the numbers that are ``given``: where these
        vary from place to place, the question is another one.
        """
        return self._answer("sum", lambda: [what(self.inputs, self)], scope=scope, given=given)

    def maximum(self, what: Callable[[Stack, PieceView], Tensor]) -> Tensor:
        """The largest of ``what(inputs, here)``, elementwise over all pieces of the tensor."""
        return self._answer("maximum", lambda: [what(self.inputs, self)])

    def kth_largest(
        self,
        scores: Callable[[Stack, PieceView], Stack],
        counts: Counts,
        scope: str = "tensor",
        given: Sequence[Tensor] = (),
    ) -> Tensor:
        """Order statistics of non-negative scores, exact, over the whole tensor or (``scope: global``) the model.

        Args:
            scores: C tensors for a piece, float32, shaped like an input, not negative.
            counts: from the number of scalars to C lists of K ranks; rank k asks for the k-th largest score, rank 0
                for infinity, a rank as large as the number of scalars for 0 (so that everything is above).
            given: numbers that scores of the whole model depend on, as in ``sum``.

        Returns:
            (C, K) float32.
        """
        return self._answer("order", lambda: scores(self.inputs, self), counts, scope, given)

    def _answer(
        self,
        kind: AnswerKind,
        what: Callable[[], Stack],
        counts: Counts | None = None,
        scope: str = "tensor",
        given: Sequence[Tensor] = (),
    ) -> Tensor:
        self.asked += 1
        if self.asked > len(self.known):
            raise NeedsAnswer(kind, what(), counts, scope, given)
        return self.known[self.asked - 1]
