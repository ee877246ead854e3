"""How long the rest of a run takes, all stages included, told from its first result on."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from evolver.records import Result

# The pace is that of so many results: machines have moods, and first passes warm up.
RECENT = 16

ScoringTimes = tuple[int, float, float]  # items, seconds of scoring, all seconds


@dataclass
class Remaining:
    """What lies ahead in a stage.

    Attributes:
        candidates: how many there will be at most; None where nobody knows.
        items: of one candidate, where it is scored on all.
        most: items of all candidates, at most; None where there is no such limit.
        builds: whether it begins with loading a model anew.
        time_left: says how many seconds it may go on, at most.
    """

    candidates: int | None
    items: int
    most: int | None = None
    builds: bool = False
    time_left: Callable[[], float] = lambda: math.inf
    seen: int = 0
    scored: int = 0

    def left(self) -> tuple[float, float]:
        """Candidates that are still to come, and items: fewer each where candidates were stopped early so far."""
        each = self.scored / self.seen if self.seen else self.items
        by_candidates = math.inf if self.candidates is None else float(max(0, self.candidates - self.seen))
        by_items = math.inf if self.most is None else max(0, self.most - self.scored) / max(each, 1e-9)
        rest = min(by_candidates, by_items)
        return rest, rest * each


class Pace:
    """The time left, from what results took so far.

    Args:
        stages: what lies ahead, by stage.
        workers: how many candidates are evaluated at a time.
        clock: seconds, from any moment on.
    """

    def __init__(
        self, stages: Mapping[str, Remaining], workers: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        self._stages, self._workers, self._clock = stages, workers, clock
        self._began = clock()
        self._start: float | None = None
        # Of scores, and of gradients, which take longer for as many items: only a search asks for these.
        self._scores: deque[ScoringTimes] = deque(maxlen=RECENT)
        self._gradients: deque[ScoringTimes] = deque(maxlen=RECENT)
        self._last = self._scores

    def result(self, result: Result) -> None:
        """Take in a result."""
        stage, items = self._stages[result.stage], len(result.items) - result.given
        stage.seen += 1
        stage.scored += result.cost
        total = result.seconds.get("total", 0.0)
        if result.reused or not items or not total:
            return
        if self._start is None:  # the worker was built before it; each stage with a worker of its own builds one
            self._start = max(0.0, self._clock() - self._began - total)
        self._last = self._scores if result.loss is None else self._gradients
        self._last.append((items, result.seconds.get("forward", total), total))

    def left(self) -> float | None:
        """Seconds until the report is there; None where nobody knows."""
        if not self._last:
            return None
        seconds, starts = 0.0, 0
        for name, stage in self._stages.items():
            recent = self._last if name == "search" or not self._scores else self._scores
            items, scoring, total = (math.fsum(column) for column in zip(*recent, strict=True))
            candidates, more = stage.left()
            needed = more * scoring / items + candidates * (total - scoring) / len(recent)
            seconds += min(needed, self._workers * stage.time_left())
            starts += stage.builds and not stage.seen
        found = seconds / self._workers + starts * (self._start or 0.0)
        return found if math.isfinite(found) else None


def in_words(seconds: float) -> str:
    """A duration as people say it: 40 s, 2 min 30 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 595:
        tens = round(seconds / 10)
        return f"{tens // 6} min" + (f" {10 * (tens % 6)} s" if tens % 6 else "")
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
