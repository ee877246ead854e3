"""A model with an adapter in it, seen as a checkpoint: the base of a run that is written as ``MODEL+ADAPTER``."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from evolver.checkpoints.adapter import Adapter
from evolver.checkpoints.weights import Checkpoint, Source, TensorInfo
from evolver.errors import BadInput


class Adapted(Checkpoint):
    """The weights are the adapter's, one tensor at a time; the files beside them are the model's.

    Args:
        inner: the adapter on its model.

    Raises BadInput for another format of changes, and for an adapter with tokens of its own, for which the model's
    files have no place.
    """

    def __init__(self, inner: Source) -> None:
        if not isinstance(inner, Adapter):
            raise BadInput(f"{inner.key}: {inner.path} is no adapter of PEFT; give the base as one folder.")
        if inner.has_own_tokens:
            raise BadInput(
                f"{inner.key}: the adapter {inner.path} was trained with other tokens than {inner.base.path} has, and "
                "the base of a run cannot be written so; merge it into its model with PEFT (merge_and_unload) and give "
                "that folder."
            )
        self.inner, self.path, self.key = inner, inner.base.path, inner.key
        self.headless, self.location = inner.base.headless, inner.base.location

    @cached_property
    def headers(self) -> dict[str, TensorInfo]:  # asked for with every tensor, and the adapter makes them anew
        return dict(self.inner.headers)

    @property
    def config(self) -> dict[str, Any]:
        return self.inner.base.config

    def files(self) -> list[Path]:
        return self.inner.files()

    def tensor(self, name: str) -> Tensor:
        return self.inner.tensor(name)

    def digest(self) -> str:
        return self.inner.digest()


def seen_through(source: Any) -> Any:
    """A model as it is, where it is shown with other heads or tokens, or an adapter as a checkpoint."""
    while hasattr(source, "inner"):
        source = source.inner
    return source


def model_below(source: Source) -> Any:
    """The checkpoint that an adapter is on; any other model as it is."""
    found = seen_through(source)
    return found.base if isinstance(found, Adapter) else source
