"""The Python API: the functions that ``from evolver import …`` imports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from evolver.commands.evaluate import ModelScore, score_models
from evolver.commands.merge import merge_file
from evolver.config.reading import ConfigText, config_at
from evolver.ledger import answer_table, read_table
from evolver.loggers.terminal import display
from evolver.records import Split
from evolver.storage import storage_at


def merge(file: str | Path, target: str | Path, *, device: str = "cpu", seed: int = 0,
          warn: Callable[[str], None] = print) -> Path:  # fmt: skip
    """Merge models as a mergekit file says, and return the Hugging Face folder that was written.

    Args:
        file: path of a YAML file in mergekit's format.
        target: folder to write, new or empty.
        device: where to compute: ``cpu`` or ``cuda``.
        seed: seed of the methods that draw at random.
        warn: is called with each warning about the models; default: it is printed.

    Raises BadInput, before anything is written, where the file is wrong or the models cannot be merged.
    """
    merge_file(file, Path(target), device=device, seed=seed, warn=warn)
    return Path(target)


def run(
    config: str | Path | Mapping[str, Any], results: str | Path = "results", name: str | None = None, *,
    retry_failed: bool = False,
) -> str:  # fmt: skip
    """Run a search, or continue it where it was stopped, and return the path or URI of the run's folder.

    Args:
        config: path of a YAML file, or a mapping with the same keys.
        results: folder of all runs, or its URI.
        name: name of the run; default: the key ``run`` of the configuration.
        retry_failed: whether candidates that failed in an earlier call are tried again.

    Raises BadInput for anything that the user has to correct. Everything that finished before that is kept.
    """
    from cluster.job import run_here

    given = ConfigText(yaml.safe_dump(dict(config)), "config") if isinstance(config, Mapping) else config_at(config)
    with contextlib.closing(display()) as shown:
        return run_here(given, storage_at(str(results)), name, shown, retry_failed).location


def evaluate(
    config: str | Path, models: Sequence[str | Path], split: Split = "report", *, warn: Callable[[str], None] = print
) -> list[ModelScore]:  # fmt: skip
    """Score models on the tasks of a configuration, in the same way as the end of a run does.

    Args:
        config: path of the YAML file of a run, whose tasks, items and base are used.
        models: folders, hub ids or URIs of models with the architecture of the base.
        split: the items: ``dev`` or ``report``.
        warn: is called with each warning; default: it is printed.

    Raises BadInput where the configuration is wrong or a model cannot be scored.
    """
    return score_models(str(config), [str(m) for m in models], split, warn)


def ledger_table(folder: str | Path) -> pa.Table:
    """The ledger of a run as an Arrow table.

    The column ``event`` says what a row is: a proposal (``asked``), a result (``finished``), or the result of a
    candidate that an idle worker scored before the search asked for it (``guessed``). After a call with
    ``retry_failed``, a failure that was taken back is ``retried``, and a result that the search had asked for after it
    is ``orphaned``, unless the search asks for it again. A run that goes on from another one begins with the candidates
    (``listed``) and the results (``inherited``) that it has taken over. A row ``described`` brings back nodes of a
    recipe that were lost with a damaged file.

    The column ``nodes`` holds those nodes of a recipe that no earlier row holds; ``evolver.ledger.nodes_of`` puts
    recipes together.

    Args:
        folder: folder of the run, or its URI.
    """
    return read_table(storage_at(str(folder)).folder("ledger"))


def answers(folder: str | Path) -> pa.Table:
    """Every answer of a run as an Arrow table, with one row for each candidate and item.

    Args:
        folder: folder of the run, or its URI.
    """
    return answer_table(storage_at(str(folder)))
