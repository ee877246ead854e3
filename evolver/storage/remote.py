"""A folder of an object store, or of any other file system that fsspec knows."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, TypeVar

from evolver.errors import BadInput

T = TypeVar("T")
# Seconds between the tries of a call that fails: two minutes in all.
PAUSES = (1, 2, 4, 8, 16, 32, 60)
# These are answers; trying again brings no other.
FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


class RemoteStorage:
    """A folder of an object store, by fsspec. A call that fails is tried again for two minutes."""

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")
        self._fs, self._root = file_system(self.location)
        self._reached = False

    def names(self) -> list[str]:
        try:
            found = self._try(lambda: self._fs.ls(self._root, detail=False))
        except FileNotFoundError:
            return []
        names = (path.rstrip("/").rpartition("/")[2] for path in found)
        return sorted(n for n in names if n and not n.startswith("."))

    def exists(self, name: str) -> bool:
        return bool(self._try(lambda: self._fs.exists(self._at(name))))

    def read(self, name: str) -> bytes:
        data: bytes = self._try(lambda: self._fs.cat_file(self._at(name)))
        return data

    def write(self, name: str, data: bytes) -> None:
        self._try(lambda: self._fs.pipe_file(self._at(name), data))

    def create(self, name: str, data: bytes) -> None:
        try:
            self._try(lambda: self._fs.pipe_file(self._at(name), data, mode="create"))
        except FileExistsError:
            if self.read(name) != data:  # it may be ours, of a try whose answer was lost
                raise

    def remove(self, name: str) -> None:
        self._try(lambda: self._fs.rm_file(self._at(name)))

    def move(self, name: str, folder: str) -> None:
        self._try(lambda: self._fs.mv(self._at(name), self._at(f"{folder}/{name}")))

    def folder(self, name: str) -> RemoteStorage:
        inside = RemoteStorage(f"{self.location}/{name}")
        inside._reached = self._reached
        return inside

    @contextlib.contextmanager
    def whole_folder(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="evolver-") as temporary:
            yield Path(temporary)
            files = [p for p in Path(temporary).rglob("*") if p.is_file()]
            for file in files:
                target = self._at(f"{name}/{file.relative_to(temporary)}")
                self._try(lambda f=file, t=target: self._fs.put_file(str(f), t))  # type: ignore[misc]
            self._keep(name, {str(f.relative_to(temporary)) for f in files})

    def lock(self) -> Callable[[], None] | None:
        return None

    def _keep(self, folder: str, files: Set[str]) -> None:
        """Remove from a folder all but these files, named by their paths in it, and the folders that are then empty."""
        root = self._at(folder)
        for path in self._try(lambda: self._fs.find(root)):
            if path.removeprefix(root).lstrip("/") not in files:
                self._try(lambda p=path: self._fs.rm_file(p))  # type: ignore[misc]
        for path in sorted(self._try(lambda: self._fs.find(root, withdirs=True)), reverse=True):  # the deepest first
            inside = path.removeprefix(root).strip("/")
            if inside and inside not in files and not any(f.startswith(f"{inside}/") for f in files):
                self._try(lambda p=path: self._fs.rmdir(p))  # type: ignore[misc]

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _try(self, call: Callable[[], T]) -> T:
        # What has never answered is a wrong address rather than a network that is down.
        for pause in (*(PAUSES if self._reached else ()), None):
            try:
                value = call()
                self._reached = True
                return value
            except FINAL as error:
                self._reached = True
                raise type(error)(error.errno, str(error), self.location) from error
            except Exception as error:  # clients of object stores have errors of their own
                if pause is None:
                    raise OSError(None, f"{type(error).__name__}: {error}", self.location) from error
                time.sleep(pause)
        raise AssertionError


def file_system(location: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it.

    Raises BadInput for a URI of an unknown kind, or one whose package is missing.
    """
    from fsspec.core import url_to_fs  # with all of its kinds of file systems, which folders need not wait for

    try:
        # What other processes write has to be seen at once.
        fs, root = url_to_fs(location, use_listings_cache=False, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        raise BadInput(f"{location}: this kind of address cannot be used here ({error}).") from error
    return fs, root.rstrip("/")
