"""lm-eval's library of tasks: names checked, groups opened, settings applied, metrics understood."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.filters import build_filter_ensemble
from lm_eval.tasks import TaskManager

from evolver.config import EvaluationSettings, TaskEntry
from evolver.errors import BadInput, nearest
from evolver.evaluation.language.index import Index, manager_of
from evolver.evaluation.scores import metrics
from evolver.evaluation.scores.metrics import Metric
from evolver.storage.paths import expand

# Metrics whose items lie between 0 and 1, so that one can say what an unscored item could at most add.
UNIT_METRICS = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"}
# Builders of the datasets library that read files of the user's.
LOCAL_BUILDERS = {"json", "csv", "parquet", "text", "arrow"}

# What lm-eval hands its aggregation for an item: a value, (right, said), or (log-likelihood, count).
Kept = Literal["value", "said", "weighed"]


@dataclass(frozen=True)
class Meaning:
    """What a metric of lm-eval is to us: which part of an item's outcome is its answer, and how answers add up."""

    metric: Metric
    kept: Kept = "value"

    def answer(self, outcome: Any) -> float:
        """The item's answer."""
        if self.kept == "value":
            value = float(outcome)
            return -value if self.metric.judged and self.metric.negative else value
        return float(outcome[1] if self.kept == "said" else outcome[0])

    def right(self, outcome: Any) -> float:
        """What the answer is held against: the right one, or the item's count of words or bytes."""
        return float(outcome[0] if self.kept == "said" else outcome[1])


# By the name of lm-eval's aggregation: more is better, less is better.
MEANINGS: dict[str, tuple[Meaning | None, Meaning | None]] = {
    "mean": (Meaning(metrics.ENDLESS), Meaning(metrics.ERRORS)),
    "nanmean": (Meaning(metrics.ENDLESS), Meaning(metrics.ERRORS)),
    "median": (
        Meaning(Metric("median", metrics.median_item, None)),
        Meaning(Metric("median", metrics.opposite, None, negative=True)),
    ),
    "perplexity": (None, Meaning(Metric("perplexity", metrics.perplexity, -1.0, negative=True))),
    "weighted_perplexity": (
        None,
        Meaning(Metric("weighted_perplexity", metrics.weighted_perplexity, -1.0, negative=True), "weighed"),
    ),
    "bits_per_byte": (None, Meaning(Metric("bits_per_byte", metrics.bits_per_byte, 0.0, negative=True), "weighed")),
    "f1_score": (Meaning(Metric("f1", metrics.binary_f1), "said"), None),
    "matthews_corrcoef": (Meaning(Metric("mcc", metrics.mcc), "said"), None),
}


class Library:
    """The lm-eval tasks of some entries, loaded.

    Args:
        settings: of the evaluation.
        entries: by their place in the configuration.

    Attributes:
        members: the tasks behind the name of each entry (a group has many), and of each ``report_task``.
        groups: by name; those inside of others, too.

    Raises BadInput for unknown names, groups that share a task, data that cannot be loaded, tasks that need more than
    text, and tasks that run code where that is not allowed.
    """

    def __init__(self, settings: EvaluationSettings, entries: Mapping[int, TaskEntry]) -> None:
        self.settings = settings
        self.tasks: dict[str, Task] = {}
        self.members: dict[str, list[str]] = {}
        self.groups: dict[str, Group] = {}
        with quiet():
            names = {name: key for key, name in _named(entries)}
            if names:
                manager = _manager(settings.include_path, names)
            for name, key in names.items():
                self._add(name, key, manager, name)
            for number, entry in entries.items():
                self._add_passages(entry, f"evaluation.tasks[{number}]")
        for number, entry in entries.items():
            for name in {entry.task, entry.report_task or entry.task}:
                self._configure(entry, self.members[name], f"evaluation.tasks[{number}]")

    def meaning(self, entry: TaskEntry, key: str) -> Meaning:
        """What the entry's metric is.

        Raises BadInput for one that a member lacks, or of which no number can be made from item to item.
        """
        found = [_meaning(self.tasks[n], entry.metric, key) for n in self.members[entry.task]]
        for name in self.members.get(entry.report_task or "", []):
            found.append(_meaning(self.tasks[name], entry.metric, key))
        if any(f != found[0] for f in found):
            raise BadInput(
                f"{key}: the tasks of {entry.task} do not agree on what {entry.metric} is; name another one."
            )
        return found[0]

    def by_size(self, name: str, spelled: str) -> bool:
        """Whether a group weighs the metrics of its tasks by the numbers of their items; yes where it does not say."""
        group = self.groups.get(name)
        wanted, chosen = metric_name(spelled)
        for aggregation in (group.aggregate_metric_list if group else None) or ():
            named = aggregation.filter_list
            if aggregation.metric == wanted and (not chosen or named is None or chosen in named):
                return bool(aggregation.weight_by_size)
        return True

    def is_test_set(self, name: str) -> bool:
        """Whether the items of a task are the test set of a public benchmark."""
        config = self.tasks[name].config
        path = config.dataset_path or ""
        own = config.custom_dataset is not None or path in LOCAL_BUILDERS or Path(path).exists()
        return not own and bool(self.tasks[name].has_test_docs())

    def _add(self, name: str, key: str, manager: TaskManager, spec: str | dict[str, Any]) -> None:
        try:
            loaded = manager.load([spec])
        except Exception as error:  # data sets come from files, hubs and scripts; each fails in its own way
            reason = " ".join(str(error).split())[:300]
            raise BadInput(
                f"{key}: the data of {name!r} cannot be loaded ({type(error).__name__}: {reason}); "
                "check its data files, or the network for a data set of a hub."
            ) from error
        found: dict[str, Task] = loaded["tasks"]
        if not found:
            raise BadInput(f"{key}: {name!r} is a group that holds no task; name another one.")
        self.members[name] = list(found)
        self.tasks |= found
        self.groups |= loaded["groups"]

    def _add_passages(self, entry: TaskEntry, key: str) -> None:
        """Texts of the user's as a task of lm-eval that asks for their log-likelihoods."""
        if entry.data is None:
            return
        from evolver.evaluation.language.passages import passages

        for name, data in ((entry.task, entry.data), (f"{entry.task}_report", entry.report_data)):
            if data is not None:
                part = "data" if data is entry.data else "report_data"
                config = passages(name, data, entry.text, f"{key}.{part}")
                self._add(name, key, TaskManager(include_defaults=False), config)

    def _configure(self, entry: TaskEntry, names: list[str], key: str) -> None:
        for task in (self.tasks[n] for n in names):
            if getattr(task, "MULTIMODAL", False):
                raise BadInput(f"{key}.task: {task.task_name} needs images or sound, and only text can be scored here.")
            if getattr(task, "UNSAFE_CODE", False) and not self.settings.confirm_run_unsafe_code:
                raise BadInput(
                    f"{key}.task: {task.task_name} runs code that the model writes; if you accept that on this "
                    "machine, set evaluation.confirm_run_unsafe_code to true."
                )
            shots = entry.num_fewshot if entry.num_fewshot is not None else self.settings.num_fewshot
            own = task.get_config("num_fewshot")
            # As lm-eval does: a task that says 0 itself is not asked for more.
            if own is None or (shots is not None and own != 0):
                task.set_config("num_fewshot", shots or 0)
            given = {**(self.settings.gen_kwargs or {}), **(entry.gen_kwargs or {})}
            if given and task.OUTPUT_TYPE == "generate_until":
                task.set_config("generation_kwargs", given, update=True)


def filters(task: Task) -> Iterator[Any]:
    """Fresh filter pipelines of a task, as it is configured."""
    configured = task.config.filter_list
    if not configured:
        yield build_filter_ensemble("none", [("take_first", None)])
        return
    for pipeline in configured:
        steps = [(f["function"], {k: v for k, v in f.items() if k != "function"}) for f in pipeline["filter"]]
        yield build_filter_ensemble(pipeline["name"], steps)


def metric_name(spelled: str) -> tuple[str, str]:
    """Metric and filter of lm-eval's spelling ``metric,filter``; the filter is empty where none is named."""
    name, _, chosen = spelled.partition(",")
    return name, chosen


def _named(entries: Mapping[int, TaskEntry]) -> Iterator[tuple[str, str]]:
    """Where names of lm-eval's stand, and which."""
    for number, entry in entries.items():
        if entry.data is None:
            yield f"evaluation.tasks[{number}].task", entry.task
        if entry.report_task:
            yield f"evaluation.tasks[{number}].report_task", entry.report_task


def _manager(include_path: str | None, names: Mapping[str, str]) -> TaskManager:
    own = expand(include_path) if include_path else None
    if own and not Path(own).is_dir():
        raise BadInput(f"evaluation.include_path: there is no folder {own}; give the folder of your task files.")
    manager = TaskManager(include_path=own, include_defaults=False) if own else None
    if manager is None or any(n not in manager.all_tasks for n in names):
        index = Index()
        manager = manager_of(names, own, index)
        for name, key in names.items():
            if name not in manager.all_tasks:
                known = {*index.names, *manager.all_tasks}
                raise BadInput(f"{key}: unknown lm-eval task {name!r}; {nearest(name, known)}")
    return manager


def _meaning(task: Task, spelled: str, key: str) -> Meaning:
    name, chosen = metric_name(spelled)
    known: Mapping[str, Any] = task.aggregation()
    if name not in known:
        raise BadInput(f"{key}: {task.task_name} has no metric {name!r}; {nearest(name, known)}")
    names = [f.name for f in filters(task)]
    if chosen and chosen not in names:
        raise BadInput(f"{key}: {task.task_name} has no filter {chosen!r}; {nearest(chosen, names)}")
    more, less = MEANINGS.get(_spelled(known[name]), (None, None))
    found = more if task.higher_is_better()[name] else less
    if found is None:
        usable = [m for m, f in known.items() if any(MEANINGS.get(_spelled(f), ()))]
        raise BadInput(
            f"{key}: {name} cannot be computed from one number an item; "
            f"usable here: {', '.join(usable) or f'none, so leave out {task.task_name}'}."
        )
    return Meaning(metrics.JUDGED) if name in UNIT_METRICS and found.metric == metrics.ENDLESS else found


def _spelled(aggregation: Any) -> str:
    return aggregation if isinstance(aggregation, str) else getattr(aggregation, "__name__", "")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's and the data library's progress bars and notes, which would bury our own lines."""
    noisy = [logging.getLogger(n) for n in ("lm_eval", "lm-eval", "datasets")]
    levels = [n.level for n in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
