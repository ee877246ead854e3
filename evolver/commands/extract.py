"""``evolver extract``: writes what a model changed in its base as a LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from evolver.checkpoints.doubts import suspicions
from evolver.checkpoints.lora_out import Adapter, is_tied, is_transposed, write_lora
from evolver.checkpoints.sources import open_base, open_expert
from evolver.checkpoints.weights import Source
from evolver.errors import BadInput
from evolver.storage import check_target, new_folder


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of an opened model by name; each is read when it is asked for."""

    def __init__(self, source: Source) -> None:
        self._source, self._names = source, source.names()

    def __getitem__(self, name: str) -> Tensor:
        return self._source.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def extract_lora(
    base: str, model: str, target: Path, *, rank: int | None = None, energy: float | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> Adapter:  # fmt: skip
    """Write the difference between a model and its base as a PEFT adapter.

    Args:
        base: folder, hub id or URI of the base.
        model: the same of a fine-tune of it.
        target: folder to write, new or empty.
        rank: of the adapter's matrices; or
        energy: the share of the squared difference that each matrix has to keep, in (0, 1].
        warn: is called with each warning about the models.

    Raises BadInput, before anything is written, where both or none of the two are given, where a model cannot be
    opened, and where the model is no fine-tune of the base or differs from it in no matrix.
    """
    if (rank is None) == (energy is None):
        raise BadInput("--rank, --energy: give a rank, or the share of the difference to keep, and not both.")
    check_target(target)
    origin = open_base(base, "BASE")
    expert = open_expert(model, origin, "MODEL")
    for doubt in suspicions(origin, [expert]):
        warn(doubt)
    names = [n for n, i in origin.headers.items() if i.dtype.is_floating_point]
    with new_folder(target) as folder:
        tensors = ((n, expert.tensor(n)) for n in names)
        tied, transposed = is_tied(origin.config), is_transposed(origin.config)
        return write_lora(LazyTensors(origin), tensors, folder, base, tied, rank, energy, transposed)
