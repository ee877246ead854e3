"""Where a command writes what a user asked for: a new place, or one that holds nothing but an earlier export.

What stands at the target is the user's. An export leaves a record of its files in its folder; with ``force`` it may be
replaced by another one, as long as every file there is one of the record, byte for byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from evolver.errors import BadInput, cause_of, file_sentence, takes_nothing
from evolver.storage.local import whole_file, whole_folder

RECORD = "evolver-export.json"
# What the folder of a run has in it from its first moment on.
OF_A_RUN = ("identity.json", "ledger")
# Of a file: whether an export wrote it, and nobody has changed it since.
Exported = Callable[[Path], bool]


def check_target(target: Path, what: str = "folder", exported: Exported | None = None) -> None:
    """Check that something new can be written to ``target``.

    Args:
        what: is to be written there: a folder or a file.
        exported: whether what is there may be replaced; None: whatever it is, it may not.

    Raises BadInput where the target is a link, of another kind, not empty, in the folder of a run or such a folder
    itself, or cannot be looked at.
    """
    try:
        _check_place(target)
        if not target.exists():
            return
        if what == "folder" and not target.is_dir():
            raise BadInput(f"{target}: there is a file of that name; name a folder, new or empty.")
        if what == "file" and not target.is_file():
            raise BadInput(f"{target}: this is not a file; name the file to write, such as merged.gguf.")
        if what == "folder" and not any(target.iterdir()):
            return
        if exported is None:
            raise BadInput(f"{target}: is there already{' and not empty' * (what == 'folder')}; name another {what}.")
        if not exported(target):
            raise BadInput(
                f"{target}: --force replaces only what an export wrote and nobody has changed since, and this is "
                f"something else; name another {what}, or remove this one yourself."
            )
    except (OSError, ValueError, RuntimeError) as error:  # a zero in a path is a ValueError, a loop a RuntimeError
        file = str(getattr(error, "filename", None) or target)
        raise BadInput(f"{file[:200]}: it cannot be read ({cause_of(error)}); name another {what}.") from error


def _check_place(target: Path) -> None:
    """Raises BadInput for a URI, for a link, and for a place in a run."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(target)):  # is_remote wants two slashes, of which a Path keeps one
        raise BadInput(f"{target}: this is an address; name a place on this machine, and copy it from there.")
    if target.is_symlink():
        raise BadInput(f"{target}: this is a link; name the place itself, which must not exist yet.")
    place = target.resolve()
    run = next((p for p in (place, *place.parents) if any((p / name).exists() for name in OF_A_RUN)), None)
    if run is not None:
        raise BadInput(
            f"{target}: {run} is the folder of a run, and only the run itself writes there; name another place."
        )
    file = next((p for p in place.parents if p.exists() and not p.is_dir()), None)
    if file is not None:
        raise BadInput(f"{target}: {file} is a file, so nothing can be written below it; name another place.")


@contextlib.contextmanager
def disk_refusals(target: Path) -> Iterator[None]:
    """Turns what the disk says while something is written at ``target`` into BadInput that names the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and not takes_nothing(error):  # of a network, not of a file
            raise
        raise BadInput(file_sentence(error, str(target))) from error


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block ends well; never over anything that is there.

    Raises BadInput at its end, as ``check_target`` does, which the caller asks before any work is done, and where the
    disk takes nothing.
    """
    with disk_refusals(target), whole_folder(target, ready=lambda: check_target(target)) as folder:
        yield folder


def check_export(target: Path, force: bool) -> None:
    """As ``check_target`` for the folder of an export; with ``force`` an earlier export may be there."""
    check_target(target, exported=_is_recorded if force else None)


@contextlib.contextmanager
def exported_folder(target: Path, force: bool) -> Iterator[Path]:
    """The same for an export: it leaves a record, and with ``force`` it takes the place of an earlier export."""
    with disk_refusals(target), whole_folder(target, ready=lambda: check_export(target, force)) as folder:
        yield folder
        (folder / RECORD).write_text(json.dumps(_digests(folder), indent=1))


@contextlib.contextmanager
def new_file(target: Path, exported: Exported | None = None) -> Iterator[Path]:
    """The same for one file; ``exported`` says whether one that is there may be replaced, None: it may not."""
    with disk_refusals(target), whole_file(target, ready=lambda: check_target(target, "file", exported)) as file:
        yield file


def _is_recorded(folder: Path) -> bool:
    """Whether a folder holds nothing but what its record says, byte for byte."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        found = {name: digest for name, digest in _digests(folder).items() if name != RECORD}
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and found.items() <= record.items()


def _digests(folder: Path) -> Mapping[str, str]:
    """SHA-256 of every file below a folder, by its path in it.

    Raises ValueError for what is neither a file nor a folder.
    """
    found = {}
    for at, folders, files in os.walk(folder, onerror=_raise):
        for path in (Path(at, name) for name in (*folders, *files)):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path} is neither a file nor a folder")
        for path in (Path(at, name) for name in files):
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _raise(error: OSError) -> None:
    raise error
