"""One text and one hash for equal values, in every process."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON in which equal values give equal texts: sorted keys, no spaces, shortest form of floats.

    Raises ValueError for NaN and infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def content_hash(value: Any) -> str:
    """The first 80 bits of the SHA-256 of the canonical form, as 20 hexadecimal digits."""
    return text_hash(canonical_json(value))


def text_hash(text: str) -> str:
    """The same hash of a canonical form that is given as its JSON."""
    return hashlib.sha256(text.encode()).hexdigest()[:20]
