"""Who does a pool's work: hired, sent candidates, and heard of. The pool decides, a crew carries out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Ready:
    """A worker is built and waits for its first candidate."""

    worker: int


@dataclass(frozen=True)
class Answered:
    """What a worker says of its candidate."""

    worker: int
    message: bytes


@dataclass(frozen=True)
class Gone:
    """A worker has ended. ``lost`` says that it went with its node, which its candidate is not to blame for."""

    worker: int
    reason: str
    lost: bool = False


Event = Ready | Answered | Gone


class Crew(Protocol):
    """Workers by number, on some machines, by some clock."""

    def hire(self) -> int:
        """Ask for one more worker; that it is ready, or cannot be, is an event to come."""
        ...

    def send(self, worker: int, message: bytes) -> None: ...

    def dismiss(self, worker: int) -> None:
        """End a worker, whatever it is doing. No event tells of it."""
        ...

    def wait(self, seconds: float) -> Sequence[Event]:
        """What happened; waits so long for the first event. Raises BadInput where no worker can be built."""
        ...

    def now(self) -> float:
        """Seconds of the crew's clock."""
        ...

    def close(self) -> None: ...
