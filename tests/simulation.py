"""A crew that computes nothing: workers that take their time, die and are lost by a clock of their own."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from evolver.records import Candidate, Result
from evolver.records.graph import UnknownNode
from evolver.workers.crew import Answered, Event, Gone, Ready
from evolver.workers.messages import pack_result
from evolver.workers.telling import LACKS, Inbox

Say = Callable[[Candidate], Result]
Seconds = Callable[[Candidate], float]


def lognormal(sigma: float, median: float = 1.0) -> Seconds:
    """Evaluation times that the candidate decides."""
    return lambda candidate: median * random.Random(candidate.recipe.id + "seconds").lognormvariate(0, sigma)


class SimulatedCrew:
    """The crew of a pool, in virtual time.

    Args:
        say: the result of a candidate.
        seconds: how long it takes.
        start: seconds until a hired worker is ready.
        deaths: (time, worker, lost with its node) in any order.
        places: workers that the machines have room for, as (time, number); more wait until there is room.

    Attributes:
        time: seconds since the start.
        busy: seconds that workers spent on candidates which they finished.
        evaluated: candidates in the order in which they were finished.
        inboxes: what each worker has been told; without its inbox a worker has lost it.
    """

    def __init__(
        self, say: Say, seconds: Seconds = lambda c: 1.0, start: float = 0.0,
        deaths: Sequence[tuple[float, int, bool]] = (), places: Sequence[tuple[float, int]] = ((0.0, 10**9),),
    ) -> None:  # fmt: skip
        self._say, self._seconds, self._start = say, seconds, start
        self.time = self.busy = 0.0
        self.evaluated: list[Candidate] = []
        self.hired = 0
        self.inboxes: dict[int, Inbox] = {}
        self._alive: set[int] = set()
        self._waiting: list[int] = []
        self._room = 0
        self._count = itertools.count()
        self._heap: list[tuple[float, int, Callable[[], Event | None]]] = []
        for when, worker, lost in deaths:
            self._at(when, lambda w=worker, lost=lost: self._die(w, lost))  # type: ignore[misc]
        for when, number in places:
            self._at(when, lambda n=number: self._grow(n))  # type: ignore[misc]
        self._run_due(0.0)

    def hire(self) -> int:
        number, self.hired = self.hired, self.hired + 1
        self._waiting.append(number)
        self._place()
        return number

    def send(self, worker: int, message: bytes) -> None:
        try:
            candidate = self.inboxes.setdefault(worker, Inbox()).candidate(message)
        except UnknownNode:
            self._at(self.time, lambda: Answered(worker, LACKS))
            return
        took = self._seconds(candidate)
        self._at(self.time + took, lambda: self._finish(worker, candidate, took))

    def dismiss(self, worker: int) -> None:
        self._alive.discard(worker)
        self._place()

    def wait(self, seconds: float) -> list[Event]:
        until = self.time + seconds
        while self._heap and self._heap[0][0] <= until:
            self.time, _, happen = heapq.heappop(self._heap)
            event = happen()
            if event is not None:
                return [event]
        self.time = until
        return []

    def now(self) -> float:
        return self.time

    def close(self) -> None:
        self._alive.clear()

    def _at(self, when: float, happen: Callable[[], Any]) -> None:
        heapq.heappush(self._heap, (when, next(self._count), happen))

    def _run_due(self, until: float) -> None:
        while self._heap and self._heap[0][0] <= until:
            heapq.heappop(self._heap)[2]()

    def _grow(self, number: int) -> None:
        self._room = number
        self._place()

    def _place(self) -> None:
        while self._waiting and len(self._alive) < self._room:
            worker = self._waiting.pop(0)
            self._alive.add(worker)
            self._at(self.time + self._start, lambda w=worker: Ready(w) if w in self._alive else None)  # type: ignore[misc]

    def _die(self, worker: int, lost: bool) -> Event | None:
        if worker not in self._alive:
            return None
        self._alive.discard(worker)
        self._place()
        return Gone(worker, "killed", lost)

    def _finish(self, worker: int, candidate: Candidate, took: float) -> Event | None:
        if worker not in self._alive:
            return None
        self.busy += took
        self.evaluated.append(candidate)
        return Answered(worker, pack_result(self._say(candidate)))
