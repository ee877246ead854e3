"""Where a run is kept: a folder here, on a shared file system, or on an object store (``s3://``, ``gs://``, …).

A file is there whole or not at all, and one that is created is never somebody else's: these two are what the ledger
stands on, whatever the machines and the network do.
"""

from __future__ import annotations

from pathlib import Path

from evolver.errors import BadInput
from evolver.storage.base import Storage, read_all
from evolver.storage.local import LocalStorage, whole_file, whole_folder
from evolver.storage.paths import expand
from evolver.storage.remote import RemoteStorage
from evolver.storage.target import check_export, check_target, disk_refusals, exported_folder, new_file, new_folder

__all__ = [
    "LocalStorage", "RemoteStorage", "Storage", "check_export", "check_target", "disk_refusals", "exported_folder",
    "is_remote", "new_file", "new_folder", "read_all", "storage_at", "whole_file", "whole_folder",
]  # fmt: skip


def storage_at(location: str | Path) -> Storage:
    """The storage at a path, or at a URI of any file system that fsspec knows.

    Raises BadInput for a URI of an unknown kind, or one whose package is missing, and for what is no path.
    """
    if not str(location) or "\0" in str(location):
        raise BadInput(f"{str(location)[:100]!r} cannot be a path; give a folder, or its URI.")
    place = expand(str(location))
    return RemoteStorage(place) if is_remote(place) else LocalStorage(Path(place.removeprefix("file://")).absolute())


def is_remote(location: str) -> bool:
    """Whether a location is a URI of another file system than this machine's."""
    return "://" in location and not location.startswith("file://")
