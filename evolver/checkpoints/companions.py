"""The files of a model's folder beside its weights: which of them belong to the model, and which are not kept."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

# Of files that programs read together with the weights.
READ = (".json", ".txt", ".model", ".spm", ".jinja", ".vocab", ".tiktoken", ".py", ".yaml", ".yml")
# First words of files that go with a model wherever it goes.
LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
# What training, exports and other tools leave beside a model.
LEFT_BEHIND = (
    "training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json",
    "*_results.json", "events.out.*", "checkpoint-*", "runs", "logs", "__pycache__", "*.index.json", ".*", "README.md",
    "adapter_config.json", "mergekit_config.yml", "recipe.json", "evolver-export.json",
)  # fmt: skip


@dataclass(frozen=True)
class Companions:
    """Names in a model's folder.

    Attributes:
        kept: files that belong to the model.
        lost: files and folders that may belong to it, or that hold its weights in another form; a folder ends in ``/``.
    """

    kept: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def companions(folder: Path, known: Collection[str]) -> Companions:
    """The companions in a folder, without what is ``known``: written by others, or the model itself."""
    if not folder.is_dir():  # a model in one file
        return Companions()
    found = [p for p in sorted(folder.iterdir()) if p.name not in known and not any(map(p.match, LEFT_BEHIND))]
    kept = [p.name for p in found if p.is_file() and _belongs(p)]
    lost = [f"{p.name}/" if p.is_dir() else p.name for p in found if p.name not in kept]
    return Companions(tuple(kept), tuple(lost))


def copy(source: Path, target: Path, names: Collection[str]) -> None:
    """Copy files of a folder into another one."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _belongs(file: Path) -> bool:
    return file.suffix.lower() in READ or file.name.upper().startswith(LEGAL)
