"""A logger at work beside the run."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from evolver.loggers.base import LoggedRow, Logger

Call = Callable[[Logger], None]


class Courier:
    """Calls one logger, in a thread of its own.

    A tracker may take minutes to answer, or to fail: here the run only puts a call into a queue. The queue has no
    bound. It holds a few numbers of results that the run keeps in memory anyway, and a full one could only wait, or
    lose something.

    Attributes:
        error: what ended its work; empty while all is well.
    """

    def __init__(self, name: str, logger: Logger) -> None:
        self.name, self.error = name, ""
        self._logger = logger
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._rows: deque[LoggedRow] = deque()
        # A daemon: a tracker that never answers keeps no process from ending.
        self._thread = threading.Thread(target=self._work, name=f"evolver-{name}", daemon=True)
        self._thread.start()

    def send(self, call: Call) -> None:
        """Have the logger called soon, after all that was sent before."""
        self._calls.put(call)

    def tell(self, row: LoggedRow) -> None:
        """Have the logger told of a result. What comes while it is busy, it is told at once: a replay in few calls."""
        self._rows.append(row)
        self._calls.put(self._bring)

    def end(self) -> None:
        """Have the logger closed, after all that was sent before."""
        self._calls.put(lambda logger: logger.close())
        self._calls.put(None)

    def ended(self, until: float) -> bool:
        """Wait, up to a moment of the monotonic clock, for all to be done or given up; whether it is."""
        self._thread.join(max(0.0, until - time.monotonic()))
        return not self._thread.is_alive()

    def _bring(self, logger: Logger) -> None:
        rows = [self._rows.popleft() for _ in range(len(self._rows))]
        if rows:
            logger.results(rows)

    def _work(self) -> None:
        try:
            while call := self._calls.get():
                call(self._logger)
        except BaseException as error:  # nobody is above this thread: whatever it is ends here
            said = re.sub(r"//[^/@\s]+@", "//", " ".join(str(error).split()))  # an address may hold a password
            self.error = f"{type(error).__name__}: {said[:300]}"
