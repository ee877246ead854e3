"""Language models, scored on tasks of lm-eval.

lm-eval says what a task is: its documents, prompts, choices, filters and metrics. Its requests and tokens are built
once; for each candidate only the forward passes run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.api.instance import Instance

from evolver.config import Config, Evaluation, TaskEntry
from evolver.errors import BadInput
from evolver.evaluation.base import Asked, Scored, Scorer
from evolver.evaluation.decoder import DecoderOnly
from evolver.evaluation.encoder_decoder import EncoderDecoder
from evolver.evaluation.generation import Generations
from evolver.evaluation.items import Item, item_hash
from evolver.evaluation.launched import LaunchedModel, LaunchedScorer
from evolver.evaluation.library import Library, Meaning, quiet
from evolver.evaluation.live import LiveModel
from evolver.evaluation.loglikelihood import Forward, Likelihoods, LogLikelihoods
from evolver.evaluation.metrics import Metric
from evolver.evaluation.requests import Prepared, build, right
from evolver.evaluation.tokens import Tokens
from evolver.records import Split


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

    def right(self, asked: Asked) -> float:
        task = self.library.tasks[asked.item.task]
        document = self._documents[asked.item.task][asked.item.index]
        return right(task, document, asked.entry.metric, self._meaning(asked.entry))

    def scorer(self, model: LiveModel | LaunchedModel, asked: Sequence[Asked], scored: Iterable[Item]) -> Scorer:
        hashes = {i.hash for i in scored}

        def prepare(lm: Any) -> list[Prepared]:
            requests: dict[Item, list[Instance]] = {}
            for name in dict.fromkeys(a.item.task for a in asked):
                items = [a.item for a in asked if a.item.task == name]
                requests |= build(self.library.tasks[name], items, hashes, self.settings, lm, self.seed)
            return [
                Prepared(
                    self.library.tasks[a.item.task], a.entry.metric, self._meaning(a.entry), requests[a.item]
                )
                for a in asked
            ]  # fmt: skip

        if isinstance(model, LaunchedModel):
            return LaunchedScorer(model, prepare)
        with quiet():
            lm = Tokens(pretrained=model.module, tokenizer=model.tokenizer, batch_size=1)
        return LanguageScorer(model, lm, prepare(lm), self.settings, self.seed)

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


class LanguageScorer:
    """Scores the live model on prepared items."""

    def __init__(
        self, model: LiveModel, lm: Tokens, prepared: Sequence[Prepared], settings: Evaluation, seed: int
    ) -> None:
        self.prepared, self.lm = prepared, lm
        kind = EncoderDecoder if model.module.config.is_encoder_decoder else DecoderOnly
        forward: Forward[Any] = kind(model, lm.max_length)
        self._likely = LogLikelihoods(forward, settings.batch_tokens, settings.batch_size)
        self._written = Generations(model, lm, settings, seed)
        asked = list(enumerate(prepared))
        self._prompts = {p: lm.prompt(i.requests[0]) for p, i in asked if i.kind == "generate_until"}
        self.groups = {p: lm.group(i.kind, i.requests) for p, i in asked if p not in self._prompts}
        if self.groups and isinstance(forward, EncoderDecoder):
            forward.check()

    def score(self, places: Sequence[int]) -> Scored:
        out = Scored()
        likely = self._likely({p: self.groups[p] for p in places if p in self.groups})
        written = self._written({p: self._prompts[p] for p in places if p in self._prompts})
        for place in places:
            answers: list[Any] = self._answers(place, likely) if place in self.groups else [written.texts[place]]
            judgement = self.prepared[place].judge(answers)
            out.answers[place] = judgement.answer
            out.invalid += judgement.invalid
        out.tokens = likely.tokens + written.tokens
        out.truncated = len(likely.truncated) + len(written.truncated)
        return out

    def _answers(self, place: int, likely: Likelihoods) -> list[Any]:
        """What lm-eval would have of its model for each request of an item."""
        answers = likely.answers[place]
        if self.groups[place].rolling:
            return [sum(likelihood for likelihood, _ in answers)]
        return list(answers)


def _seen(name: str) -> str:
    return (
        f"the dev items of {name} come from the test set of a public benchmark: the search selects on it, so no score "
        "on it is one of unseen items any more; take dev items from its training or validation set, for example by a "
        "task of your own, and name this one as report_task"
    )
