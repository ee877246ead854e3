"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def last_part(location: str) -> str:
    """The last part of a path or a URI: the name of a folder at that location."""
    return location.rstrip("/").rpartition("/")[2]


def expand(path: str) -> str:
    """``path`` with ``~`` and environment variables filled in; unset variables of ours take their default."""
    os.environ.setdefault("EVOLVER_CACHE", str(Path.home() / ".cache" / "evolver"))
    return os.path.expandvars(os.path.expanduser(path))
