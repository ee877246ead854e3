"""Where a model that the user names can be, as far as this is known without opening it."""

from __future__ import annotations

import re
from pathlib import Path

from evolver.errors import BadInput, cause_of
from evolver.storage import is_remote
from evolver.storage.paths import expand
from evolver.storage.references import HUB_ID, may_be, parts_of

# The suffixes of files that Python's pickle writes.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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


def refuse_missing_parts(location: str, key: str) -> None:
    """Check that a model, and its adapter where it has one, can be where a user says, as ``refuse_missing`` does."""
    model, adapter = parts_of(location)
    refuse_missing(model, key)
    if not adapter:
        return
    if "+" in adapter and not may_be(adapter):
        raise BadInput(
            f"{key}: {location} has more than one plus sign; write MODEL+ADAPTER, and merge further adapters into "
            "their model with PEFT (merge_and_unload) before."
        )
    refuse_missing(adapter, key)


def _refuse_pickle(path: Path, key: str) -> None:
    """Raises BadInput for a single file of pickled weights, as mergekit-pytorch takes them."""
    if path.suffix in PICKLES and path.is_file():
        raise BadInput(
            f"{key}: {path} is a pickle, which can run code when it is read; save the model as a folder with "
            "safetensors (save_pretrained), and give that folder."
        )
