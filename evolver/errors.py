"""The error classes of Evolver. All of them can be pickled and sent to another process."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EvolverError(Exception):
    """The base class of all error classes that Evolver defines."""


class BadInput(EvolverError):
    """Something in the user's files or arguments cannot be used.

    The message is one sentence that names the file, the key and what to write instead. The command line prints it
    without a traceback and exits with status 2.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt ``word``: the nearest known words, or a list of the known words if none is near."""
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    if not known:
        return "none is known here"
    return "known: " + ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
