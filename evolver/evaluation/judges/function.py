"""Tasks that a function of the user's own judges: ``score(model, items)`` returns one number an item."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from evolver.config import Config
from evolver.config.evaluation import TaskEntry
from evolver.errors import BadInput, nearest
from evolver.evaluation.base import AskedItem, ItemText, Scored, judge
from evolver.evaluation.data import Row
from evolver.evaluation.items import Item
from evolver.evaluation.judges.classifier import LabelSpaces
from evolver.evaluation.live import LiveModel
from evolver.evaluation.rows import RowJudge
from evolver.evaluation.scores.metrics import ENDLESS, JUDGED, Metric, metric_named
from evolver.storage.paths import expand

ScoreFunction = Callable[[LiveModel, Sequence[Row]], Any]
# acc: between 0 and 1, so that one can stop early; mean: any numbers.
FUNCTION_METRICS = {"acc": JUDGED, "mean": ENDLESS}


@judge("function", "function", "data", "select_data", "report_data", "head")
class Functions(RowJudge):
    """The judge of tasks with a ``function``.

    The function gets the live model (its ``module``, ``tokenizer`` and ``device``) and rows of the data as mappings. It
    is called for a block of items at a time, without gradients, and must not depend on which items stand together.
    Where heads are kept apart, the model has the task's head.
    """

    def __init__(self, config: Config, numbers: Sequence[int]) -> None:
        super().__init__(config, numbers)
        entries = [config.evaluation.tasks[n] for n in numbers]
        self._functions = {e.task: _load(e.function or "", f"{self.named[e.task]}.function") for e in entries}
        self._spaces, self._seed = LabelSpaces(config), config.seed

    def content(self, row: Row, entry: TaskEntry) -> Any:
        # Another function makes another item of the same row: scores of the two must not be mixed.
        return [row, hashlib.sha256(_path(entry.function or "").read_bytes()).hexdigest()]

    def metric(self, entry: TaskEntry) -> Metric:
        return metric_named(entry.metric, FUNCTION_METRICS, f"{self.named[entry.task]}.metric")

    def show(self, asked: AskedItem) -> ItemText:
        """See ``Shows``: what the function is given; the right answer, if there is one, only the function knows."""
        return ItemText(json.dumps(self.row(asked), ensure_ascii=False, default=repr))

    def scorer(self, model: LiveModel, asked: Sequence[AskedItem], scored: Iterable[Item]) -> FunctionScorer:
        rows = [self.row(a) for a in asked]
        heads = {a.entry.task: self._spaces.head(a.entry) for a in asked}
        return FunctionScorer(model, self._functions, heads, [a.entry for a in asked], rows, self._seed)


class FunctionScorer:
    """Calls the functions on blocks of rows."""

    def __init__(
        self, model: LiveModel, functions: Mapping[str, ScoreFunction], heads: Mapping[str, str | None],
        entries: Sequence[TaskEntry], rows: Sequence[Row], seed: int,
    ) -> None:  # fmt: skip
        self._model, self._functions, self._heads = model, functions, heads
        self._entries, self._rows, self._seed = entries, rows, seed

    def score(self, places: Sequence[int]) -> Scored:
        out = Scored()
        for entry in {self._entries[p].task: self._entries[p] for p in places}.values():
            chosen = [p for p in places if self._entries[p].task == entry.task]
            # Copies: what it does to them must not meet the next candidate.
            said = self._call(entry.task, [dict(self._rows[p]) for p in chosen])
            out.answers.update(zip(chosen, _numbers(said, entry, len(chosen)), strict=True))
        return out

    def _call(self, task: str, rows: Sequence[Row]) -> Any:
        head = self._heads[task]
        if head is not None:
            self._model.use(head)
        torch.manual_seed(self._seed)  # where it samples, a candidate says the same whenever it is asked
        try:
            with torch.no_grad():
                return self._functions[task](self._model, rows)
        except SystemExit as error:
            raise RuntimeError(f"the function of {task} left the program with {error.code!r}") from error
        finally:
            self._model.module.eval()


def _numbers(said: Any, entry: TaskEntry, count: int) -> list[float]:
    """What a function returned, as one number an item."""
    name = f"the function of {entry.task} returned"
    try:
        values = [float(v) for v in said]
    except (TypeError, ValueError, RuntimeError) as error:  # the last one: a tensor of more than one number
        raise TypeError(f"{name} a {type(said).__name__} of which no list of numbers can be made") from error
    if len(values) != count:
        raise ValueError(f"{name} {len(values)} numbers for {count} items")
    if not all(map(math.isfinite, values)):
        raise FloatingPointError(f"{name} a number that is not finite")
    if entry.metric == "acc" and not all(0 <= v <= 1 for v in values):
        raise ValueError(f"{name} a number outside 0 … 1; use the metric mean")
    return values


def _load(spelled: str, key: str) -> ScoreFunction:
    path, name = _path(spelled), spelled.rpartition(":")[2]
    unique = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"evolver_user_{unique}_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise BadInput(f"{key}: there is no file {path}; give FILE.py:NAME.")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for their module there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it is the user's code
        raise BadInput(f"{key}: {path} cannot be run ({type(error).__name__}: {error}); correct the file.") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise BadInput(
            f"{key}: {path} has no function {name!r}; {nearest(name, [n for n in vars(module) if n[0] != '_'])}"
        )
    function: ScoreFunction = found
    return function


def _path(spelled: str) -> Path:
    return Path(expand(spelled.rpartition(":")[0]))
