"""The pool over a crew of workers.

It decides which worker gets which candidate, and what happens to a candidate whose worker dies, hangs, or is not ready
yet.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from evolver.config import PoolSettings
from evolver.errors import BadInput
from evolver.records import Candidate, Result
from evolver.workers.crew import Answered, Crew, Event, Gone, Ready
from evolver.workers.messages import unpack_result
from evolver.workers.telling import LACKS, LongRecipe, Told

# Seconds between two checks for evaluations that take too long.
TICK_SECONDS = 1.0
# Seconds without any ready worker after which the pool gives up.
PLACE_SECONDS = 600.0
# The number of workers that die one after the other before any is ready, at which the pool gives up.
STILLBORN = 5
# How many nodes may be lost while they evaluate one candidate. After that, the candidate is suspected to be the cause.
LOSSES = 8


@dataclass(frozen=True)
class _Flight:
    """A candidate that a worker evaluates or that waits for one.

    Attributes:
        since: when its evaluation began, by the crew's clock.
        deaths: how many workers died while they evaluated it.
        losses: how many workers were lost with their nodes while they evaluated it.
        whole: whether its worker was sent its whole recipe, as it lacked nodes of it.
    """

    candidate: Candidate
    since: float = 0.0
    deaths: int = 0
    losses: int = 0
    whole: bool = False


@dataclass(frozen=True)
class FailurePolicy:
    """Decides when a candidate whose worker is gone has failed, and when a pool without workers gives up.

    Args:
        retries: how often a candidate is tried again after its worker died.
        losses: how often a candidate is tried again after its worker was lost with its node.
        timeout_s: seconds after which an evaluation has failed; None: no limit.
        stillborn: the number of workers that die one after the other before any is ready, at which the pool gives up.
        place_s: seconds without any ready worker after which the pool gives up.
    """

    retries: int = 1
    losses: int = LOSSES
    timeout_s: float | None = None
    stillborn: int = STILLBORN
    place_s: float = PLACE_SECONDS

    def failure(self, flight: _Flight, reason: str) -> str | None:
        """Why a candidate whose worker is gone has failed; None where it is to be tried again.

        Args:
            reason: how its last worker ended.
        """
        if flight.losses > self.losses:
            return f"its node was lost ({reason}); tried on {flight.losses} nodes"
        if flight.deaths > self.retries:
            return f"its worker died ({reason}); tried {flight.deaths} times"
        return None

    def late(self, flight: _Flight, now: float) -> str | None:
        """Why an evaluation that still runs counts as failed; None where it may go on."""
        if self.timeout_s is None or now - flight.since <= self.timeout_s:
            return None
        return f"timed out after {self.timeout_s:g} s"


class CrewPool:
    """A pool that evaluates candidates on up to ``pool.num_workers`` workers of a crew.

    Workers may come and go. A worker that ends is replaced, and its candidate goes to another worker before the
    candidates that wait. ``pool.retries`` limits how often this happens; a worker that was lost with its node does not
    count.

    Args:
        crew: the workers.
        settings: the section ``pool`` of the configuration.
        eager: True: start workers at once, and wait until the first one is ready. False: start them when the first
            candidate comes, which never happens where the ledger already holds all results.

    Raises BadInput where no worker can be built, and where none is ready in time.
    """

    def __init__(self, crew: Crew, settings: PoolSettings, eager: bool = True) -> None:
        self._crew, self._workers = crew, settings.num_workers
        self._policy = FailurePolicy(settings.retries, timeout_s=settings.timeout_s)
        self.bytes_sent = self.bytes_received = self.messages = 0
        self._told = Told()
        self._coming: set[int] = set()
        self._idle: list[int] = []
        self._busy: dict[int, _Flight] = {}
        self._queue: deque[_Flight] = deque()
        self._landed: list[Result] = []
        self._stillborn = 0
        if eager:
            self._staff()
            while not self._idle:
                self._hear(self._events())

    def free(self) -> int:
        # One candidate is accepted even while there is no worker.
        return max(1, len(self._idle) + len(self._busy)) - len(self._busy) - len(self._queue)

    def submit(self, candidate: Candidate) -> None:
        self._queue.append(_Flight(candidate))
        self._staff()
        self._assign()

    def wait(self) -> list[Result]:
        while not self._landed:
            self._hear(self._events())
            self._stop_late()
            self._assign()
        out, self._landed = self._landed, []
        return out

    def close(self) -> None:
        self._crew.close()

    def _events(self) -> list[Event]:
        """The next events. The list may be empty while candidates are evaluated.

        Raises BadInput where no worker is ready for too long.
        """
        began = self._crew.now()
        while True:
            events = list(self._crew.wait(TICK_SECONDS))
            if events or self._busy:
                return events
            if self._crew.now() - began > self._policy.place_s:
                raise BadInput(
                    f"pool: no worker was ready within {self._policy.place_s:.0f} s; check whether other jobs use "
                    "the cluster."
                )

    def _hear(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Ready):
                self._coming.discard(event.worker)
                self._stillborn = 0
                self._idle.append(event.worker)
            elif isinstance(event, Answered) and event.message == LACKS:
                self._tell_again(event.worker)
            elif isinstance(event, Answered):
                self._land(event)
            else:
                self._lose(event)

    def _land(self, event: Answered) -> None:
        del self._busy[event.worker]
        result = unpack_result(event.message)
        # Where a file or a server was missing, another worker is the next one, if there is one.
        self._idle.insert(0 if result.transient else len(self._idle), event.worker)
        self.bytes_received += len(event.message)
        self.messages += 1
        self._landed.append(result)

    def _tell_again(self, worker: int) -> None:
        """Send a worker that lacks nodes its candidate with the whole recipe. One that then lacks nodes is broken."""
        flight = self._busy[worker]
        self._told.forget(worker)
        if flight.whole:
            self._crew.dismiss(worker)
            self._lose(Gone(worker, "it lacked nodes of a recipe that it was sent whole"))
        else:
            self._send(worker, replace(flight, whole=True))

    def _lose(self, event: Gone) -> None:
        self._stillborn += event.worker in self._coming
        if self._stillborn >= self._policy.stillborn:
            raise BadInput(f"pool: the workers ended before they were ready ({event.reason}); their logs may say why.")
        self._coming.discard(event.worker)
        self._told.forget(event.worker)
        self._idle = [w for w in self._idle if w != event.worker]
        flight = self._busy.pop(event.worker, None)
        self._staff()
        if flight is None:
            return
        flight = replace(flight, deaths=flight.deaths + (not event.lost), losses=flight.losses + event.lost)
        if failure := self._policy.failure(flight, event.reason):
            self._landed.append(Result.failed(flight.candidate, failure))
        else:
            self._queue.appendleft(flight)

    def _stop_late(self) -> None:
        late = {w: why for w, f in self._busy.items() if (why := self._policy.late(f, self._crew.now()))}
        for worker, why in late.items():
            self._crew.dismiss(worker)
            self._told.forget(worker)
            self._landed.append(Result.failed(self._busy.pop(worker).candidate, why))
        if late:
            self._staff()

    def _assign(self) -> None:
        while self._queue and self._idle:
            worker, flight = self._idle.pop(), self._queue.popleft()
            try:
                self._send(worker, replace(flight, since=self._crew.now(), whole=False))
            except LongRecipe as error:
                self._idle.append(worker)
                self._landed.append(Result.failed(flight.candidate, str(error)))

    def _send(self, worker: int, flight: _Flight) -> None:
        message = self._told.pack(worker, flight.candidate)
        self.bytes_sent += len(message)
        self._busy[worker] = flight
        self._crew.send(worker, message)

    def _staff(self) -> None:
        """Ask for workers up to the full number. Those for which the cluster has no room wait, and an autoscaling
        cluster then adds nodes for them.
        """
        while len(self._coming) + len(self._idle) + len(self._busy) < self._workers:
            self._coming.add(self._crew.hire())
