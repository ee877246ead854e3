"""Loads tasks from lm-eval's library: checks names, opens groups, applies settings and finds out what metrics mean."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lm_eval.api import metrics as theirs
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.filters import build_filter_ensemble
from lm_eval.tasks import TaskManager

from evolver.config.evaluation import EvaluationSettings, TaskEntry
from evolver.errors import BadInput, nearest
from evolver.evaluation.language import corpus
from evolver.evaluation.language.index import Index, manager_of
from evolver.evaluation.language.written import ANSWER_LIMITS, check_generation
from evolver.evaluation.scores import metrics
from evolver.evaluation.scores.metrics import Metric
from evolver.records import ItemAnswer
from evolver.storage.paths import expand

# Metrics whose items lie between 0 and 1, so that the most that an unscored item can add is known.
UNIT_METRICS = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"}
# Builders of the datasets library that read the user's own files.
LOCAL_BUILDERS = {"json", "csv", "parquet", "text", "arrow"}

# The form of what lm-eval passes to its aggregation for an item: "value" is a number, "said" a pair (right answer,
# answer), "weighed" a pair (log-likelihood, number of words or bytes), "written" a pair of texts (references, answer),
# "sure" a pair (right answer, probabilities of all options).
Kept = Literal["value", "said", "weighed", "written", "sure"]


@dataclass(frozen=True)
class Meaning:
    """How a metric of lm-eval is computed here.

    Attributes:
        metric: the metric over the answers.
        kept: the form of lm-eval's outcome for an item, which says what part of it is the answer.
    """

    metric: Metric
    kept: Kept = "value"

    def answer(self, outcome: Any) -> ItemAnswer:
        """The answer to an item, from lm-eval's outcome for it.

        Raises ValueError for the score of an item outside of 0 to 1 where the metric lies there.
        """
        match self.kept:
            case "value":
                return self._judged(float(outcome))
            case "written":
                return corpus.counted(self.metric.name, *outcome)
            case "sure":
                return -corpus.brier(*outcome)
        return float(outcome[1] if self.kept == "said" else outcome[0])

    def _judged(self, value: float) -> float:
        if math.isnan(value):
            raise ValueError("an item has no score (NaN), and a mean without such items cannot be computed here")
        if not self.metric.judged:
            return value
        if self.metric.share and not 0.0 <= value <= 1.0:
            raise ValueError(
                f"process_results gave an item the score {value:g}, and a metric of this name lies between 0 and 1; "
                "give the metric another name in the task's file"
            )
        return -value if self.metric.negative else value

    def right(self, outcome: Any) -> float:
        """The right answer, or the item's number of words or bytes, from lm-eval's outcome for the item."""
        return float(outcome[0] if self.kept == "said" else outcome[1])


# By the name of lm-eval's aggregation: the meaning if higher values are better, and the one if lower values are better.
# None: no such metric can be computed here.
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
    "bleu": (Meaning(Metric("bleu", metrics.bleu, counts=10), "written"), None),
    "chrf": (Meaning(Metric("chrf", metrics.chrf, counts=18), "written"), None),
    "chrfpp": (Meaning(Metric("chrf++", metrics.chrf, counts=24), "written"), None),
    "ter": (None, Meaning(Metric("ter", metrics.ter, 0.0, negative=True, counts=2), "written")),
    "brier_score": (None, Meaning(Metric("mean", metrics.mean, 0.0, judged=True, negative=True), "sure")),
}


class Library:
    """The loaded lm-eval tasks of a configuration.

    Args:
        settings: the section ``evaluation`` of the configuration.
        entries: the tasks of the configuration, by their index in ``evaluation.tasks``.

    Attributes:
        tasks: lm-eval's tasks by name.
        members: the names of lm-eval's tasks for each entry and each ``report_task``; a group has several.
        groups: lm-eval's groups by name, with those inside of others.

    Raises BadInput for unknown names, data that cannot be loaded, tasks that need more than text, and tasks that run
    generated code where the configuration does not allow it.
    """

    def __init__(self, settings: EvaluationSettings, entries: Mapping[int, TaskEntry]) -> None:
        self.settings = settings
        self.tasks: dict[str, Task] = {}
        self.members: dict[str, list[str]] = {}
        self.groups: dict[str, Group] = {}
        self._check_settings(entries)
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
        """How the metric of an entry is computed.

        Args:
            key: the key of the configuration that errors name.

        Raises BadInput for a metric that one of the entry's tasks lacks, on which they do not agree, or whose
        aggregation is none that is known here.
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
        """Whether the items of a task come from the test set of a public benchmark."""
        config = self.tasks[name].config
        path = config.dataset_path or ""
        own = config.custom_dataset is not None or path in LOCAL_BUILDERS or Path(path).exists()
        return not own and bool(self.tasks[name].has_test_docs())

    def _check_settings(self, entries: Mapping[int, TaskEntry]) -> None:
        resident = self.settings.backend == "resident"
        check_generation(self.settings.gen_kwargs or {}, "evaluation.gen_kwargs", resident)
        for number, entry in entries.items():
            given = {**(self.settings.gen_kwargs or {}), **(entry.gen_kwargs or {})}
            check_generation(given, f"evaluation.tasks[{number}].gen_kwargs", resident)

    def generates(self) -> bool:
        """Whether any task wants generated answers."""
        return any(task.OUTPUT_TYPE == "generate_until" for task in self.tasks.values())

    def _add(self, name: str, key: str, manager: TaskManager, spec: str | dict[str, Any]) -> None:
        try:
            loaded = manager.load([spec])
        except Exception as error:  # data sets come from files, hubs and scripts; each fails in its own way
            cause = error.__cause__ or error  # the `datasets` library says in its own error only that there was one
            reason = " ".join(str(cause).split())[:300]
            raise BadInput(
                f"{key}: the data of {name!r} cannot be loaded ({type(cause).__name__}: {reason}); "
                "check its data files, and for a data set of the hub also the network."
            ) from error
        found: dict[str, Task] = loaded["tasks"]
        if not found:
            raise BadInput(f"{key}: {name!r} is a group without tasks; name another one.")
        self.members[name] = list(found)
        self.tasks |= found
        self.groups |= loaded["groups"]

    def _add_passages(self, entry: TaskEntry, key: str) -> None:
        """Add the user's own texts as a task of lm-eval that asks for their log-likelihoods."""
        if entry.data is None:
            return
        from evolver.evaluation.language.passages import passages

        for part, suffix in {"data": "", "select_data": "_select", "report_data": "_report"}.items():
            if (data := getattr(entry, part)) is not None:
                name = f"{entry.task}{suffix}"
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
            # As in lm-eval, a task that sets num_fewshot to 0 itself keeps it.
            if own is None or (shots is not None and own != 0):
                task.set_config("num_fewshot", shots or 0)
            given = {**(self.settings.gen_kwargs or {}), **(entry.gen_kwargs or {})}
            if entry.gen_kwargs and task.OUTPUT_TYPE != "generate_until":
                raise BadInput(
                    f"{key}.gen_kwargs: {task.task_name} asks for likelihoods and generates no answer, so these "
                    "settings would do nothing; leave the key out."
                )
            self._refuse_hidden_limit(given, task, key)
            if given and task.OUTPUT_TYPE == "generate_until":
                task.set_config("generation_kwargs", given, update=True)
            _check_limits(task, key)

    def _refuse_hidden_limit(self, given: Mapping[str, Any], task: Task, key: str) -> None:
        """Raises BadInput for a limit of answers that lm-eval passes over, as the task has one under another name."""
        name = next((n for n in ANSWER_LIMITS if given.get(n) is not None), ANSWER_LIMITS[0])
        own = task.get_config("generation_kwargs") or {}
        if any(own.get(n) is not None for n in ANSWER_LIMITS[: ANSWER_LIMITS.index(name)]):
            raise BadInput(
                f"{key}.gen_kwargs.{name}: {task.task_name} says max_gen_toks itself, which counts before {name}; "
                "write max_gen_toks."
            )


def _check_limits(task: Task, key: str) -> None:
    """Raises BadInput where the task's own file limits its answers to something that is no number of tokens."""
    for name in ANSWER_LIMITS:
        limit = (task.get_config("generation_kwargs") or {}).get(name)
        try:
            int(0 if limit is None else limit)
        except (TypeError, ValueError, OverflowError):
            raise BadInput(
                f"{key}.task: {task.task_name} has the {name} {limit!r} in its generation_kwargs; write a number of "
                "tokens there."
            ) from None


def filters(task: Task) -> Iterator[Any]:
    """New instances of the filter pipelines that a task's configuration names."""
    configured = task.config.filter_list
    if not configured:
        yield build_filter_ensemble("none", [("take_first", None)])
        return
    for pipeline in configured:
        steps = [(f["function"], {k: v for k, v in f.items() if k != "function"}) for f in pipeline["filter"]]
        yield build_filter_ensemble(pipeline["name"], steps)


def metric_name(spelled: str) -> tuple[str, str]:
    """The metric and the filter in lm-eval's notation ``metric,filter``; the filter is empty where none is named."""
    name, _, chosen = spelled.partition(",")
    return name, chosen


def _named(entries: Mapping[int, TaskEntry]) -> Iterator[tuple[str, str]]:
    """The names of lm-eval tasks in a configuration, each after the key under which it stands."""
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
            f"{key}: how {name} is computed over all items is not known here, only lm-eval's own ways are; "
            f"usable here: {', '.join(usable) or f'none, so leave out {task.task_name}'}."
        )
    return Meaning(metrics.JUDGED) if name in UNIT_METRICS and found.metric == metrics.ENDLESS else found


def _spelled(aggregation: Any) -> str:
    """The name of one of lm-eval's aggregations; empty for a function of a task's own, whatever its name is."""
    if isinstance(aggregation, str):
        return aggregation
    name = str(getattr(aggregation, "__name__", ""))
    return name if getattr(theirs, name, None) is aggregation else ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the progress bars and messages of lm-eval and datasets, which would hide Evolver's own lines."""
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
