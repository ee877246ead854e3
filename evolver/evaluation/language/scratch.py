"""A folder in node-local memory that is removed when the process that owns it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, cast

from evolver.evaluation.language import guard

MEMORY = Path("/dev/shm")
LOCK = "lock"


class Scratch:
    """A folder for one model at a time. It lies in memory (``/dev/shm``) if there is room, else in the folder for
    temporary files.

    A guard process removes the folder when this process ends, even if it is killed. If the guard was killed as well,
    the next process that makes such a folder on this node removes it. A lock on each folder tells whether its owner
    still runs.

    Args:
        room: the number of bytes that have to fit into the folder.

    Attributes:
        path: the folder.
    """

    def __init__(self, room: int) -> None:
        place = _place(room)
        _sweep(place)
        new = Path(tempfile.mkdtemp(prefix=".evolver-candidate-", dir=place))
        self._lock = (new / LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = new.with_name(new.name[1:])  # other processes look at this name only, and it is locked by now
        new.rename(self.path)
        command = [sys.executable, "-I", guard.__file__, str(self.path)]
        starter = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        starter.wait()  # it starts the guard as its child and ends
        self._to_guard, self._from_guard = cast(IO[bytes], starter.stdin), cast(IO[bytes], starter.stdout)

    def watch(self, group: int) -> None:
        """Name the process group that the guard ends when this process ends; 0: none."""
        with contextlib.suppress(BrokenPipeError):  # if the guard was killed, ``close`` removes the folder
            self._to_guard.write(f"{group}\n".encode())
            self._to_guard.flush()

    def close(self) -> None:
        """Remove the folder, if it is still there."""
        with contextlib.suppress(BrokenPipeError):
            self._to_guard.close()
        if not self._from_guard.closed:
            self._from_guard.read()  # returns when the guard has ended
            self._from_guard.close()
        shutil.rmtree(self.path, ignore_errors=True)  # in case the guard was killed
        self._lock.close()


def _place(room: int) -> Path:
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > room:
        return MEMORY
    return Path(tempfile.gettempdir())


def _sweep(place: Path) -> None:
    """Remove the folders whose owners have ended."""
    for folder in place.glob("evolver-candidate-*"):
        with contextlib.suppress(OSError), (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises BlockingIOError while the owner lives
            shutil.rmtree(folder, ignore_errors=True)
