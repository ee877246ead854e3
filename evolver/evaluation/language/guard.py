"""A process that clears up behind another one, however that one ends: a killed process runs no exit handlers.

It is a program of its own (``python guard.py FOLDER``) and needs nothing but the standard library. Lines on its
standard input name the process group of the server that runs now. When the input ends, that group is ended and the
folder removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

# How long a server may take to end by itself.
GRACE_SECONDS = 10.0


def guard(folder: Path) -> None:
    """Wait until nobody holds the other end of standard input, then clear up."""
    group = 0
    for line in sys.stdin:
        group = int(line)
    if group:
        end(group, GRACE_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)


def end(group: int, grace: float) -> None:
    """End all processes of a group: ask, then wait for ``grace`` seconds, then force."""
    until = time.monotonic() + grace
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGTERM)
        while time.monotonic() < until:
            time.sleep(0.05)
            os.killpg(group, 0)  # raises once the last of them is gone
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    # A grandchild: some frameworks kill a worker's children along with it.
    if os.fork():
        os._exit(0)
    guard(Path(sys.argv[1]))
