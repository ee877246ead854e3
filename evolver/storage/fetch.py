"""Models of an object store, brought onto this machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path

from evolver.errors import BadInput
from evolver.storage.local import whole_folder
from evolver.storage.paths import expand
from evolver.storage.remote import file_system


def fetched(location: str, key: str) -> Path:
    """A folder of an object store as one on this machine, read once by all its processes.

    It lies under ``$EVOLVER_CACHE/models``, by where it came from and by the sizes and versions of its files.

    Raises BadInput that names ``key``.
    """
    fs, root = file_system(location.rstrip("/"))
    try:
        files = {p: i for p, i in fs.find(root, detail=True).items() if i["type"] == "file"}
        if not files:
            raise BadInput(f"{key}: there is nothing at {location}; give the folder of a model.")
        marks = sorted((p, i["size"], str(i.get("ETag") or i.get("etag") or i.get("mtime"))) for p, i in files.items())
        name = hashlib.sha256(repr((location, marks)).encode()).hexdigest()[:20]
        target = Path(expand("$EVOLVER_CACHE")) / "models" / name
        with _alone(target.with_name(f"{name}.lock")):
            if not target.exists():
                with whole_folder(target) as folder:
                    for path in files:
                        place = folder / path.removeprefix(root).lstrip("/")
                        place.parent.mkdir(parents=True, exist_ok=True)
                        fs.get_file(path, str(place))
    except BadInput:
        raise
    except Exception as error:  # clients of object stores have errors of their own
        raise BadInput(
            f"{key}: {location} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]}); check "
            "the address and the credentials."
        ) from error
    return target


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process of this machine is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
