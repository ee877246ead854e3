"""A folder in node-local memory that is gone when its owner is."""

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
    """A folder for one model at a time: in memory where there is room for it, else among the temporary files.

    A guard removes it when this process ends, in whatever way. What a guard could not remove, since it was killed as
    well, the next scratch folder on the node sweeps up: the owner of a folder holds a lock on it.

    Args:
        room: bytes that have to fit.

    Attributes:
        path: the folder.
    """

    def __init__(self, room: int) -> None:
        place = _place(room)
        _sweep(place)
        new = Path(tempfile.mkdtemp(prefix=".evolver-candidate-", dir=place))
        self._lock = (new / LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = new.with_name(new.name[1:])  # seen by sweepers only once it is locked
        new.rename(self.path)
        command = [sys.executable, "-I", guard.__file__, str(self.path)]
        starter = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        starter.wait()  # its child is the guard
        self._to_guard, self._from_guard = cast(IO[bytes], starter.stdin), cast(IO[bytes], starter.stdout)

    def watch(self, group: int) -> None:
        """Let the processes of a group end with this one; 0: of none."""
        with contextlib.suppress(BrokenPipeError):  # a guard that was killed is missed at the end only
            self._to_guard.write(f"{group}\n".encode())
            self._to_guard.flush()

    def close(self) -> None:
        """Remove the folder; it may be gone already."""
        with contextlib.suppress(BrokenPipeError):
            self._to_guard.close()
        if not self._from_guard.closed:
            self._from_guard.read()  # comes to its end when the guard does
            self._from_guard.close()
        shutil.rmtree(self.path, ignore_errors=True)  # where the guard was killed
        self._lock.close()


def _place(room: int) -> Path:
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > room:
        return MEMORY
    return Path(tempfile.gettempdir())


def _sweep(place: Path) -> None:
    """Remove folders that nobody holds any more."""
    for folder in place.glob("evolver-candidate-*"):
        with contextlib.suppress(OSError), (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its owner lives
            shutil.rmtree(folder, ignore_errors=True)
