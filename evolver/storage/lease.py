"""The lease on a ledger: one driver writes, and the second one is told who it is.

A lease is renewed every few seconds. One that is not renewed any more has ended with its holder: whoever wants it
watches it for as long as it may last, by a clock of his own, so that no two clocks have to agree. What keeps two
drivers from both writing is not the lease but the ledger, whose parts are created under running numbers; the lease
says who it was, and early.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evolver.errors import BadInput
from evolver.storage.base import Storage

LEASE_FILE = "lease.json"
BEAT_SECONDS = 5.0
LEASE_SECONDS = 30.0


class Lease:
    """The right to write into a folder, until it is closed or its holder is gone.

    Args:
        storage: the folder.
        say: where to tell that a lease of another machine has to be waited for.

    Raises BadInput where another process has it, naming that process.
    """

    def __init__(self, storage: Storage, say: Callable[[str], None] = lambda line: None) -> None:
        self._storage = storage
        me = {"host": socket.gethostname(), "pid": os.getpid(), "machine": this_machine(), "token": uuid.uuid4().hex}
        self._holder: dict[str, Any] = {**me, "beat": 0, "at": time.time()}
        try:
            self._unlock = storage.lock()
        except BlockingIOError:
            raise self._taken(self._read()) from None
        try:
            self._take(say)
        except BaseException:
            self._let_in()
            raise
        self._lost: dict[str, Any] | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """Who holds it."""
        return _name(self._holder)

    def check(self) -> None:
        """Raises BadInput where it was found to be another's meanwhile."""
        if self._lost:
            raise self.lost()

    def lost(self) -> BadInput:
        """What to say when somebody else has written."""
        return self._taken(self._lost or self._read())

    def close(self) -> None:
        """Let others in."""
        self._end.set()
        self._thread.join()
        if (self._read() or {}).get("token") == self._holder["token"]:
            self._storage.remove(LEASE_FILE)
        self._let_in()

    def _take(self, say: Callable[[str], None]) -> None:
        data = json.dumps(self._holder).encode()
        held = self._read()
        if held is None:
            try:
                self._storage.create(LEASE_FILE, data)
                return
            except FileExistsError:
                held = self._read()
        # A process of this machine that has not locked the folder is dead.
        if held and not (self._unlock and held.get("machine") == self._holder["machine"]):
            say(
                f"the run was in use by {_name(held)}; this process continues it in {LEASE_SECONDS:.0f} s if the "
                "other one has ended"
            )
            self._outlast(held)
        self._storage.write(LEASE_FILE, data)

    def _outlast(self, held: dict[str, Any]) -> None:
        until = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < until:
            time.sleep(min(1.0, LEASE_SECONDS / 10))
            now = self._read()
            if now is None:
                return
            if now != held:
                raise self._taken(now)

    def _renew(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            try:
                now = self._read()
                if now is not None and now["token"] != self._holder["token"]:
                    self._lost = now
                    return
                self._holder |= {"beat": self._holder["beat"] + 1, "at": time.time()}  # for those who only look
                self._storage.write(LEASE_FILE, json.dumps(self._holder).encode())
            except OSError:  # it may come back; if another driver comes first, the next part tells
                continue

    def _read(self) -> dict[str, Any] | None:
        return read_lease(self._storage)

    def _taken(self, holder: dict[str, Any] | None) -> BadInput:
        who = _name(holder) if holder else "another process"
        return BadInput(f"{self._storage.location}: the run is in use by {who}; wait for it, or stop it first.")

    def _let_in(self) -> None:
        if self._unlock:
            self._unlock()


def read_lease(storage: Storage) -> dict[str, Any] | None:
    """What the holder of a folder's lease wrote last; None where there is none, or something else in its place.

    Raises OSError where it cannot be read.
    """
    try:
        held = json.loads(storage.read(LEASE_FILE))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None
    kinds = {"token": str, "machine": str, "host": str, "pid": int}
    whole = isinstance(held, dict) and all(isinstance(held.get(key), kind) for key, kind in kinds.items())
    return held if whole else None


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"


def this_machine() -> str:
    """What the processes that see each other's locks have in common, and no others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
