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


# Settings of the library sentence-transformers, which mean nothing without the folders of its modules.
OF_MODULES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
# So many names are printed at most.
NAMES_SAID = 8


@dataclass(frozen=True)
class Beside:
    """Names in a model's folder.

    Attributes:
        folder: of the model.
        kept: files that belong to the model.
        lost: files and folders that may belong to it, or that hold its weights in another form; a folder ends in ``/``.
    """

    folder: Path
    kept: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence on what is lost, if anything is."""
        few = ", ".join(self.lost[:NAMES_SAID]) + ", …" * (len(self.lost) > NAMES_SAID)
        return (f"{self.folder}: these are not copied to the merged model: {few}.",) if self.lost else ()

    def copy_to(self, target: Path) -> None:
        """Copy what is kept into another folder."""
        copy(self.folder, target, self.kept)


def beside(folder: Path, known: Collection[str], modules: bool) -> Beside:
    """The files of a folder beside its weights, without what is ``known``: written by others, or the model itself.

    Args:
        modules: whether the modules of a folder of sentence-transformers are kept, and so the settings beside them.
    """
    if not folder.is_dir():  # a model in one file
        return Beside(folder)
    found = [p for p in sorted(folder.iterdir()) if p.name not in known and not any(map(p.match, LEFT_BEHIND))]
    kept = [p.name for p in found if p.is_file() and _belongs(p) and (modules or p.name not in OF_MODULES)]
    lost = [f"{p.name}/" if p.is_dir() else p.name for p in found if p.name not in kept]
    return Beside(folder, tuple(kept), tuple(lost))


def copy(source: Path, target: Path, names: Collection[str]) -> None:
    """Copy files of a folder into another one."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _belongs(file: Path) -> bool:
    return file.suffix.lower() in READ or file.name.upper().startswith(LEGAL)
