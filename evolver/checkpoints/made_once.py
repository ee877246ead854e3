"""Tensors of a model that cost much to compute and are asked for again and again: kept in the cache of the user."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from evolver.checkpoints.shards import SHARD_BYTES, write_shards
from evolver.checkpoints.weights import TensorInfo, open_tensors
from evolver.errors import BadInput
from evolver.storage.local import whole_folder
from evolver.storage.paths import expand

# The folder of the cache.
ADAPTERS = "adapters"


class MadeTensors:
    """Tensors in a folder of the cache, mapped."""

    def __init__(self, files: Iterable[Path]) -> None:
        handles = [open_tensors(file, ADAPTERS) for file in files]
        self._of: dict[str, Any] = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

    def get(self, name: str) -> Tensor | None:
        """The tensor of that name, where there is one."""
        found = self._of.get(name)
        return None if found is None else found.get_tensor(name)


def made_once(identity: str, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, Tensor]]) -> MadeTensors:
    """The tensors from the cache, where they are put now if they are not there: one at a time, so memory stays small.

    Args:
        identity: all that decides about the tensors.
        infos: shape and dtype of each, in the order in which ``tensors`` brings them.

    Returns none of them where the cache cannot be written or read: that costs time, not correctness.
    """
    folder = Path(expand("$EVOLVER_CACHE")) / ADAPTERS / hashlib.sha256(identity.encode()).hexdigest()[:32]
    try:
        if not folder.is_dir():
            with whole_folder(folder) as temporary:
                write_shards(tensors, infos, temporary, SHARD_BYTES)
        return MadeTensors(sorted(folder.glob("*.safetensors")))
    except (OSError, BadInput):
        return MadeTensors([])
