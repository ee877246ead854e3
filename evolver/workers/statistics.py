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
from evolver.evaluation.collectors import Collector, collector_named
from evolver.evaluation.live import LiveModel
from evolver.evaluation.random_tokens import RandomTokens
from evolver.evaluation.tasks import SplitScorer, Tasks
from evolver.kernels.machine import digest_of
from evolver.merging.materialise import StatisticTensors
from evolver.records.canonical import content_hash
from evolver.records.recipe import Cross, Statistic, ancestors
from evolver.storage.paths import expand
from evolver.workers.plan import CHAT, SCORING_PACKAGES, Plan
from evolver.workers.sampled import Advance, DevSample, at_a_time

# Keys of a task that change neither what a model reads nor in which batches.
NOT_READ = {"data", "report_data", "select", "select_data", "report", "report_task", "dev", "weight", "metric"}
# The same of the evaluation.
NOT_ASKED = {"tasks", "include_path", "early_stopping", "racing"}


def tasks_of(config: Config, tasks: Tasks, expert: str) -> list[str]:
    """The tasks on whose dev items an expert's statistics are collected, or on which it is the example: those that
    ``statistics.tasks`` names, or else its own, by name or by head; all tasks where it has none.
    """
    own = [e.task for e in tasks.entries if expert in (e.task, e.head)]
    return config.statistics.tasks.get(expert) or own or [e.task for e in tasks.entries]


def refuse_tasks(config: Config, tasks: Tasks, expert: str, wanted: Collector) -> None:
    """Raises BadInput where a task of an expert's items is scored in a way in which nothing can be collected."""
    if config.statistics.source == "random":
        _refuse_random(config, wanted)
        return
    own = tasks_of(config, tasks, expert)
    for number, entry in enumerate(tasks.entries):
        judge = tasks.judges[entry.task]
        if entry.task in own and not (judge.gives_examples(entry) if wanted.gradients else judge.tells_padding(entry)):
            lacks = (
                "does not say what the right answer to an item is in a forward pass, so there are no gradients and"
                if wanted.gradients
                else "does not say which positions of a batch are padding, so"
            )
            raise BadInput(
                f"evaluation.tasks[{number}]: {entry.task} is scored in a way that {lacks} no statistics of experts "
                "can be collected on it; choose a merge method without statistics, or name other tasks under "
                "statistics.tasks."
            )


def _refuse_random(config: Config, wanted: Collector) -> None:
    """Raises BadInput where nothing can be collected on random tokens."""
    if config.model.kind == "image-classifier":
        raise BadInput("statistics.source: an image classifier reads no tokens; write tasks.")
    if wanted.observed:
        raise BadInput(
            f"statistics.source: {wanted.name} needs items with right answers, and random tokens have none; write "
            "tasks."
        )


def sample(config: Config, tasks: Tasks, expert: str) -> list[int]:
    """The places of the dev items that an expert's statistics are collected on, in their order."""
    wanted = tasks_of(config, tasks, expert)
    places = [place for place, task in enumerate(tasks.scale("dev").tasks) if task in wanted]
    return places[: config.statistics.items]


def sample_hash(config: Config, tasks: Tasks, expert: str) -> str:
    """One hash for the items of ``sample``, in their order; or for the random tokens, which are the same for all."""
    if config.statistics.source == "random":
        return content_hash(["random tokens", config.statistics.items, config.seed])
    owners, items = tasks.scale("dev").tasks, tasks.items.dev
    return content_hash([[owners[place], items[place].hash] for place in sample(config, tasks, expert)])


class Statistics:
    """Gives a materialiser the statistics that a recipe asks for.

    Args:
        plan: of the run.
        tasks: of the run.
        model: gives the live model, whose weights are overwritten where something has to be collected.
        scorer: scores it on the dev items.

    Attributes:
        tokens: how many tokens went through the model for statistics of offspring, which belong to their cost.
    """

    def __init__(
        self, plan: Plan, tasks: Tasks, model: Callable[[], Any], scorer: Callable[[Any], SplitScorer]
    ) -> None:  # fmt: skip
        self._plan, self._tasks, self._model, self._scorer = plan, tasks, model, scorer
        self._samples: dict[str, str] = {}
        self.tokens = 0

    def __call__(self, node: Statistic, weights: Iterator[tuple[str, Tensor]]) -> StatisticTensors:
        """The tensors of a statistic.

        Args:
            weights: of the model, read only where the statistic has to be collected.

        Raises BadInput for a statistic of other items than those of the run.
        """
        places, (file, key) = self._places(node), self._file(node)
        try:
            kept = open_kept(file, key)
        except Damaged as error:
            _say(f"statistics: {file} is damaged ({error}); {node.collected} of {node.of.label} is collected again")
            kept = None
        return kept or self._collect(node, weights, places, file, key)

    def kept(self, node: Statistic) -> Path | None:
        """The file that a statistic is kept in; None where there is none that is whole."""
        file, key = self._file(node)
        try:
            return file if open_kept(file, key) else None
        except Damaged:
            return None

    def _file(self, node: Statistic) -> tuple[Path, str]:
        """The file of a statistic, and what it is sealed for."""
        key = self._key(node, collector_named(node.collected))
        return Path(expand("$EVOLVER_CACHE")) / "statistics" / f"{key}.safetensors", key

    def _places(self, node: Statistic) -> Sequence[int]:
        """The places of the dev items of which a statistic names the hash."""
        config = self._plan.config
        for name in (*config.experts, "base"):
            if name not in self._samples:
                self._samples[name] = sample_hash(config, self._tasks, name)
            if self._samples[name] == node.items:
                return sample(config, self._tasks, name)
        raise BadInput(f"statistics: {node.describe()} was collected on other items than those of this run.")

    def _items(self, node: Statistic, live: LiveModel, places: Sequence[int]) -> DevSample | RandomTokens:
        config, name = self._plan.config, f"statistics: {node.collected} of {node.of.label}"
        if config.statistics.source == "random":
            apart = config.model.heads == "apart"
            head = _head(node, config) if apart else None
            count = config.statistics.items
            return RandomTokens(live, count, config.seed, head, Advance(name, count, _say))
        most = at_a_time(live, self._plan.block("dev", len(places)))
        return DevSample(self._scorer(live), places, most, Advance(name, len(places), _say))

    def _collect(
        self, node: Statistic, weights: Iterator[tuple[str, Tensor]], places: Sequence[int], file: Path, key: str
    ) -> StatisticTensors:
        began, config = time.perf_counter(), self._plan.config
        torch.set_num_threads(config.evaluation.threads)
        live: LiveModel = self._model()
        live.write(weights, whole=True)
        items = self._items(node, live, places)
        found = dict(collector_named(node.collected).collect(live, items))
        if any(isinstance(model, Cross) for model in ancestors(node.of)):
            self.tokens += items.tokens
        seconds, on = time.perf_counter() - began, f"{len(places)} dev items"
        if config.statistics.source == "random":
            on = f"{config.statistics.items} texts of random tokens"
        _say(f"statistics: {node.collected} of {node.of.label} collected on {on} in {seconds:.1f} s")
        try:
            write_kept(file, key, found)
            return open_kept(file, key) or found  # mapped from there, it takes no memory
        except OSError as error:
            _say(f"statistics: {file} cannot be written ({error.strerror or error}); the next call collects them again")
            return found

    def _key(self, node: Statistic, collector: Collector) -> str:
        """All that decides the bytes: what was collected of which weights, how the model reads items and computes."""
        config = self._plan.config
        asked = config.evaluation.model_dump(mode="json", exclude=NOT_ASKED)
        tasks = [t.model_dump(mode="json", exclude=NOT_READ) for t in config.evaluation.tasks]
        model = config.model.model_dump(mode="json", exclude={"base", "chat_template", "tokenizer"})
        versions = {p: importlib.metadata.version(p) for p in SCORING_PACKAGES}
        # The items of both splits: none of them serves as an example in a prompt.
        run = [self._plan.digests["base"], dict(self._plan.items), config.seed]
        run += [self._plan.digests[CHAT]] if CHAT in self._plan.digests else []
        code = digest_of(inspect.getfile(collector.collect))  # another version may collect something else
        return content_hash([node.id, code, asked, tasks, model, versions, run])


def _head(node: Statistic, config: Config) -> str:
    """The expert whose classification head answers; where it is another model's statistic, the first one's."""
    return node.of.label if node.of.label in config.experts else next(iter(config.experts))


def _say(line: str) -> None:
    """Workers have no display; what they write here stands in the terminal, or in the logs of their node."""
    sys.stderr.write(line + "\n")
