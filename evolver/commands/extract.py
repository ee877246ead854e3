"""``evolver extract``: writes what a model, or each expert of a run, changed in its base as a LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from evolver.checkpoints.adapted import model_below
from evolver.checkpoints.doubts import strange_bases, suspicions
from evolver.checkpoints.heads import Head, Relabelled
from evolver.checkpoints.lora_out import WrittenAdapter, is_tied, is_transposed, write_lora
from evolver.checkpoints.sources import open_base, open_expert
from evolver.checkpoints.weights import Checkpoint, Source
from evolver.config.reading import load
from evolver.errors import BadInput
from evolver.merging.alignment.realigned import Realigned
from evolver.storage import check_target, new_folder
from evolver.storage.references import parts_of
from evolver.workers.opened import Opened, open_models


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
) -> WrittenAdapter:  # fmt: skip
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
    _check_size(rank, energy)
    check_target(target)
    origin = open_base(base, "BASE")
    expert = open_expert(model, origin, "MODEL")
    for doubt in (*strange_bases([expert]), *suspicions(origin, [expert])):
        warn(doubt)
    with new_folder(target) as folder:
        return _write(origin, expert, folder, base, rank, energy, {})


def extract_pool(
    file: Path, target: Path, *, rank: int | None = None, energy: float | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> dict[str, WrittenAdapter]:  # fmt: skip
    """Write the difference between each expert of a run and its base as a PEFT adapter, in a folder of the expert's
    name. Classification heads that the run keeps apart, or brings together by label, are written whole.

    Args:
        file: the run's configuration.
        target: folder for all adapters, new or empty.
        rank, energy, warn: see ``extract_lora``.

    Returns what was written by the names of the experts. Raises BadInput, before anything is left behind, as
    ``extract_lora`` does, and where the experts have other tokens than the base, which has no place for them.
    """
    _check_size(rank, energy)
    check_target(target)
    config = load(str(file))
    try:
        opened = open_models(config)
        if opened.companions.tokens is not None:
            raise BadInput(
                "model.tokenizer: the experts have other tokens than the base, and an adapter has no place for their "
                "rows; give experts with the tokens of the base."
            )
        origin = model_below(_body(opened.base))  # PEFT puts an adapter onto a model without one
        models = {name: _body(expert) for name, expert in opened.experts.items()}
        for doubt in (*strange_bases(models.values()), *suspicions(origin, models.values())):
            warn(doubt)
        location = parts_of(config.model.base)[0]
        with new_folder(target) as folder:
            made = {}
            for name, expert in models.items():
                (folder / name).mkdir()
                head = _head(opened, name)
                made[name] = _write(origin, expert, folder / name, location, rank, energy, head)
            return made
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error


def _check_size(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise BadInput("--rank, --energy: give a rank, or the share of the difference to keep, and not both.")


def _body(model: Any) -> Any:
    """A model without the head and the order of units that a run shows it with."""
    model = model.inner if isinstance(model, Realigned) else model
    return model.inner if isinstance(model, Relabelled) else model


def _head(opened: Opened, name: str) -> Head:
    """The head of an expert that is no part of its body."""
    seen: Any = opened.experts[name]
    seen = seen.inner if isinstance(seen, Realigned) else seen
    return seen.heads[name] if isinstance(seen, Relabelled) else opened.heads.get(name, {})


def _write(
    origin: Checkpoint, expert: Source, folder: Path, location: str, rank: int | None, energy: float | None, head: Head
) -> WrittenAdapter:  # fmt: skip
    names = [n for n, i in origin.headers.items() if i.dtype.is_floating_point]
    tensors = ((n, expert.tensor(n)) for n in names)
    tied, transposed = is_tied(origin.config), is_transposed(origin.config)
    try:
        return write_lora(LazyTensors(origin), tensors, folder, location, tied, rank, energy, transposed, head)
    except BadInput as error:
        raise BadInput(f"{expert.key}: {error}") from error
