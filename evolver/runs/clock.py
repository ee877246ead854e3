"""The file ``clock.json`` of a run: for how long its search has gone on, in all calls together."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable

from evolver.errors import BadInput
from evolver.runs.files import CLOCK_FILE, mapping_of
from evolver.storage import Storage

# A search that is killed loses at most the time since the last result, and so many seconds.
WRITTEN_EVERY = 2.0


class Clock:
    """The time of a search. It runs from ``begin`` on.

    Args:
        folder: of the run.
        seconds: the seconds of this process, from any moment on.
    """

    def __init__(self, folder: Storage, seconds: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._seconds = folder, seconds
        self._before, self._began = searched_seconds(folder), seconds()
        self._written = self._began
        self._passed = False

    @property
    def taken(self) -> float:
        """The seconds of all calls of the run up to now."""
        return self._before + self._seconds() - self._began

    def begin(self) -> None:
        """The search begins, or goes on."""
        self._began = self._written = self._seconds()

    def tick(self) -> None:
        """Write the time down, unless that was done just now."""
        if self._seconds() - self._written >= WRITTEN_EVERY:
            self.write()

    def write(self) -> None:
        """Write the time down."""
        self._written = self._seconds()
        self._folder.write(CLOCK_FILE, json.dumps({"seconds": round(self.taken, 3)}).encode())

    def left(self, minutes: float | None) -> float:
        """The seconds until so many minutes have passed; infinite without such a limit."""
        return math.inf if minutes is None else max(0.0, 60 * minutes - self.taken)

    def up(self, minutes: float) -> bool:
        """Whether so many minutes have passed, which is written down, so that no later call says otherwise."""
        passed = self.taken >= 60 * minutes
        if passed and not self._passed:
            self._passed = True
            self.write()
        return passed


def searched_seconds(folder: Storage) -> float:
    """For how long the search of a run has gone on up to now; 0.0 where nobody has written it down."""
    try:
        found = mapping_of(folder, CLOCK_FILE, "").get("seconds")
    except (OSError, BadInput):
        return 0.0
    return float(found) if isinstance(found, int | float) and found >= 0 else 0.0
