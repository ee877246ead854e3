"""The pool: who gets which candidate, and what becomes of it when its worker dies, hangs, or is not there yet."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from evolver.config import PoolSettings
from evolver.errors import BadInput
from evolver.records import Candidate, Result
from evolver.workers.crew import Answered, Crew, Event, Gone, Ready
from evolver.workers.messages import pack_candidate, unpack_result

# How often a wait looks at the clock for evaluations that take too long.
TICK_SECONDS = 1.0
# How long nobody may be ready before we say that something is wrong.
PLACE_SECONDS = 600.0
# So many workers may die one after the other before any is ready.
STILLBORN = 5
# So many nodes may be lost under one candidate; then it may be what takes them down.
LOSSES = 8


@dataclass(frozen=True)
class _Flight:
    """A candidate on its way: since when, how many workers died of it, and how many nodes were lost under it."""

    candidate: Candidate
    since: float = 0.0
    deaths: int = 0
    losses: int = 0


@dataclass(frozen=True)
class FailurePolicy:
    """What becomes of a candidate whose worker is gone, and of a pool whose workers never come.

    Args:
        retries: so many workers more may die of a candidate.
        losses: so many nodes may be lost under one; then it may be what takes them down.
        timeout_s: an evaluation that takes longer has failed; None: any time.
        stillborn: so many workers may die one after the other before any is ready.
        place_s: nobody may be ready for so long before we say that something is wrong.
    """

    retries: int = 1
    losses: int = LOSSES
    timeout_s: float | None = None
    stillborn: int = STILLBORN
    place_s: float = PLACE_SECONDS

    def failure(self, flight: _Flight, reason: str) -> str | None:
        """Why a candidate has failed whose last worker is gone for that reason; None where it is to be tried again."""
        if flight.losses > self.losses:
            return f"its node was lost ({reason}); tried on {flight.losses} nodes"
        if flight.deaths > self.retries:
            return f"its worker died ({reason}); tried {flight.deaths} times"
        return None

    def late(self, flight: _Flight, now: float) -> str | None:
        """Why an evaluation that still goes on has failed; None where it may go on."""
        if self.timeout_s is None or now - flight.since <= self.timeout_s:
            return None
        return f"timed out after {self.timeout_s:g} s"


class CrewPool:
    """Evaluates on up to ``pool.num_workers`` workers of a crew, however many there are at a time.

    A worker that ends is replaced. Its candidate goes to another one, before all that wait, as often as
    ``pool.retries`` says; where the worker was lost with its node, this is not counted.

    Args:
        eager: hire workers at once, and wait until the first one is ready; else when the first candidate comes, which
            never does where the ledger has all results.

    Raises BadInput where no worker can be built, or none is ready in time.
    """

    def __init__(self, crew: Crew, settings: PoolSettings, eager: bool = True) -> None:
        self._crew, self._workers = crew, settings.num_workers
        self._policy = FailurePolicy(settings.retries, timeout_s=settings.timeout_s)
        self.bytes_sent = self.bytes_received = self.messages = 0
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
        # One candidate is taken even where nobody is there for the moment.
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
        """What happens next; a second of silence is no event, minutes without any worker are an error."""
        began = self._crew.now()
        while True:
            events = list(self._crew.wait(TICK_SECONDS))
            if events or self._busy:
                return events
            if self._crew.now() - began > self._policy.place_s:
                raise BadInput(
                    f"pool: no worker was ready within {self._policy.place_s:.0f} s; is the cluster busy with other "
                    "jobs?"
                )

    def _hear(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Ready):
                self._coming.discard(event.worker)
                self._stillborn = 0
                self._idle.append(event.worker)
            elif isinstance(event, Answered):
                self._land(event)
            else:
                self._lose(event)

    def _land(self, event: Answered) -> None:
        del self._busy[event.worker]
        self._idle.append(event.worker)
        self.bytes_received += len(event.message)
        self.messages += 1
        self._landed.append(unpack_result(event.message))

    def _lose(self, event: Gone) -> None:
        self._stillborn += event.worker in self._coming
        if self._stillborn >= self._policy.stillborn:
            raise BadInput(f"pool: workers die before they are ready ({event.reason}); see the logs of the workers.")
        self._coming.discard(event.worker)
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
            self._landed.append(Result.failed(self._busy.pop(worker).candidate, why))
        if late:
            self._staff()

    def _assign(self) -> None:
        while self._queue and self._idle:
            worker, flight = self._idle.pop(), self._queue.popleft()
            message = pack_candidate(flight.candidate)
            self.bytes_sent += len(message)
            self._busy[worker] = replace(flight, since=self._crew.now())
            self._crew.send(worker, message)

    def _staff(self) -> None:
        """Hire up to the full number; those that find no place wait for one, which is what makes clusters grow."""
        while len(self._coming) + len(self._idle) + len(self._busy) < self._workers:
            self._coming.add(self._crew.hire())
