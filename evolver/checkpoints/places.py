"""Where a model that the user names can be, as far as this is known without opening it."""

from __future__ import annotations

import re
from pathlib import Path

from evolver.errors import BadInput, cause_of
from evolver.storage import is_remote
from evolver.storage.paths import expand

# The suffixes of files that Python's pickle writes.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# A place on another file system; a plus sign in its first word would be that behind a model.
URI = re.compile(r"\w+://")
HUB_ID = r"[\w.-]+/[\w.-]+(@[\w.-]+)?"


def refuse_missing(location: str, key: str) -> None:
    """Check that a model can be at ``location``: something is there on this machine, or it is a URI or a hub id.

    Raises BadInput that names ``key``.
    """
    if is_remote(location := expand(location)):
        return
    path = Path(location.removeprefix("file://"))
    try:
        there = path.exists()
    except (OSError, ValueError) as error:  # longer than any name may be, or with a zero in it
        raise BadInput(f"{key}: {location[:100]!r} cannot be a path ({cause_of(error)}); give a folder.") from error
    _refuse_pickle(path, key)
    folder, _, revision = str(path).rpartition("@")
    if not there and folder and Path(folder).exists():
        raise BadInput(
            f"{key}: {folder} is on this machine, where a model has no revisions; leave @{revision} out, or give the "
            f"hub id of the model with @{revision}."
        )
    if not there and not re.fullmatch(HUB_ID, location):
        raise BadInput(f"{key}: there is no folder {path}; give the folder of a model, or a hub id such as org/name.")


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
    return next(((left, right) for left, right in pairs if _may_be(left) and _may_be(right)), pairs[0])


def refuse_missing_parts(location: str, key: str) -> None:
    """Check that a model, and its adapter where it has one, can be where a user says, as ``refuse_missing`` does."""
    model, adapter = parts_of(location)
    refuse_missing(model, key)
    if not adapter:
        return
    if "+" in adapter and not _may_be(adapter):
        raise BadInput(
            f"{key}: {location} has more than one plus sign; write MODEL+ADAPTER, and merge further adapters into "
            "their model with PEFT (merge_and_unload) before."
        )
    refuse_missing(adapter, key)


def _may_be(location: str) -> bool:
    return is_remote(expand(location)) or _is_here(location) or re.fullmatch(HUB_ID, location) is not None


def _is_here(location: str) -> bool:
    try:
        return Path(expand(location).removeprefix("file://")).exists()
    except (OSError, ValueError):
        return False


def _refuse_pickle(path: Path, key: str) -> None:
    """Raises BadInput for a single file of pickled weights, as mergekit-pytorch takes them."""
    if path.suffix in PICKLES and path.is_file():
        raise BadInput(
            f"{key}: {path} is a pickle, which can run code when it is read; save the model as a folder with "
            "safetensors (save_pretrained), and give that folder."
        )
