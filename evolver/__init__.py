"""Evolver: search for the best merge of several fine-tunes of one base model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from evolver.version import __version__ as __version__

if TYPE_CHECKING:
    from evolver.commands.api import answers, evaluate, ledger_table, merge, run

__all__ = ["answers", "evaluate", "ledger_table", "merge", "run"]


def __getattr__(name: str) -> Any:
    """Import the Python API only when it is used, because importing torch alone takes a second."""
    if name in __all__:
        return getattr(importlib.import_module("evolver.commands.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
