"""The items that a statistic is collected on, and how far it is with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from evolver.evaluation.examples import Example
from evolver.evaluation.live import LiveModel
from evolver.evaluation.tasks import SplitScorer
from evolver.loggers.pace import in_words

# A line at most so often, so that a long collection does not fill a log.
ADVANCE_SECONDS = 10.0
# Scalars of the model times items that are scored at a time, but at least LEAST_AT_A_TIME items. So a large model says
# now and then how far it is, and a small one is not slowed by the padding of small batches.
SCALARS_AT_A_TIME = 10**10
LEAST_AT_A_TIME = 16
EXAMPLES_AT_A_TIME = 8


class Advance:
    """Says how many items are done of all, and how long the others will take.

    Args:
        name: of what is collected.
        total: how many items it is collected on.
        say: takes a line.
        clock: seconds, from any moment on.
    """

    def __init__(
        self, name: str, total: int, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        self._name, self._total, self._say, self._clock = name, total, say, clock
        self._began = self._spoke = clock()

    def __call__(self, done: int) -> None:
        """Take in how many items are done."""
        now = self._clock()
        if done < self._total and now - self._spoke >= ADVANCE_SECONDS:
            self._spoke = now
            left = (now - self._began) / done * (self._total - done)
            self._say(f"{self._name}: item {done} of {self._total}, about {in_words(left)} left")


class DevSample:
    """Some dev items of a run; see ``SampledItems``.

    Args:
        scorer: scores the live model on dev items.
        places: of the items, in their order.
        most: how many items are scored at a time.
        advance: is told how many items are done.

    Attributes:
        tokens: how many tokens went through the model.
    """

    def __init__(
        self, scorer: SplitScorer, places: Sequence[int], most: int, advance: Callable[[int], None] = lambda _: None
    ) -> None:
        self._scorer, self._places, self._most, self._advance = scorer, places, most, advance
        self.tokens = 0

    def score(self) -> None:
        for chosen in self._parts(self._most):
            self.tokens += self._scorer.score_at(chosen).tokens

    def examples(self) -> Iterator[Example]:
        for chosen in self._parts(EXAMPLES_AT_A_TIME):
            for example in self._scorer.examples_at(chosen):
                self.tokens += sum(ids.numel() for name, ids in example.inputs.items() if name.endswith("input_ids"))
                yield example

    def _parts(self, most: int) -> Iterator[frozenset[int]]:
        for start in range(0, len(self._places), most):
            stop = min(start + most, len(self._places))
            yield frozenset(self._places[start:stop])
            self._advance(stop)


def at_a_time(live: LiveModel, block: int) -> int:
    """How many items the live model is scored on at a time; ``block`` at the most."""
    scalars: int = sum(parameter.numel() for parameter in live.module.parameters())
    return min(block, max(LEAST_AT_A_TIME, SCALARS_AT_A_TIME // max(1, scalars)))
