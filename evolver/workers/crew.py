"""The interface of a crew: the workers of a pool, on this machine or on others.

The pool decides which worker gets which candidate. The crew starts workers, sends them messages, ends them, and reports
what they answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Ready:
    """Event: a worker is built and waits for its first candidate."""

    worker: int


@dataclass(frozen=True)
class Answered:
    """Event: a worker has answered. ``message`` is the packed result of its candidate, or says that it lacks nodes of
    the candidate's recipe (see ``evolver.workers.telling``).
    """

    worker: int
    message: bytes


@dataclass(frozen=True)
class Gone:
    """Event: a worker has ended.

    Attributes:
        reason: how it ended, for messages.
        lost: whether its whole node was lost. Then its candidate is not to blame.
    """

    worker: int
    reason: str
    lost: bool = False


Event = Ready | Answered | Gone


class Crew(Protocol):
    """A group of workers, each known by its number.

    The clock belongs to the crew so that tests can simulate time.
    """

    def hire(self) -> int:
        """Ask for one more worker, and return its number. A later event says whether it is ready or has failed."""
        ...

    def send(self, worker: int, message: bytes) -> None: ...

    def dismiss(self, worker: int) -> None:
        """End a worker, whatever it is doing. No event follows."""
        ...

    def wait(self, seconds: float) -> Sequence[Event]:
        """Wait at most this many seconds for the first event, and return all events that are there.

        Raises BadInput where no worker can be built.
        """
        ...

    def now(self) -> float:
        """The time of the crew's clock in seconds."""
        ...

    def close(self) -> None: ...
