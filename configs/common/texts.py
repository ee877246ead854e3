"""Texts as items: tidied, told apart, and drawn from without a random generator."""

from __future__ import annotations

import hashlib
import re


def normalise(text: str) -> str:
    """Lower case, only letters, digits and single spaces: two texts equal here are the same item."""
    return " ".join(re.sub(r"[^a-z0-9 ]", "", re.sub(r"\s", " ", text.lower())).split())


def tidy(text: str) -> str:
    """Single spaces, no space at the ends."""
    return " ".join(text.split())


def text_rank(text: str) -> int:
    """A number that depends on the text alone, for choices that must be arbitrary but the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
