"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expand(path: str) -> str:
    """``path`` with ``~`` and environment variables filled in; unset variables of ours take their default."""
    os.environ.setdefault("EVOLVER_CACHE", str(Path.home() / ".cache" / "evolver"))
    return os.path.expandvars(os.path.expanduser(path))
