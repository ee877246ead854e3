"""Statistics of experts: collected once on dev items, then kept in the cache and read from there."""

from __future__ import annotations

import importlib.metadata
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evolver.checkpoints.kept import Damaged, open_kept, write_kept
from evolver.config import Config
from evolver.errors import BadInput
from evolver.evaluation.collectors import collector_named
from evolver.evaluation.live import LiveModel
from evolver.evaluation.tasks import SplitScorer, Tasks
from evolver.kernels.machine import digest_of
from evolver.merging.materialise import StatisticTensors
from evolver.records.canonical import content_hash
from evolver.records.recipe import Expert, Statistic
from evolver.storage.paths import expand
from evolver.workers.plan import CHAT, SCORING_PACKAGES, Plan

# Keys of a task that change neither what a model reads nor in which batches.
NOT_READ = {"data", "report_data", "select", "select_data", "report", "report_task", "dev", "weight", "metric"}
# The same of the evaluation.
NOT_ASKED = {"tasks", "include_path", "early_stopping", "racing"}


def sample(config: Config, tasks: Tasks, expert: str) -> list[int]:
    """The places of the dev items that an expert's statistics are collected on, in their order.

    Raises BadInput where a task of them does not say which positions of a batch are padding.
    """
    own = [e.task for e in tasks.entries if expert in (e.task, e.head)]
    wanted = config.statistics.tasks.get(expert) or own or [e.task for e in tasks.entries]
    for number, entry in enumerate(tasks.entries):
        if entry.task in wanted and not tasks.judges[entry.task].tells_padding(entry):
            raise BadInput(
                f"evaluation.tasks[{number}]: {entry.task} is scored in a way that does not say which positions of a "
                "batch are padding, so no statistics of experts can be collected on it; choose a merge method "
                "without statistics, or name other tasks under statistics.tasks."
            )
    places = [place for place, task in enumerate(tasks.scale("dev").tasks) if task in wanted]
    return places[: config.statistics.items]


def sample_hash(config: Config, tasks: Tasks, expert: str) -> str:
    """One hash for the items of ``sample``, in their order. Raises BadInput as it does."""
    owners, items = tasks.scale("dev").tasks, tasks.items.dev
    return content_hash([[owners[place], items[place].hash] for place in sample(config, tasks, expert)])


class Statistics:
    """Gives a materialiser the statistics that a recipe asks for.

    Args:
        plan: of the run.
        tasks: of the run.
        model: gives the live model, whose weights are overwritten where something has to be collected.
        scorer: scores it on the dev items.
    """

    def __init__(
        self, plan: Plan, tasks: Tasks, model: Callable[[], Any], scorer: Callable[[Any], SplitScorer]
    ) -> None:  # fmt: skip
        self._plan, self._tasks, self._model, self._scorer = plan, tasks, model, scorer

    def __call__(self, node: Statistic, weights: Iterator[tuple[str, Tensor]]) -> StatisticTensors:
        """The tensors of a statistic.

        Args:
            weights: of the model, read only where the statistic has to be collected.

        Raises BadInput for a statistic of a merge, or of other items than those of the run.
        """
        if not isinstance(node.of, Expert):
            raise BadInput(
                f"statistics: {node.collected} can be collected from experts only, and the recipe asks for that of a "
                "merge."
            )
        places = sample(self._plan.config, self._tasks, node.of.name)
        if sample_hash(self._plan.config, self._tasks, node.of.name) != node.items:
            raise BadInput(f"statistics: {node.describe()} was collected on other items than those of this run.")
        key = self._key(node)
        file = Path(expand("$EVOLVER_CACHE")) / "statistics" / f"{key}.safetensors"
        try:
            kept = open_kept(file, key)
        except Damaged as error:
            _say(f"statistics: {file} is damaged ({error}); {node.collected} of {node.of.name} is collected again")
            kept = None
        return kept or self._collect(node, weights, places, file, key)

    def _collect(
        self, node: Statistic, weights: Iterator[tuple[str, Tensor]], places: Sequence[int], file: Path, key: str
    ) -> StatisticTensors:
        began, config = time.perf_counter(), self._plan.config
        torch.set_num_threads(config.evaluation.threads)
        live: LiveModel = self._model()
        live.write(weights, whole=True)
        scorer, block = self._scorer(live), self._plan.block("dev", len(places))

        def score() -> None:
            for start in range(0, len(places), block):
                scorer.score_at(frozenset(places[start : start + block]))

        found = dict(collector_named(node.collected)(live, score))
        try:
            write_kept(file, key, found)
        except OSError as error:
            _say(f"statistics: {file} cannot be written ({error.strerror or error}); the next call collects them again")
        seconds = time.perf_counter() - began
        _say(
            f"statistics: {node.collected} of {node.of.label} collected on {len(places)} dev items in {seconds:.1f} s"
        )  # fmt: skip
        return found

    def _key(self, node: Statistic) -> str:
        """All that decides the bytes: what was collected of which weights, how the model reads items and computes."""
        config = self._plan.config
        asked = config.evaluation.model_dump(mode="json", exclude=NOT_ASKED)
        tasks = [t.model_dump(mode="json", exclude=NOT_READ) for t in config.evaluation.tasks]
        model = config.model.model_dump(mode="json", exclude={"base", "chat_template", "tokenizer"})
        versions = {p: importlib.metadata.version(p) for p in SCORING_PACKAGES}
        # The items of both splits: none of them serves as an example in a prompt.
        run = [self._plan.digests["base"], dict(self._plan.items), config.seed]
        run += [self._plan.digests[CHAT]] if CHAT in self._plan.digests else []
        code = digest_of(inspect.getfile(collector_named(node.collected)))  # another version may collect something else
        return content_hash([node.id, code, asked, tasks, model, versions, run])


def _say(line: str) -> None:
    """Workers have no display; what they write here stands in the terminal, or in the logs of their node."""
    sys.stderr.write(line + "\n")
