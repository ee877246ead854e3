"""A process that cleans up after another one, however that one ends. A killed process cannot do so itself, because its
exit handlers do not run.

It is a program of its own (``python guard.py FOLDER``) and needs only the standard library. Each line on its standard
input is the process group of the server that runs now, or 0 for none. When its input ends, it ends this group and
removes the folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

# Seconds that a server may take to end after it was asked to.
GRACE_SECONDS = 10.0


def guard(folder: Path) -> None:
    """Wait until the other end of standard input is closed, then clean up."""
    group = 0
    for line in sys.stdin:
        group = int(line)
    if group:
        end(group, GRACE_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)


def end(group: int, grace: float) -> None:
    """Ask all processes of a group to end (SIGTERM), wait for at most ``grace`` seconds, and kill the rest."""
    until = time.monotonic() + grace
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGTERM)
        while time.monotonic() < until:
            time.sleep(0.05)
            os.killpg(group, 0)  # raises ProcessLookupError once no process of the group is left
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    # The guard runs in a grandchild of the worker, because some frameworks kill a worker's children with it.
    if os.fork():
        os._exit(0)
    guard(Path(sys.argv[1]))
