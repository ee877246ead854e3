"""Tasks that a function of the user's own judges: ``score(model, items)`` returns one number an item."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from evolver.config import Config, DataSet, TaskEntry, expand
from evolver.errors import BadInput, nearest
from evolver.evaluation.base import Asked, Scored
from evolver.evaluation.data import Row, read_rows
from evolver.evaluation.items import Item, item_hash
from evolver.evaluation.live import LiveModel
from evolver.evaluation.metrics import ENDLESS, JUDGED, Metric
from evolver.records import Split

Function = Callable[[LiveModel, Sequence[Row]], Any]
# acc: between 0 and 1, so that one can stop early; mean: any numbers.
METRICS = {"acc": JUDGED, "mean": ENDLESS}


class Functions:
    """The judge of tasks with a ``function``.

    The function gets the live model (its ``module``, ``tokenizer`` and ``device``) and rows of the data as mappings. It
    is called for a block of items at a time, and must not depend on which items stand together.
    """

    def __init__(self, config: Config, numbers: Sequence[int]) -> None:
        entries = {n: config.evaluation.tasks[n] for n in numbers}
        self._keys = {e.task: f"evaluation.tasks[{n}]" for n, e in entries.items()}
        self._functions = {e.task: _load(e.function or "", f"{self._keys[e.task]}.function") for e in entries.values()}
        self._rows: dict[str, list[Row]] = {}
        self.warnings: list[str] = []

    def items(self, entry: TaskEntry, split: Split) -> list[Item] | None:
        key = self._keys[entry.task]
        if split == "report":
            return self._read(entry, entry.report_data, f"{key}.report_data") if entry.report_data else None
        if entry.data is None:
            raise BadInput(f"{key}.data: missing; give the file or the data set that the function is called on.")
        return self._read(entry, entry.data, f"{key}.data")

    def metric(self, entry: TaskEntry) -> Metric:
        if entry.metric not in METRICS:
            key = self._keys[entry.task]
            raise BadInput(f"{key}.metric: unknown metric {entry.metric!r}; {nearest(entry.metric, METRICS)}")
        return METRICS[entry.metric]

    def right(self, asked: Asked) -> float:
        return 0.0  # judged item by item, always

    def scorer(self, model: LiveModel, asked: Sequence[Asked], scored: Iterable[Item]) -> FunctionScorer:
        rows = [self._rows[a.item.task][a.item.index] for a in asked]
        return FunctionScorer(model, self._functions, [a.entry for a in asked], rows)

    def _read(self, entry: TaskEntry, data: str | DataSet, key: str) -> list[Item]:
        name = f"{entry.task}:{data if isinstance(data, str) else data.spelled}"
        self._rows[name] = read_rows(data, key)
        code = hashlib.sha256(_path(entry.function or "").read_bytes()).hexdigest()
        # Another function makes another item of the same row: scores of the two must not be mixed.
        return [Item(name, i, item_hash([row, code])) for i, row in enumerate(self._rows[name])]


class FunctionScorer:
    """Calls the functions on blocks of rows."""

    def __init__(
        self, model: LiveModel, functions: dict[str, Function], entries: Sequence[TaskEntry], rows: Sequence[Row]
    ) -> None:
        self._model, self._functions, self._entries, self._rows = model, functions, entries, rows

    def score(self, places: Sequence[int]) -> Scored:
        out = Scored()
        for task in dict.fromkeys(self._entries[p].task for p in places):
            chosen = [p for p in places if self._entries[p].task == task]
            said = self._functions[task](self._model, [self._rows[p] for p in chosen])
            values = [float(v) for v in said]
            if len(values) != len(chosen):
                raise ValueError(f"the function of {task} returned {len(values)} numbers for {len(chosen)} items")
            if not all(map(math.isfinite, values)):
                raise FloatingPointError(f"the function of {task} returned a number that is not finite")
            if self._entries[chosen[0]].metric == "acc" and not all(0 <= v <= 1 for v in values):
                raise ValueError(f"the function of {task} returned a number outside 0 … 1; use the metric mean")
            out.answers.update(zip(chosen, values, strict=True))
        return out


def _load(spelled: str, key: str) -> Function:
    path, name = _path(spelled), spelled.rpartition(":")[2]
    spec = importlib.util.spec_from_file_location(f"evolver_user_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise BadInput(f"{key}: there is no file {path}; give FILE.py:NAME.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's code
        raise BadInput(f"{key}: {path} cannot be run ({type(error).__name__}: {error}); mend it.") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise BadInput(
            f"{key}: {path} has no function {name!r}; {nearest(name, [n for n in vars(module) if n[0] != '_'])}"
        )
    function: Function = found
    return function


def _path(spelled: str) -> Path:
    return Path(expand(spelled.rpartition(":")[0]))
