"""Adam on a list of numbers: a search has a few dozens of them, and knows no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Those of the paper.
FIRST, SECOND, EPSILON = 0.9, 0.999, 1e-8


class Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1), with decoupled decay where there is one (Loshchilov and
    Hutter 2019, arXiv 1711.05101).

    Args:
        count: how many numbers there are.
        rate: the learning rate.
        decay: of the numbers at each step, times the rate.
    """

    def __init__(self, count: int, rate: float, decay: float = 0.0) -> None:
        self.rate, self.decay, self._steps = rate, decay, 0
        self._means, self._squares = [0.0] * count, [0.0] * count

    def moved(self, numbers: Sequence[float], gradient: Sequence[float]) -> list[float]:
        """The numbers after one more step: m̂ / (√v̂ + 1e-8) · rate smaller, with the bias of m and v corrected."""
        self._steps += 1
        self._means = [FIRST * m + (1 - FIRST) * g for m, g in zip(self._means, gradient, strict=True)]
        self._squares = [SECOND * v + (1 - SECOND) * g * g for v, g in zip(self._squares, gradient, strict=True)]
        first, second = 1 - FIRST**self._steps, 1 - SECOND**self._steps
        return [
            x * (1 - self.rate * self.decay) - self.rate * (m / first) / (math.sqrt(v / second) + EPSILON)
            for x, m, v in zip(numbers, self._means, self._squares, strict=True)
        ]
