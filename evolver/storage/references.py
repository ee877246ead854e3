"""Models as users name them: by a folder, a URI or a hub id, and with an adapter behind a plus sign."""

from __future__ import annotations

import re
from pathlib import Path

from evolver.storage import is_remote
from evolver.storage.paths import expand

# A place on another file system; a plus sign in its first word would be that behind a model.
URI = re.compile(r"\w+://")
HUB_ID = r"[\w.-]+/[\w.-]+(@[\w.-]+)?"


def parts_of(location: str) -> tuple[str, str]:
    """A model and its adapter, which are written ``MODEL+ADAPTER``; the second is empty where there is none.

    A plus sign that belongs to the name of a folder, or to a URI, divides nothing.
    """
    places = [n for n, sign in enumerate(location) if sign == "+" and 0 < n < len(location) - 1]
    pairs = [(location[:n], location[n + 1 :]) for n in places]
    if not pairs or _is_here(location):
        return location, ""
    if is_remote(expand(location)):
        found = [(left, right) for left, right in pairs if URI.match(right) or _is_here(right)]
        return found[0] if found else (location, "")
    best = max(pairs, key=lambda pair: 2 * may_be(pair[0]) + may_be(pair[1]))  # the first of equals
    return best if any(map(may_be, best)) else (location, "")


def may_be(location: str) -> bool:
    """Whether a model can be at a location, as far as this is known without opening it."""
    return is_remote(expand(location)) or _is_here(location) or re.fullmatch(HUB_ID, location) is not None


def _is_here(location: str) -> bool:
    try:
        return Path(expand(location).removeprefix("file://")).exists()
    except (OSError, ValueError):
        return False
