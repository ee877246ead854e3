"""The tasks of a run. Their items are drawn into two splits, and each task is scored by the judge of its kind."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from evolver.config import Config
from evolver.config.evaluation import TaskEntry
from evolver.errors import BadInput, nearest
from evolver.evaluation import judges
from evolver.evaluation.base import (
    COMMON_KEYS,
    JUDGES,
    AskedItem,
    Checked,
    ChecksModel,
    DrawsExamples,
    Grouped,
    ItemText,
    Judge,
    Probable,
    Scored,
    Scorer,
    Shows,
    ShowsPrompts,
    Sourced,
)
from evolver.evaluation.blueprint import Blueprint, ModelFolder
from evolver.evaluation.examples import Example, GivesExamples
from evolver.evaluation.items import Item, Items, ItemSource, draw, in_order, item_hash
from evolver.evaluation.scores.metrics import FITNESS, Metric
from evolver.evaluation.scores.resampling import clusters_of
from evolver.evaluation.scores.scoring import Scale
from evolver.records import SPLITS, Split, own_score


def load_tasks(config: Config) -> Tasks:
    """The tasks of a configuration.

    Raises BadInput for an unknown task, metric or judge, for a set without items or with too few, and for dev and
    report items that overlap.
    """
    return Tasks(config)


class Tasks:
    """The tasks of a configuration. They are checked without a model; ``scorer`` makes their scorer for a model.

    Attributes:
        entries: the tasks as the configuration gives them.
        judges: the judge of each task, by the task's name.
        items: the items of each split, in the order in which every candidate is scored on them.
        sizes: the number of items of each task in each split.

    Raises BadInput as ``load_tasks`` does.
    """

    def __init__(self, config: Config) -> None:
        self.entries, self.fitness = config.evaluation.tasks, config.evaluation.fitness
        self.judges = _judges(config)
        self._scales: dict[Split, Scale] = {}
        self._owners: dict[tuple[Split, Item], TaskEntry] = {}
        sources = [self._source(number, entry) for number, entry in enumerate(self.entries)]
        drawn = draw(sources, config.seed, config.evaluation.report_draw)
        self.sizes = {
            e.task: {split: len(d.of(split)) for split in SPLITS} for e, d in zip(self.entries, drawn, strict=True)
        }
        for number, (entry, items) in enumerate(zip(self.entries, drawn, strict=True)):
            self._own(number, entry, items)
        self.items = Items(
            in_order((i for d in drawn for i in d.dev), config.seed),
            in_order((i for d in drawn for i in d.report), config.seed),
            in_order((i for d in drawn for i in d.select), config.seed),
        )
        asked = self._asked_of_all()
        for judge in dict.fromkeys(self.judges.values()):
            if isinstance(judge, Checked):
                judge.check(asked)

    @property
    def warnings(self) -> list[str]:
        """Sentences that the user should read before the run."""
        return [w for judge in dict.fromkeys(self.judges.values()) for w in judge.warnings]

    def owner(self, split: Split, item: Item) -> TaskEntry:
        """The task of the configuration that an item of a split belongs to."""
        return self._owners[split, item]

    @property
    def example_pool(self) -> set[str]:
        """The hashes of all documents that examples in prompts would be drawn from if no item were scored."""
        judges = dict.fromkeys(self.judges.values())
        return set[str]().union(*(j.example_pool for j in judges if isinstance(j, DrawsExamples)))

    def check_model(self, model: ModelFolder | None) -> None:
        """Let the judges look at the model that they will score, as far as it shows without weights.

        Args:
            model: the model; see ``ChecksModel``.

        Raises BadInput for a model that the tasks cannot be scored with.
        """
        asked = self._asked_of_all()
        for judge in dict.fromkeys(self.judges.values()):
            if isinstance(judge, ChecksModel):
                judge.check_model(model, [a for a in asked if self.judges[a.entry.task] is judge])

    def prompts(self, model: Blueprint, count: int) -> list[str]:
        """What a model reads of the first dev items of each task, as texts for people; none of tasks without prompts.

        Raises BadInput where a prompt cannot be built.
        """
        asked, scored = self._asked("dev"), self._scored()
        shown = [j for j in dict.fromkeys(self.judges.values()) if isinstance(j, ShowsPrompts)]
        return [
            text
            for judge in shown
            for text in judge.prompts(model, [a for a in asked if self.judges[a.entry.task] is judge], scored, count)
        ]

    @cached_property
    def scales(self) -> Mapping[Split, Scale]:
        """The scale of every split that has items."""
        return {split: self.scale(split) for split in SPLITS if self.items.of(split)}

    def scale(self, split: Split) -> Scale:
        """The scale of a split, which says how the answers to its items make up the score."""
        if split not in self._scales:
            self._scales[split] = self._scale(split)
        return self._scales[split]

    def _scale(self, split: Split) -> Scale:
        asked = self._asked(split)
        shares = self._shares(split, asked)
        metrics = {e.task: self.metric(e, split) for e in self.entries}
        compares = any(m.compares for m in metrics.values())
        right = tuple(self._right(a, metrics[a.entry.task]) for a in asked) if compares else ()
        return Scale(
            tuple(a.item.task if a.item.task in shares[a.entry.task] else a.entry.task for a in asked),
            {name: e.weight * share for e in self.entries for name, share in shares[e.task].items()},
            {name: metrics[task] for task, parts in shares.items() for name in parts},
            right,
            clusters_of([self._origins(a) for a in asked]),
        )

    def metric(self, entry: TaskEntry, split: Split) -> Metric:
        """The metric of a task on the items of a split."""
        own = self.judges[entry.task].metric(entry)
        return own if split != "dev" else FITNESS.get(self.fitness, own)

    def parts(self, split: Split) -> dict[str, list[str]]:
        """For each task of the configuration the tasks that a scale has for it: itself, or those of a group."""
        return {task: list(shares) for task, shares in self._shares(split, self._asked(split)).items()}

    def texts(self, split: Split) -> list[str | None]:
        """The hashes of the texts of a split's items, in the form of ``item_hash``; None of items without a text."""
        found = []
        for a in self._asked(split):
            judge = self.judges[a.entry.task]
            text = judge.text(a) if isinstance(judge, Sourced) else None
            found.append(None if text is None else item_hash(text))
        return found

    def _origins(self, asked: AskedItem) -> list[str]:
        """See ``ItemSource.origins``."""
        judge = self.judges[asked.entry.task]
        document = judge.document(asked) if isinstance(judge, Sourced) else None
        return [asked.item.hash] if document is None else [asked.item.hash, item_hash(document)]

    def _shares(self, split: Split, asked: Sequence[AskedItem]) -> dict[str, dict[str, float]]:
        """For each task what its metric is made of, and at which shares: itself, or the tasks of a group."""
        sizes: dict[str, Counter[str]] = {entry.task: Counter() for entry in self.entries}
        for a in asked:
            sizes[a.entry.task][a.item.task] += 1
        out = {}
        for entry in self.entries:
            judge = self.judges[entry.task]
            shares = judge.shares(entry, split, sizes[entry.task]) if isinstance(judge, Grouped) else None
            out[entry.task] = {entry.task: 1.0} if shares is None else dict(shares)
        return out

    def scorer(self, model: Any, split: Split) -> SplitScorer:
        """A scorer of a model on the items of one split. The items of the other split are not prepared.

        Args:
            model: a LiveModel, or a LaunchedModel where ``evaluation.backend`` names a model class of lm-eval.
        """
        asked = self._asked(split)
        scored = self._scored()
        parts = []
        for judge in dict.fromkeys(self.judges.values()):
            places = [p for p, a in enumerate(asked) if self.judges[a.entry.task] is judge]
            if places:
                parts.append((judge.scorer(model, [asked[p] for p in places], scored), places))
        return SplitScorer(parts, self.fitness if split == "dev" else "score")

    def show(self, split: Split, places: Sequence[int]) -> dict[int, ItemText]:
        """Items of a split as people read them, by their places; without those whose judge cannot show them."""
        asked = self._asked(split)
        found = {p: (self.judges[asked[p].entry.task], asked[p]) for p in places}
        return {p: judge.show(item) for p, (judge, item) in found.items() if isinstance(judge, Shows)}

    def _scored(self) -> set[Item]:
        """All items that are scored anywhere in the run."""
        return {item for split in SPLITS for item in self.items.of(split)}

    def _asked_of_all(self) -> list[AskedItem]:
        return [asked for split in SPLITS for asked in self._asked(split)]

    def _asked(self, split: Split) -> list[AskedItem]:
        return [AskedItem(self._owners[split, item], item) for item in self.items.of(split)]

    def _right(self, asked: AskedItem, metric: Metric) -> float:
        return self.judges[asked.entry.task].right(asked) if metric.compares else 0.0

    def _source(self, number: int, entry: TaskEntry) -> ItemSource:
        judge = self.judges[entry.task]
        _check_fitness(judge, entry, self.fitness, f"evaluation.tasks[{number}]")
        own = judge.items(entry, "dev") or []
        own_report, own_select = judge.items(entry, "report"), judge.items(entry, "select")
        return ItemSource(
            entry, f"evaluation.tasks[{number}]", own, own_report, own_select,
            lambda item: self._origins(AskedItem(entry, item)),
        )  # fmt: skip

    def _own(self, number: int, entry: TaskEntry, items: Items) -> None:
        """Note whose the items are, as no item is scored twice."""
        key = f"evaluation.tasks[{number}]"
        for split in SPLITS:
            for item in items.of(split):
                if (split, item) in self._owners:
                    raise BadInput(
                        f"{key}.task: {entry.task} and {self._owners[split, item].task} both contain {item.task}; "
                        "name each task once."
                    )
                self._owners[split, item] = entry


class SplitScorer:
    """Scores a model on the items of one split.

    Args:
        parts: the scorer of each judge, with the places of its items in the order of the split.
        fitness: what an answer is, ``evaluation.fitness``.
    """

    def __init__(self, parts: Sequence[tuple[Scorer, Sequence[int]]], fitness: str = "score") -> None:
        self.parts, self.fitness = parts, fitness

    def score(self, start: int, stop: int) -> Scored:
        """The answers to the items from ``start`` to ``stop - 1`` in the order of the split.

        Raises FloatingPointError where the model's outputs are not finite.
        """
        return self.score_at(range(start, stop))

    def examples_at(self, chosen: Collection[int]) -> Iterator[Example]:
        """The items at these places of the split's order as examples, judge by judge.

        Raises TypeError where a scorer has none.
        """
        for scorer, places in self.parts:
            inside = [i for i, place in enumerate(places) if place in chosen]
            if inside and not isinstance(scorer, GivesExamples):
                raise TypeError(f"{type(scorer).__name__} gives no examples")
            if isinstance(scorer, GivesExamples):
                yield from scorer.examples(inside)

    def score_at(self, chosen: Collection[int]) -> Scored:
        """The answers to the items at these places of the split's order."""
        out = Scored()
        for scorer, places in self.parts:
            inside = [i for i, place in enumerate(places) if place in chosen]
            if inside:
                out.add(scorer.score(inside), places)
        if self.fitness != "score":
            for place, probability in out.probabilities.items():
                own = [own_score(out.answers[place])] if self.fitness == "both" else []
                out.answers[place] = math.fsum([probability, *own]) / (1 + len(own))
        return out


def _check_fitness(judge: Judge, entry: TaskEntry, fitness: str, key: str) -> None:
    """Raises BadInput for a metric that the judge does not have, and for a task that cannot have this fitness."""
    metric = judge.metric(entry)
    if fitness == "score":
        return
    if not (isinstance(judge, Probable) and judge.probable(entry)):
        raise BadInput(
            f"evaluation.fitness: the probability of the right answer to an item of {entry.task} ({key}) is not known, "
            "as only classes and options have one; write score."
        )
    if fitness == "both" and not (metric.judged and metric.best == 1.0):
        raise BadInput(
            f"evaluation.fitness: {entry.metric} of {entry.task} ({key}) is not the mean of scores of its items from 0 "
            "to 1, so an item has no score to add to its probability; write probability or score."
        )


def _judges(config: Config) -> dict[str, Judge]:
    """The judge of every task, by the task's name. Tasks of the same kind share one judge."""
    kinds: dict[str, list[int]] = {}
    for number, entry in enumerate(config.evaluation.tasks):
        kind = _kind(entry, config.model.kind)
        if config.evaluation.backend != "resident" and kind != "language":
            raise BadInput(f"evaluation.backend: {entry.task} is not a task of lm-eval; write resident.")
        kinds.setdefault(kind, []).append(number)
    _check_backend(config)
    made: dict[str, Judge] = {}
    for kind, numbers in kinds.items():
        found = judge_named(kind, f"evaluation.tasks[{numbers[0]}].judge")
        for number in numbers:
            _refuse_unread_keys(config.evaluation.tasks[number], f"evaluation.tasks[{number}]", kind, found.keys)
        judge = found(config, numbers)
        made |= {config.evaluation.tasks[n].task: judge for n in numbers}
    return made


def _check_backend(config: Config) -> None:
    """Raises BadInput for a backend that cannot score candidates here, and for keys that it does not read."""
    settings = config.evaluation
    if settings.backend != "resident":
        from evolver.evaluation.language.launched import check_backend  # importing lm-eval takes seconds

        if "batch_tokens" in settings.model_fields_set:
            raise BadInput(
                f"evaluation.batch_tokens: the backend {settings.backend} does not read this key; leave it out, and "
                "limit its batches by batch_size or by an argument of its own in model_args."
            )
        check_backend(settings, config.model.kind)
        return
    for key in ("serve", "model_args"):
        if getattr(settings, key):
            raise BadInput(
                f"evaluation.{key}: the backend resident does not read this key; leave it out, or write the backend "
                "that it is for."
            )


def _refuse_unread_keys(entry: TaskEntry, key: str, kind: str, read: frozenset[str]) -> None:
    """Raises BadInput for a key that is set and that the task's kind of evaluation would pass over."""
    for name, value in entry:
        if name not in COMMON_KEYS | read and value != TaskEntry.model_fields[name].default:
            raise BadInput(
                f"{key}.{name}: the kind of evaluation {kind} does not use this key; leave it out, or use one of "
                f"{', '.join(sorted(read))}."
            )


def _kind(entry: TaskEntry, model: str) -> str:
    if entry.judge is not None:
        return entry.judge
    if entry.function is not None:
        return "function"
    return "language" if model in ("causal-lm", "seq2seq") else model


def judge_names() -> list[str]:
    """The names of all kinds of evaluation, sorted: those with a file in ``evaluation/judges``, and those that a
    program has registered.
    """
    files = (m.name.replace("_", "-") for m in pkgutil.iter_modules(judges.__path__))
    return sorted({*files, *JUDGES})


def judge_named(name: str, key: str) -> type[Judge]:
    """The judge of this name. Its file is imported only now, because the libraries that it needs take seconds.

    Raises BadInput for an unknown name, naming ``key`` and the nearest known names.
    """
    if name not in judge_names():
        raise BadInput(f"{key}: unknown judge {name!r}; {nearest(name, judge_names())}")
    if name not in JUDGES:
        importlib.import_module(f"{judges.__name__}.{name.replace('-', '_')}")
    return JUDGES[name]
