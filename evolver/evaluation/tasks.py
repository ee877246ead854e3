"""The tasks of a run: their items drawn into two splits, each task judged by its kind."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

from evolver.config import Config, TaskEntry
from evolver.errors import BadInput, nearest
from evolver.evaluation import judges
from evolver.evaluation.base import COMMON_KEYS, JUDGES, AskedItem, Judge, Scored, Scorer
from evolver.evaluation.items import Item, Items, draw, in_order
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Split


def load_tasks(config: Config) -> Tasks:
    """The tasks of a configuration.

    Raises BadInput for an unknown task or metric, an empty set, or sets that overlap.
    """
    return Tasks(config)


class Tasks:
    """Tasks as configured: checked without a model, then turned into a scorer once there is one.

    Attributes:
        items: of both splits, each in the order in which every candidate meets them.
        warnings: what the user should hear before the run.
    """

    def __init__(self, config: Config) -> None:
        self.entries = config.evaluation.tasks
        self.judges = _judges(config)
        self._owners: dict[tuple[Split, Item], TaskEntry] = {}
        drawn = [self._draw(number, entry, config.seed) for number, entry in enumerate(self.entries)]
        self.items = Items(
            in_order((i for d in drawn for i in d.dev), config.seed),
            in_order((i for d in drawn for i in d.report), config.seed),
        )
        self.warnings = [w for judge in dict.fromkeys(self.judges.values()) for w in judge.warnings]

    def scale(self, split: Split) -> Scale:
        """How the items of a split make up the score."""
        asked = self._asked(split)
        metrics = {e.task: self.judges[e.task].metric(e) for e in self.entries}
        weights = {e.task: e.weight for e in self.entries}
        judged = all(m.judged for m in metrics.values())
        right = () if judged else tuple(self._right(a, metrics[a.entry.task].judged) for a in asked)
        return Scale(tuple(a.entry.task for a in asked), weights, metrics, right)

    def scorer(self, model: Any, split: Split) -> SplitScorer:
        """What scores a model on the items of a split; those of the other one are not prepared.

        Args:
            model: a LiveModel, or a LaunchedModel where the configuration names a backend.
        """
        asked = self._asked(split)
        scored = {i for s in ("dev", "report") for i in self.items.of(s)}
        parts = []
        for judge in dict.fromkeys(self.judges.values()):
            places = [p for p, a in enumerate(asked) if self.judges[a.entry.task] is judge]
            if places:
                parts.append((judge.scorer(model, [asked[p] for p in places], scored), places))
        return SplitScorer(parts)

    def _asked(self, split: Split) -> list[AskedItem]:
        return [AskedItem(self._owners[split, item], item) for item in self.items.of(split)]

    def _right(self, asked: AskedItem, judged: bool) -> float:
        return 0.0 if judged else self.judges[asked.entry.task].right(asked)

    def _draw(self, number: int, entry: TaskEntry, seed: int) -> Items:
        key, judge = f"evaluation.tasks[{number}]", self.judges[entry.task]
        judge.metric(entry)
        own = judge.items(entry, "dev") or []
        items = draw(entry, own, judge.items(entry, "report"), seed, key)
        for split in ("dev", "report"):
            for item in items.of(split):
                if (split, item) in self._owners:
                    raise BadInput(
                        f"{key}.task: {entry.task} and {self._owners[split, item].task} both hold {item.task}; "
                        "name each task once."
                    )
                self._owners[split, item] = entry
        return items


class SplitScorer:
    """Scores the live model on the items of one split."""

    def __init__(self, parts: Sequence[tuple[Scorer, Sequence[int]]]) -> None:
        self.parts = parts

    def score(self, start: int, stop: int) -> Scored:
        """The answers to the items ``start`` … ``stop - 1`` of the split's order."""
        out = Scored()
        for scorer, places in self.parts:
            inside = [i for i, place in enumerate(places) if start <= place < stop]
            if inside:
                out.add(scorer.score(inside), places)
        return out


def _judges(config: Config) -> dict[str, Judge]:
    """The judge of every task; tasks of one kind share one."""
    if config.evaluation.backend != "resident":
        from evolver.evaluation.language.launched import check_backend  # lm-eval takes seconds

        check_backend(config.evaluation, config.model.kind)
    kinds: dict[str, list[int]] = {}
    for number, entry in enumerate(config.evaluation.tasks):
        kind = _kind(entry, config.model.kind)
        if config.evaluation.backend != "resident" and kind != "language":
            raise BadInput(f"evaluation.backend: {entry.task} is no task of lm-eval; write resident.")
        kinds.setdefault(kind, []).append(number)
    made: dict[str, Judge] = {}
    for kind, numbers in kinds.items():
        found = judge_named(kind, f"evaluation.tasks[{numbers[0]}].judge")
        for number in numbers:
            _refuse_unread_keys(config.evaluation.tasks[number], f"evaluation.tasks[{number}]", kind, found.keys)
        judge = found(config, numbers)
        made |= {config.evaluation.tasks[n].task: judge for n in numbers}
    return made


def _refuse_unread_keys(entry: TaskEntry, key: str, kind: str, read: frozenset[str]) -> None:
    """Raises BadInput for a key that is set and that the task's kind of evaluation would pass over."""
    for name, value in entry:
        if name not in COMMON_KEYS | read and value != TaskEntry.model_fields[name].default:
            raise BadInput(
                f"{key}.{name}: a task that is judged as {kind} has no use for this key; leave it out, or use one of "
                f"{', '.join(sorted(read))}."
            )


def _kind(entry: TaskEntry, model: str) -> str:
    if entry.judge is not None:
        return entry.judge
    if entry.function is not None:
        return "function"
    return "language" if model in ("causal-lm", "seq2seq") else model


def judge_names() -> list[str]:
    """The kinds of evaluation that there are."""
    files = (m.name.replace("_", "-") for m in pkgutil.iter_modules(judges.__path__))
    return sorted({*files, *JUDGES})


def judge_named(name: str, key: str) -> type[Judge]:
    """A kind of evaluation; its file is imported now, as lm-eval and the rest take seconds.

    Raises BadInput for an unknown one, naming ``key`` and the nearest known ones.
    """
    if name not in judge_names():
        raise BadInput(f"{key}: unknown judge {name!r}; {nearest(name, judge_names())}")
    if name not in JUDGES:
        importlib.import_module(f"{judges.__name__}.{name.replace('-', '_')}")
    return JUDGES[name]
