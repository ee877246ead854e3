"""Language models, scored on tasks of lm-eval.

lm-eval says what a task is: its documents, prompts, choices, filters and metrics. Its requests and tokens are built
once; for each candidate only the forward passes run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance

from evolver.config import Config
from evolver.config.evaluation import EvaluationSettings, TaskEntry
from evolver.errors import BadInput, cause_of
from evolver.evaluation.base import AskedItem, ItemText, Scorer, judge
from evolver.evaluation.items import Item, item_hash
from evolver.evaluation.language.library import Library, Meaning
from evolver.evaluation.language.requests import (
    PreparedRequests,
    build_requests,
    check_chat_template,
    item_text,
    keep_apart,
    right,
)
from evolver.evaluation.live import LiveModel
from evolver.evaluation.scores.metrics import Metric
from evolver.records import Split

if TYPE_CHECKING:
    from evolver.evaluation.blueprint import Blueprint, ModelFolder
    from evolver.evaluation.language.launched import LaunchedModel


# Items of each task whose prompts are built before a run, to see whether they can be.
LOOKED_AT = 8


@judge("language", "report_task", "num_fewshot", "gen_kwargs", "data", "select_data", "report_data", "text")
class Language:
    """The judge of lm-eval's tasks and groups, and of the user's own texts."""

    def __init__(self, config: Config, numbers: Sequence[int]) -> None:
        self.settings, self.seed = config.evaluation, config.seed
        self._named = config.model.chat_template not in ("auto", "base")
        entries = {n: config.evaluation.tasks[n] for n in numbers}
        self._keys = {e.task: f"evaluation.tasks[{n}]" for n, e in entries.items()}
        self.library = Library(config.evaluation, entries)
        self._meanings: dict[str, Meaning] = {}
        self._documents: dict[str, list[Any]] = {}
        self.example_pool: set[str] = set()
        self.warnings = [_seen(e.task) for e in entries.values() if self._searches_test_set(e)]
        self.warnings += _without_effect(config.evaluation, self.library)

    def items(self, entry: TaskEntry, split: Split) -> list[Item] | None:
        own = {"dev": entry.data, "select": entry.select_data, "report": entry.report_data}[split]
        name = {"dev": entry.task, "select": None, "report": entry.report_task}[split]
        if split != "dev" and own is not None:
            name = f"{entry.task}_{split}"
        if name is None:
            return None
        return [item for member in self.library.members[name] for item in self._items(member, self._keys[entry.task])]

    def metric(self, entry: TaskEntry) -> Metric:
        return self._meaning(entry).metric

    def shares(self, entry: TaskEntry, split: Split, sizes: Mapping[str, int]) -> Mapping[str, float] | None:
        """As lm-eval adds up a group: the mean of its tasks' metrics, each as heavy as its items or as any other."""
        name = entry.report_task if split == "report" and entry.report_task else entry.task
        members = self.library.members[name]
        by_size = self.library.by_size(name, entry.metric)
        if len(members) < 2 or (by_size and self._meaning(entry).metric.judged):
            return None
        if by_size:
            return {member: sizes[member] / sum(sizes.values()) for member in members if sizes.get(member)}
        for member in members:
            if not sizes.get(member):
                raise BadInput(
                    f"{self._keys[entry.task]}.{split}: none of the items that were drawn belongs to {member}, but in "
                    f"the group {name} each task has the same weight; ask for more items."
                )
        return {member: 1.0 / len(members) for member in members}

    def check(self, asked: Sequence[AskedItem]) -> None:
        """Whether every prompt finds its examples."""
        scored = {a.item.hash for a in asked}
        for name in self.library.tasks:
            self.example_pool |= keep_apart(self.library.tasks[name], scored)

    def right(self, asked: AskedItem) -> float:
        task = self.library.tasks[asked.item.task]
        document = self._documents[asked.item.task][asked.item.index]
        return right(task, document, asked.entry.metric, self._meaning(asked.entry))

    def show(self, asked: AskedItem) -> ItemText:
        """See ``Shows``: the item alone, without the examples and the chat template of its prompt."""
        name, number = asked.item.task, asked.item.index
        try:
            return item_text(self.library.tasks[name], self._documents[name][number])
        except Exception:  # the task's own templates and functions, not all of which are needed to score it
            return ItemText(f"document {number} of {name}")

    def probable(self, entry: TaskEntry) -> bool:
        """See ``Probable``: the options of a multiple choice have probabilities."""
        tasks = (self.library.tasks[member] for member in self.library.members[entry.task])
        return all(task.OUTPUT_TYPE == "multiple_choice" for task in tasks)

    def tells_padding(self, entry: TaskEntry) -> bool:
        """In rows of log-likelihoods padding is known; what is written goes through Transformers' own loop."""
        asked = {self.library.tasks[m].OUTPUT_TYPE for m in self.library.members[entry.task]}
        return self.settings.backend == "resident" and "generate_until" not in asked

    def gives_examples(self, entry: TaskEntry) -> bool:
        """Where log-likelihoods are asked for, by both architectures; of a text that is written no answer is known."""
        return self.tells_padding(entry)

    def check_model(self, model: ModelFolder | None, asked: Sequence[AskedItem]) -> None:
        """See ``ChecksModel``: the prompts of a few items of each task are built. Of a folder that another class loads,
        only the tokenizer and its chat template are looked at.
        """
        if model is None:
            return
        from evolver.evaluation.blueprint import Blueprint
        from evolver.evaluation.language.resident import check_requests

        if not isinstance(model, Blueprint):
            _ = model.tokenizer
            if self.settings.apply_chat_template or self._named:
                check_chat_template(model, None)  # the classes leave out a system prompt that a template refuses
            return
        if self._named:  # it is exported, even where no prompt is put into it
            check_chat_template(model, None)
        names = dict.fromkeys(a.item.task for a in asked)
        few = [a for name in names for a in [a for a in asked if a.item.task == name][:LOOKED_AT]]
        hashes = {a.item.hash for a in asked}
        for name in check_requests(model, lambda lm: self._prepared(lm, few, hashes)):
            self.warnings.append(
                f"the beginnings of prompts of {name} are cut off, since the base reads too few tokens for them beside "
                "their answers; ask for fewer examples or for shorter answers"
            )

    def prompts(
        self, model: Blueprint, asked: Sequence[AskedItem], scored: Iterable[Item], count: int
    ) -> list[str]:  # fmt: skip
        """See ``ShowsPrompts``. All prompts are built, as a run does: examples are drawn for one item after another."""
        from evolver.evaluation.language.resident import prompts_in_words

        hashes, out = {i.hash for i in scored}, list[str]()
        for name in dict.fromkeys(a.item.task for a in asked):
            own = [a for a in asked if a.item.task == name]
            texts = prompts_in_words(model, partial(self._prepared, asked=own, hashes=hashes), count)
            for place, (one, text) in enumerate(zip(own, texts, strict=False), 1):
                out.append(f"{name}, dev item {place} (document {one.item.index}), {text}")
        return out

    def scorer(self, model: LiveModel | LaunchedModel, asked: Sequence[AskedItem], scored: Iterable[Item]) -> Scorer:
        hashes = {i.hash for i in scored}

        def prepare(lm: Any) -> list[PreparedRequests]:
            return self._prepared(lm, asked, hashes)

        if isinstance(model, LiveModel):
            from evolver.evaluation.language.resident import (
                resident,  # it brings Transformers' models: to check names needs none
            )

            return resident(model, prepare, self.settings, self.seed)
        from evolver.evaluation.language.launched import LaunchedScorer

        return LaunchedScorer(model, prepare)

    def document(self, asked: AskedItem) -> Any:
        """See ``Sourced``: the text by which lm-eval's task recognises a document, if its file names one."""
        task = self.library.tasks[asked.item.task]
        named = task.config.should_decontaminate and task.config.doc_to_decontamination_query
        return self._rendered(asked, task.doc_to_decontamination_query) if named else None

    def text(self, asked: AskedItem) -> Any:
        """See ``Sourced``: the prompt or, of a whole text, the text."""
        task = self.library.tasks[asked.item.task]
        return self._rendered(asked, task.doc_to_text) or self._rendered(asked, task.doc_to_target)

    def _rendered(self, asked: AskedItem, template: Callable[[Any], Any]) -> str | None:
        """What one of a task's templates makes of an item's document; None where it is no text, or an empty one."""
        try:
            found = template(self._documents[asked.item.task][asked.item.index])
        except Exception:  # a template is a program, which may fail in any way; building prompts says so
            return None
        return found if isinstance(found, str) and found else None

    def _prepared(self, lm: Any, asked: Sequence[AskedItem], hashes: set[str]) -> list[PreparedRequests]:
        """The requests of items, built by lm-eval; ``hashes`` are those of all items that are scored anywhere."""
        requests: dict[Item, list[Instance]] = {}
        for name in dict.fromkeys(a.item.task for a in asked):
            items = [a.item for a in asked if a.item.task == name]
            try:
                requests |= build_requests(self.library.tasks[name], items, hashes, self.settings, lm, self.seed)
            except BadInput:
                raise
            except Exception as error:  # the task's own templates and functions
                raise BadInput(
                    f"evaluation.tasks: the prompts of {name} cannot be built ({cause_of(error)}); mend the task's "
                    "file."
                ) from error
        return [
            PreparedRequests(
                self.library.tasks[a.item.task], a.entry.metric, self._meaning(a.entry), requests[a.item]
            )
            for a in asked
        ]  # fmt: skip

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
        f"the dev items of {name} come from the test set of a public benchmark: the search chooses the winner on "
        "these items, so a score on this test set no longer measures unseen items; take dev items from its training "
        "or validation set, for example by a task of your own, and name this one as report_task"
    )


def _without_effect(settings: EvaluationSettings, library: Library) -> list[str]:
    """Keys for all tasks that no task of this run has a use for; a sentence each."""
    out = []
    if settings.gen_kwargs and not library.generates():
        out.append("evaluation.gen_kwargs does nothing: no task of this run generates answers")
    if "fewshot_as_multiturn" in settings.model_fields_set and not settings.apply_chat_template:
        out.append("evaluation.fewshot_as_multiturn does nothing: apply_chat_template is false")
    if settings.confirm_run_unsafe_code and not any(getattr(t, "UNSAFE_CODE", False) for t in library.tasks.values()):
        out.append("evaluation.confirm_run_unsafe_code does nothing: no task of this run executes what a model writes")
    return out
