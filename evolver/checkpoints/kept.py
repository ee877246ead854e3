"""Tensors that were computed once and are kept: a safetensors file, sealed with the digest of what it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from evolver.checkpoints.shards import disk_errors
from evolver.checkpoints.weights import cached, digest_of_tensors, open_tensors
from evolver.errors import BadInput, EvolverError
from evolver.storage.local import whole_file

SEAL = "evolver.sha256"


class Damaged(EvolverError):
    """A file that is not as it was written."""


class KeptTensors:
    """The tensors of a sealed file, mapped: only those that are asked for are read."""

    def __init__(self, handle: Any) -> None:
        self._handle, self._names = handle, frozenset(handle.keys())

    def get(self, name: str) -> Tensor | None:
        """The tensor of that name, where there is one."""
        return self._handle.get_tensor(name) if name in self._names else None


def open_kept(file: Path, key: str) -> KeptTensors | None:
    """The file's tensors; None where there is no file.

    Args:
        key: what it was sealed for.

    Raises Damaged where the file is not what was written for that key.
    """
    if not file.exists():
        return None
    try:
        handle = open_tensors(file, "cache")
        names = sorted(handle.keys())
        sealed = (handle.metadata() or {}).get(SEAL)
        found = cached("digests-kept", [file], lambda: digest_of_tensors((n, handle.get_tensor(n)) for n in names))
    except (BadInput, OSError) as error:
        raise Damaged(str(error)) from error
    if sealed != _sealed(key, found):
        raise Damaged(f"{file} holds other bytes than were written")
    return KeptTensors(handle)


def write_kept(file: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, sealed for ``key``, whole or not at all.

    Raises OSError where that cannot be done.
    """
    seal = _sealed(key, digest_of_tensors(sorted(tensors.items())))
    with whole_file(file) as temporary, disk_errors():
        save_file(dict(tensors), temporary, {SEAL: seal})


def _sealed(key: str, digest: str) -> str:
    return hashlib.sha256(f"{key} {digest}".encode()).hexdigest()
