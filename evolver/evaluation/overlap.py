"""The overlap of a run's items with the texts that its experts were trained on, as far as their folders say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolver.records import Split

# The file that `evolver experts` writes beside an expert's weights, and its key with the hashes of the texts.
TRAINING_FILE, TEXTS_KEY = "training.json", "texts"


@dataclass(frozen=True)
class Overlap:
    """How many items of each split have a text that an expert was trained on, and how many items each split has."""

    shared: Mapping[Split, int]
    items: Mapping[Split, int]

    def form(self) -> dict[str, Any]:
        """The overlap as a JSON object."""
        return {"shared": dict(self.shared), "items": dict(self.items)}

    @staticmethod
    def from_form(form: Mapping[str, Any]) -> Overlap:
        """The inverse of ``form``."""
        return Overlap(dict(form["shared"]), dict(form["items"]))


def overlaps(
    texts_of: Callable[[Split], Sequence[str | None]], folders: Mapping[str, Path], splits: Sequence[Split]
) -> dict[str, Overlap]:  # fmt: skip
    """The overlap of each expert whose folder says which texts it was trained on.

    Args:
        texts_of: gives the hashes of the texts of a split's items.
        folders: of the experts, by name.
    """
    known = {name: texts for name, folder in folders.items() if (texts := _trained_on(folder)) is not None}
    if not known:
        return {}
    asked = {split: texts_of(split) for split in splits}
    sizes = {split: len(texts) for split, texts in asked.items()}
    return {
        name: Overlap({split: sum(t in trained for t in texts) for split, texts in asked.items()}, sizes)
        for name, trained in known.items()
    }


def _trained_on(folder: Path) -> frozenset[str] | None:
    """The hashes of the texts that an expert was trained on; None where its folder does not say."""
    try:
        texts = json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))[TEXTS_KEY]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return frozenset(map(str, texts)) if isinstance(texts, list) else None
