"""Language models, scored on tasks of lm-eval.

lm-eval says what a task is: its documents, prompts, choices, filters and metrics. Its requests and tokens are built
once; for each candidate only the forward passes run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance

from evolver.config import Config, TaskEntry
from evolver.errors import BadInput
from evolver.evaluation.base import AskedItem, Scorer, judge
from evolver.evaluation.items import Item, item_hash
from evolver.evaluation.language.library import Library, Meaning
from evolver.evaluation.language.requests import PreparedRequests, build_requests, right
from evolver.evaluation.live import LiveModel
from evolver.evaluation.scores.metrics import Metric
from evolver.records import Split

if TYPE_CHECKING:
    from evolver.evaluation.language.launched import LaunchedModel


@judge("language", "report_task", "num_fewshot", "gen_kwargs", "data", "report_data", "text")
class Language:
    """The judge of lm-eval's tasks and groups, and of the user's own texts."""

    def __init__(self, config: Config, numbers: Sequence[int]) -> None:
        self.settings, self.seed = config.evaluation, config.seed
        entries = {n: config.evaluation.tasks[n] for n in numbers}
        self._keys = {e.task: f"evaluation.tasks[{n}]" for n, e in entries.items()}
        self.library = Library(config.evaluation, entries)
        self._meanings: dict[str, Meaning] = {}
        self._documents: dict[str, list[Any]] = {}
        self.warnings = [_seen(e.task) for e in entries.values() if self._searches_test_set(e)]

    def items(self, entry: TaskEntry, split: Split) -> list[Item] | None:
        name = entry.task if split == "dev" else entry.report_task
        if split == "report" and entry.report_data is not None:
            name = f"{entry.task}_report"
        if name is None:
            return None
        return [item for member in self.library.members[name] for item in self._items(member, self._keys[entry.task])]

    def metric(self, entry: TaskEntry) -> Metric:
        return self._meaning(entry).metric

    def right(self, asked: AskedItem) -> float:
        task = self.library.tasks[asked.item.task]
        document = self._documents[asked.item.task][asked.item.index]
        return right(task, document, asked.entry.metric, self._meaning(asked.entry))

    def scorer(self, model: LiveModel | LaunchedModel, asked: Sequence[AskedItem], scored: Iterable[Item]) -> Scorer:
        hashes = {i.hash for i in scored}

        def prepare(lm: Any) -> list[PreparedRequests]:
            requests: dict[Item, list[Instance]] = {}
            for name in dict.fromkeys(a.item.task for a in asked):
                items = [a.item for a in asked if a.item.task == name]
                requests |= build_requests(self.library.tasks[name], items, hashes, self.settings, lm, self.seed)
            return [
                PreparedRequests(
                    self.library.tasks[a.item.task], a.entry.metric, self._meaning(a.entry), requests[a.item]
                )
                for a in asked
            ]  # fmt: skip

        if isinstance(model, LiveModel):
            from evolver.evaluation.language.resident import (
                resident,  # it brings Transformers' models: to check needs none
            )

            return resident(model, prepare, self.settings, self.seed)
        from evolver.evaluation.language.launched import LaunchedScorer

        return LaunchedScorer(model, prepare)

    def _meaning(self, entry: TaskEntry) -> Meaning:
        if entry.task not in self._meanings:
            self._meanings[entry.task] = self.library.meaning(entry, f"{self._keys[entry.task]}.metric")
        return self._meanings[entry.task]

    def _items(self, name: str, key: str) -> list[Item]:
        if name not in self._documents:
            try:
                self._documents[name] = list(self.library.tasks[name].eval_docs)
            except ValueError as error:
                raise BadInput(f"{key}: {name} has no test or validation documents ({error}).") from error
        return [Item(name, i, item_hash(d)) for i, d in enumerate(self._documents[name])]

    def _searches_test_set(self, entry: TaskEntry) -> bool:
        return any(self.library.is_test_set(n) for n in self.library.members[entry.task])


def _seen(name: str) -> str:
    return (
        f"the dev items of {name} come from the test set of a public benchmark: the search selects on it, so no score "
        "on it is one of unseen items any more; take dev items from its training or validation set, for example by a "
        "task of your own, and name this one as report_task"
    )
