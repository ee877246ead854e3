"""A gate: a sequential, paired test of whether one model is worse than another one by more than a margin.

Both models answer the same items, in one random order, and the test may be read after every item. The items count as a
sample of their tasks, so the question is about the tasks, not about these items: is the difference D of the two models'
expected scores above -margin?

Item i of N adds ``share_i * (a_i - b_i)`` to the difference of the scores, where share_i is the weight of the item's
task divided by the number of the task's items. So y_i = N * share_i * (a_i - b_i) is an observation of D: an item that
is drawn at random has the expected value D. All y_i lie between -R and R, where R = N * max share_i.

The test bets against a null hypothesis D <= θ, starting with a capital of 1, as in Waudby-Smith & Ramdas 2024,
"Estimating means of bounded random variables by betting". Each item multiplies the capital by 1 + λ_t * (y_t - θ),
where the bet λ_t >= 0 is computed from the items before. Under the null hypothesis the capital is a nonnegative
supermartingale, and the probability that it ever reaches 1 / alpha is at most alpha (Ville's inequality). That is also
true of the mean of several capitals. Each capital bets on another difference, in standard errors of an evaluation of as
many items as are planned.

- D <= -margin is rejected: the first model is not worse.
- D >= -margin is rejected, by the same test of -y and margin: it is worse.

Each verdict is thus wrong with a probability of at most alpha, whatever the models are and however often one looks. The
capital against D <= θ falls with θ, so the largest θ that is rejected is a lower bound of D with the same error rate,
and there is an upper bound in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from evolver.evaluation.scores.metrics import Numbers
from evolver.evaluation.scores.racing import DRIFTS, MOST
from evolver.evaluation.scores.scoring import Scale

Passage = Literal["not worse", "worse"]

# The first forecast of the variance rests on so many invented items, on which the models differ rarely.
PRIOR_ITEMS, DIFFERING = 8.0, 0.1
HALVINGS = 40  # of the range in which a bound is looked for


@dataclass(frozen=True)
class Gate:
    """The gate between two models; see the module's text for the test.

    Args:
        scale: how items make up the score.
        margin: by how much the first model may be worse; a difference of scores, from 0 to below 1.
        alpha: the highest probability with which either verdict is wrong.
        planned: the largest number of items that will be scored; it changes how fast the test is, not its error rate.

    Raises ValueError for a metric that is not judged item by item with values from 0 to 1.
    """

    scale: Scale
    margin: float
    alpha: float
    planned: int

    def __post_init__(self) -> None:
        if self.scale.unjudged:
            raise ValueError("only metrics that are judged item by item, from 0 to 1, can be compared")

    def look(self, ours: Sequence[float], theirs: Sequence[float]) -> Passage | None:
        """The verdict on the first model after the first items; None while it is undecided.

        The verdict is that of the first item after which there is one, so it does not depend on how many items come at
        a time.
        """
        values = self._values(ours, theirs)
        passed = self._reached(values, -self.margin)
        failed = self._reached(-values, self.margin)
        if passed == failed:
            return None
        return "not worse" if passed < failed else "worse"

    def bounds(self, ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
        """A lower and an upper bound of the difference, each wrong with a probability of at most alpha.

        They are the best bounds that there were after any item. One that has passed the difference on these items since
        is moved back to it.
        """
        values, found = self._values(ours, theirs), self.difference(ours, theirs)
        return min(found, self._lower(values)), max(found, -self._lower(-values))

    def difference(self, ours: Sequence[float], theirs: Sequence[float]) -> float:
        """The difference of the scores on the first items, in which every task has its weight."""
        a, b = (self.scale.of_tasks(items) for items in (ours, theirs))
        weights = {task: self.scale.weights[task] for task in a}
        return math.fsum(w * (a[t] - b[t]) for t, w in weights.items()) / (math.fsum(weights.values()) or 1.0)

    @cached_property
    def _shares(self) -> Numbers:
        found: Numbers = self.scale.item_shares * len(self.scale.tasks)
        return found

    @property
    def _range(self) -> float:
        return float(self._shares.max())

    def _values(self, ours: Sequence[float], theirs: Sequence[float]) -> Numbers:
        found: Numbers = self._shares[: len(ours)] * (np.asarray(ours, float) - np.asarray(theirs, float))
        return found

    def _reached(self, values: Numbers, null: float) -> int:
        """The place of the item with which "the mean is at most ``null``" is rejected; behind the last one: never."""
        reached = self._log_capital(values, null) >= -math.log(self.alpha)
        return int(reached.argmax()) if reached.any() else len(values)

    def _lower(self, values: Numbers) -> float:
        """The largest mean that is rejected as an upper end."""
        low, high = -self._range, self._range
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if self._reached(values, middle) < len(values):
                low = middle
            else:
                high = middle
        return low

    def _log_capital(self, values: Numbers, null: float) -> Numbers:
        """The logarithm of the capital after each item, (n)."""
        before = np.cumsum(values**2) - values**2 + PRIOR_ITEMS * DIFFERING * self._range**2
        spread = np.sqrt(before / (np.arange(len(values)) + PRIOR_ITEMS))
        most = MOST / max(self._range + null, 1e-12)  # so that no bet loses more than this part of the capital
        capitals = []
        for drift in DRIFTS:
            bets = np.minimum(drift / (math.sqrt(self.planned) * spread), most)
            capitals.append(np.cumsum(np.log1p(bets * (values - null))))
        logs: Numbers = np.logaddexp.reduce(capitals, axis=0) - math.log(len(DRIFTS))
        return logs
