"""The error classes of Evolver. All of them can be pickled and sent to another process."""

from __future__ import annotations

import difflib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

# Full, over a quota, read-only, or over the limit for one file: none of these is ever a fault of the program.
TAKES_NOTHING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


class EvolverError(Exception):
    """The base class of all error classes that Evolver defines."""


class BadInput(EvolverError):
    """Something in the user's files or arguments cannot be used.

    The message is one sentence that names the file, the key and what to write instead. The command line prints it
    without a traceback and exits with status 2.
    """


def nearest(word: object, known: Iterable[object]) -> str:
    """A hint for a misspelt ``word``: the nearest known words, or a list of the known words if none is near.

    Keys of a user's file may be numbers, which are taken as the words that they are written as.
    """
    word, known = str(word), sorted({str(k) for k in known})
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    if not known:
        return "there are no known names here"
    return "known: " + ", ".join(known[:20]) + (", …" if len(known) > 20 else "")


def cause_of(error: Exception) -> str:
    """Why a file could not be read or written, in a few words of a sentence."""
    match error:
        case IsADirectoryError():
            return "there is a folder in its place"
        case NotADirectoryError() | FileExistsError():
            return "there is a file where a folder should be"
        case UnicodeDecodeError():
            return "it is not a text file"
        case OSError() if error.errno == errno.ELOOP:
            return "it is a link to itself"
    said = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(said.split())[:200]


def file_sentence(error: OSError, place: str) -> str:
    """Which file could not be read or written, and what to do; it lies at ``place``, if the error does not say."""
    remedy = "move it away" if is_misplaced(error) else "free disk space or correct the permissions"
    return (
        f"{error.filename or place}: it cannot be read or written ({cause_of(error)}); {remedy}, and run the command "
        "again."
    )


def is_misplaced(error: Exception) -> bool:
    """Whether something else stands where a file or a folder should be: no waiting and no rights help."""
    return isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError) or (
        isinstance(error, OSError) and error.errno == errno.ELOOP
    )


def takes_nothing(error: OSError) -> bool:
    """Whether a disk, or a file, takes nothing more."""
    return error.errno in TAKES_NOTHING


def refuse_special(path: str | Path) -> None:
    """Raises OSError for a pipe, a socket or a device: opening or reading one may never end."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a file", str(path))
