"""What is asked of a place where runs are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

READERS_AT_ONCE = 16


class Storage(Protocol):
    """One folder. Errors are OSErrors: FileNotFoundError, FileExistsError, and whatever the system says."""

    location: str

    def names(self) -> list[str]:
        """Of the files and folders in it, sorted, without those that begin with a dot; none where it does not exist."""
        ...

    def exists(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes:
        """The whole file.

        Raises FileNotFoundError.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file, over one that is there: who reads it meanwhile gets the old one or the new one, whole."""
        ...

    def create(self, name: str, data: bytes) -> None:
        """Write a file that is not there yet. Of several that try at once, one succeeds.

        Raises FileExistsError.
        """
        ...

    def remove(self, name: str) -> None: ...

    def move(self, name: str, folder: str) -> None:
        """Move a file into a folder in this one."""
        ...

    def folder(self, name: str) -> Storage: ...

    def whole_folder(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A folder on this machine that becomes the folder ``name`` when the block ends well."""
        ...

    def lock(self) -> Callable[[], None] | None:
        """Shut out the other processes of this machine until the process ends or what is returned is called; None
        where the system cannot.

        Raises BlockingIOError where another one is in.
        """
        ...


def read_all(storage: Storage, names: Sequence[str]) -> list[bytes | OSError]:
    """Many files at once; what goes wrong with one stands in its place."""

    def read(name: str) -> bytes | OSError:
        try:
            return storage.read(name)
        except OSError as error:
            return error

    with ThreadPoolExecutor(READERS_AT_ONCE) as pool:
        return list(pool.map(read, names))
