"""Language models, scored on lm-eval tasks.

lm-eval says what a task is: its documents, prompts, choices, filters and metrics. Its requests and tokens are built
once; for each candidate only the forward passes run.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.filters import build_filter_ensemble
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from evolver.config import Config, TaskEntry, expand
from evolver.errors import BadInput, nearest
from evolver.evaluation.items import Item, Items, draw, in_order, item_hash
from evolver.evaluation.live import LiveModel
from evolver.evaluation.loglikelihood import Group, LogLikelihoods
from evolver.evaluation.metrics import ENDLESS, JUDGED
from evolver.evaluation.scoring import Scale
from evolver.records import Split

# Metrics whose items lie between 0 and 1, so that one can say what an unscored item could at most add.
UNIT_METRICS = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"}


class LanguageTasks:
    """lm-eval tasks by name, their items drawn, no model needed yet."""

    def __init__(self, config: Config) -> None:
        self.settings, self.seed = config.evaluation, config.seed
        self._documents: dict[str, list[Any]] = {}
        self.tasks = self._load()
        drawn = [self._draw(i, entry) for i, entry in enumerate(self.settings.tasks)]
        self.items = Items(
            in_order((i for d in drawn for i in d.dev), self.seed),
            in_order((i for d in drawn for i in d.report), self.seed),
        )

    def scale(self, split: Split) -> Scale:
        entries = {_task_of(e, split): e for e in self.settings.tasks}
        tasks = tuple(entries[i.task].task for i in self.items.of(split))
        unit = {e.task: e.metric.partition(",")[0] in UNIT_METRICS for e in self.settings.tasks}
        metrics = {task: JUDGED if u else ENDLESS for task, u in unit.items()}
        return Scale(tasks, {e.task: e.weight for e in self.settings.tasks}, metrics)

    def scorer(self, model: LiveModel, split: Split) -> LanguageScorer:
        entries = {_task_of(e, split): e for e in self.settings.tasks}
        chosen = self.items.of(split)
        with _quiet():
            lm = _Tokenising(pretrained=model.module, tokenizer=model.tokenizer, batch_size=1)
        requests: dict[Item, list[Instance]] = {}
        for name in entries:
            requests |= self._requests(name, [i for i in chosen if i.task == name], lm)
        prepared = [_Prepared(self.tasks[i.task], entries[i.task].metric, requests[i]) for i in chosen]
        return LanguageScorer(model, lm, prepared, self.settings.batch_tokens)

    def _load(self) -> dict[str, Task]:
        names = [n for e in self.settings.tasks for n in (e.task, e.report_task) if n]
        own = expand(self.settings.include_path) if self.settings.include_path else None
        if own and not Path(own).is_dir():
            raise BadInput(f"evaluation.include_path: there is no folder {own}; give the folder of your task files.")
        with _quiet():
            # Indexing the whole library takes seconds: do so only for names that the user's own folder lacks.
            manager = TaskManager(include_path=own, include_defaults=False) if own else None
            if manager is None or any(n not in manager.all_tasks for n in names):
                manager = TaskManager(include_path=own)
            for number, entry in enumerate(self.settings.tasks):
                for key, name in (("task", entry.task), ("report_task", entry.report_task)):
                    if name and name not in manager.all_subtasks:
                        raise BadInput(f"evaluation.tasks[{number}].{key}: {_unknown(name, manager)}")
            tasks: dict[str, Task] = {}
            for name in sorted(set(names)):
                try:
                    tasks |= manager.load([name])["tasks"]
                except Exception as error:  # data sets come from files, hubs and scripts; each fails in its own way
                    reason = " ".join(str(error).split())[:300]
                    raise BadInput(
                        f"evaluation.tasks: the data of {name!r} cannot be loaded ({type(error).__name__}: {reason}); "
                        "check its data files, or the network for a data set of a hub."
                    ) from error
        for task in tasks.values():
            if self.settings.num_fewshot is not None:
                task.set_config("num_fewshot", self.settings.num_fewshot)
        return tasks

    def _draw(self, number: int, entry: TaskEntry) -> Items:
        key = f"evaluation.tasks[{number}]"
        for name in {entry.task, entry.report_task or entry.task}:
            _check_metric(self.tasks[name], entry.metric, f"{key}.metric")
        report = self._items(entry.report_task, f"{key}.report_task") if entry.report_task else None
        return draw(entry, self._items(entry.task, f"{key}.task"), report, self.seed, key)

    def _items(self, name: str, key: str) -> list[Item]:
        if name not in self._documents:
            try:
                self._documents[name] = list(self.tasks[name].eval_docs)
            except ValueError as error:
                raise BadInput(f"{key}: {name} has no test or validation documents ({error}).") from error
        return [Item(name, i, item_hash(d)) for i, d in enumerate(self._documents[name])]

    def _requests(self, name: str, items: Sequence[Item], lm: HFLM) -> dict[Item, list[Instance]]:
        if not items:
            return {}
        task, in_place = self.tasks[name], sorted(items, key=lambda i: i.index)
        chat = self.settings.apply_chat_template
        if chat and not lm.tokenizer.chat_template:
            raise BadInput("evaluation.apply_chat_template: the base's tokenizer has no chat template; write false.")
        task.set_fewshot_seed(self.seed)  # at every build: each draws on, and must not depend on the builds before it
        with _quiet():
            task.build_all_requests(
                samples=[i.index for i in in_place],
                system_instruction=self.settings.system_instruction,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                chat_template=lm.apply_chat_template if chat else None,
                tokenizer_name=lm.tokenizer_name if chat else "",
            )
        grouped: dict[Item, list[Instance]] = {i: [] for i in in_place}
        for instance in task.instances:
            # lm-eval numbers the chosen documents by position among themselves, in the order of the data set.
            grouped[in_place[instance.doc_id or 0]].append(instance)
        return grouped


class _Prepared:
    """One item, ready to be scored: its requests, and how lm-eval turns their answers into a number."""

    def __init__(self, task: Task, metric: str, requests: list[Instance]) -> None:
        self.task, self.requests = task, requests
        self.metric, _, self.filter = metric.partition(",")
        self.ensembles = list(_filters(task))
        self.filter = self.filter or self.ensembles[0].name

    def value(self, answers: Sequence[Any]) -> float:
        for request, answer in zip(self.requests, answers, strict=True):
            request.resps, request.filtered_resps = [answer], {}
        for ensemble in self.ensembles:
            ensemble.apply(self.requests)
        outcome = self.task.process_results(
            self.requests[0].doc, [r.filtered_resps[self.filter] for r in self.requests]
        )
        return float(outcome[self.metric])


class LanguageScorer:
    """Scores the live model on prepared items."""

    def __init__(self, model: LiveModel, lm: _Tokenising, items: Sequence[_Prepared], batch_tokens: int) -> None:
        self.items, self.lm = items, lm
        self._groups = [lm.tokens(p.requests) if p.requests[0].request_type == "loglikelihood" else None for p in items]
        self._forward = LogLikelihoods(model, batch_tokens, lm.max_length)

    def score(self, start: int, stop: int) -> list[float]:
        answers: dict[int, Sequence[Any]] = {}
        groups = {i: g for i in range(start, stop) if (g := self._groups[i]) is not None}
        answers.update(self._forward(groups))
        for kind in ("generate_until", "loglikelihood_rolling"):
            chosen = [i for i in range(start, stop) if self.items[i].requests[0].request_type == kind]
            if chosen:
                requests = [self.items[i].requests[0] for i in chosen]
                with _quiet():
                    said = getattr(self.lm, kind)(requests, disable_tqdm=True)
                answers.update({i: [answer] for i, answer in zip(chosen, said, strict=True)})
        return [self.items[i].value(answers[i]) for i in range(start, stop)]


class _Tokenising(HFLM):  # type: ignore[misc]  # lm-eval ships no types
    """lm-eval's own wrapper of a model, asked for the tokens of requests instead of their likelihoods."""

    def tokens(self, requests: Sequence[Instance]) -> Group:
        with _quiet():
            pairs = self.loglikelihood(list(requests), disable_tqdm=True)
        return Group(tuple(pairs))

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        return [(tuple(context), tuple(continuation)) for _, context, continuation in requests]


def _filters(task: Task) -> Iterator[Any]:
    configured = task.config.filter_list
    if not configured:
        yield build_filter_ensemble("none", [("take_first", None)])
        return
    for pipeline in configured:
        steps = [(f["function"], {k: v for k, v in f.items() if k != "function"}) for f in pipeline["filter"]]
        yield build_filter_ensemble(pipeline["name"], steps)


def _task_of(entry: TaskEntry, split: Split) -> str:
    return (split == "report" and entry.report_task) or entry.task


def _check_metric(task: Task, spelled: str, key: str) -> None:
    name, _, chosen = spelled.partition(",")
    known: Mapping[str, Any] = task.aggregation()
    if name not in known:
        raise BadInput(f"{key}: {task.task_name} has no metric {name!r}; {nearest(name, known)}")
    filters = [f.name for f in _filters(task)]
    if chosen and chosen not in filters:
        raise BadInput(f"{key}: {task.task_name} has no filter {chosen!r}; {nearest(chosen, filters)}")
    if getattr(known[name], "__name__", "") != "mean":
        means = [m for m, f in known.items() if getattr(f, "__name__", "") == "mean"]
        raise BadInput(f"{key}: {name} is no mean over items, and a search needs one; usable here: {', '.join(means)}.")
    if not task.higher_is_better()[name]:
        raise BadInput(f"{key}: of {name} less is better; name a metric of which more is better.")


def _unknown(name: str, manager: TaskManager) -> str:
    if name in manager.all_groups or name in manager.all_tags:
        return f"{name!r} is a group of tasks; name the tasks in it one by one, each with its items."
    return f"unknown lm-eval task {name!r}; {nearest(name, manager.all_subtasks)}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
