"""The seal of a GGUF file: its own digest, by which an export knows a file that it wrote and nobody changed since."""

from __future__ import annotations

import hashlib
from pathlib import Path

SEAL_KEY, BLANK = "evolver.sha256", "0" * 64
# The key stands among the first ones, long before the words of the vocabulary.
WITHIN = 1 << 16


def seal(file: Path) -> None:
    """Write a file's own digest into it, taken with zeros in the digest's place."""
    place, digest = _sealed(file)
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(digest.encode())


def is_sealed(file: Path) -> bool:
    """Whether a file is as ``seal`` left it."""
    try:
        place, digest = _sealed(file)
    except ValueError:
        return False
    with file.open("rb") as stream:
        stream.seek(place)
        return stream.read(len(BLANK)) == digest.encode()


def _sealed(file: Path) -> tuple[int, str]:
    """Where a file's own digest stands, and what it has to be.

    Raises ValueError where the file has no place for one.
    """
    with file.open("rb") as stream:
        place = stream.read(WITHIN).find(SEAL_KEY.encode())
        if place < 0:
            raise ValueError(f"{file} has no {SEAL_KEY}")
        place += len(SEAL_KEY) + 4 + 8  # behind the key: the value's type, and its length
        stream.seek(0)
        digest = hashlib.sha256(stream.read(place) + BLANK.encode())
        stream.seek(place + len(BLANK))
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
    return place, digest.hexdigest()
