"""A folder of a mounted file system, this machine's or a shared one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from evolver.errors import refuse_special, takes_nothing

# What a file system says that knows no hard links.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class LocalStorage:
    """A folder of a mounted file system."""

    def __init__(self, path: Path) -> None:
        self.path, self.location = path, str(path)

    def names(self) -> list[str]:
        try:
            return sorted(p for p in os.listdir(self.path) if not p.startswith("."))
        except FileNotFoundError:
            return []

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def read(self, name: str) -> bytes:
        refuse_special(self.path / name)
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        with self._beside(name, data) as temporary:
            os.replace(temporary, self.path / name)

    def create(self, name: str, data: bytes) -> None:
        with self._beside(name, data) as temporary:
            try:
                os.link(temporary, self.path / name)  # unlike a rename, no file gives way to it
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                (self.path / name).touch(exist_ok=False)
                os.replace(temporary, self.path / name)

    def remove(self, name: str) -> None:
        (self.path / name).unlink()

    def move(self, name: str, folder: str) -> None:
        (self.path / folder).mkdir(exist_ok=True)
        os.replace(self.path / name, self.path / folder / name)

    def folder(self, name: str) -> LocalStorage:
        return LocalStorage(self.path / name)

    @contextlib.contextmanager
    def whole_folder(self, name: str) -> Iterator[Path]:
        with whole_folder(self.path / name) as path:
            yield path
            for place in (*path.rglob("*"), path):
                _sync(place)
        _sync(self.path)

    def lock(self) -> Callable[[], None] | None:
        self.path.mkdir(parents=True, exist_ok=True)
        file = (self.path / "lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError:  # file systems of networks may know no locks
            file.close()
            return None
        for path in self.path.glob(".*.tmp"):
            path.unlink(missing_ok=True)  # writes that a crash cut short
        return file.close

    @contextlib.contextmanager
    def _beside(self, name: str, data: bytes) -> Iterator[Path]:
        """A synced file with the data, to be put into its place; it is gone afterwards."""
        with _named(self.path / name):
            self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with _named(self.path / name):
                with temporary.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield temporary
                _sync(self.path)
        finally:
            with contextlib.suppress(OSError):  # a folder that nobody may write to keeps nothing of ours
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(place: Path) -> Iterator[None]:
    """What goes wrong names the file that was to be written, not a temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(place)) from error


@contextlib.contextmanager
def _renamed(path: Path) -> Iterator[None]:
    """What goes wrong with a temporary file beside ``path``, or with a full disk, names ``path``; errors of other files
    stay as they are.
    """
    beside = os.path.abspath(path.with_name(f".{path.name}-"))
    try:
        yield
    except OSError as error:
        full = error.filename is None and takes_nothing(error)
        if full or (error.filename is not None and os.path.abspath(str(error.filename)).startswith(beside)):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


@contextlib.contextmanager
def whole_folder(path: Path, ready: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A temporary folder that takes the place of ``path`` when the block ends well, and vanishes when it does not.

    Args:
        ready: called just before; what it raises leaves ``path`` as it is.
    """
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        with _renamed(path):
            yield temporary
            temporary.chmod(0o755)
            ready()
            old = temporary.with_name(temporary.name + ".old")
            if path.exists():
                os.replace(path, old)  # never a half-removed folder under the final name
            os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path: Path, ready: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """The same for a file; its bytes are on the disk when it gets its name."""
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with _renamed(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            ready()
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # a folder that nobody may write to keeps nothing of ours
            temporary.unlink(missing_ok=True)


def _sync(place: Path) -> None:
    """Have a file, or the names in a folder, on the disk before anything that is written later."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
