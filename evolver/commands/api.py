"""What a Python program does with Evolver: the functions that ``from evolver import …`` gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from evolver.commands.evaluate import ModelScore, score_models
from evolver.commands.merge import merge_file
from evolver.config import ConfigText, config_at
from evolver.ledger import answer_table, read_table
from evolver.loggers.terminal import display
from evolver.records import Split
from evolver.storage import storage_at


def merge(file: str | Path, target: str | Path, *, device: str = "cpu", seed: int = 0,
          warn: Callable[[str], None] = print) -> Path:  # fmt: skip
    """Merge models as a mergekit file says, and return the Hugging Face folder that was written.

    Args:
        file: YAML, as mergekit reads it.
        target: folder to write, new or empty.
        device: where to compute: ``cpu`` or ``cuda``.
        seed: of methods that draw at random.
        warn: told, a line each, what is odd about the models.

    Raises BadInput for what cannot be merged, before anything is written.
    """
    merge_file(file, Path(target), device=device, seed=seed, warn=warn)
    return Path(target)


def run(config: str | Path | Mapping[str, Any], results: str | Path = "results", name: str | None = None) -> str:
    """Run a search, or the rest of it, and return where the run's folder is.

    Args:
        config: a YAML file, or what would stand in one.
        results: folder of all runs, or a URI.
        name: of the run, instead of the configuration's.

    Raises BadInput for anything that has to be mended. Everything that finished before that is kept.
    """
    from cluster.job import run_here

    given = ConfigText(yaml.safe_dump(dict(config)), "config") if isinstance(config, Mapping) else config_at(config)
    with contextlib.closing(display()) as shown:
        return run_here(given, storage_at(str(results)), name, shown).location


def evaluate(config: str | Path, models: Sequence[str | Path], split: Split = "report") -> list[ModelScore]:
    """Score any models of the base's architecture on a configuration's tasks, as the end of a run does.

    Args:
        config: the YAML file whose tasks, items and base are meant.
        models: folders, hub ids or URIs.
        split: ``dev`` or ``report``.

    Raises BadInput for what cannot be scored.
    """
    return score_models(str(config), [str(m) for m in models], split)


def ledger_table(folder: str | Path) -> pa.Table:
    """The ledger of a run: one row for each event, with recipes, scores, items and seconds; see docs/runs.md."""
    return read_table(storage_at(str(folder)).folder("ledger"))


def answers(folder: str | Path) -> pa.Table:
    """Every answer of a run: one row for each candidate and item, with the item's hash."""
    return answer_table(storage_at(str(folder)))
