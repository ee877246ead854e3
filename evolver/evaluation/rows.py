"""The common part of the judges that score rows of a file or data set.

A task has one file or data set for its dev items and, if the user wishes, another one for its report items.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from evolver.config import Config
from evolver.config.evaluation import DataSet, TaskEntry
from evolver.errors import BadInput, nearest
from evolver.evaluation.base import AskedItem
from evolver.evaluation.data import Row, read_rows
from evolver.evaluation.items import Item, item_hash
from evolver.records import Split


class RowJudge:
    """The part of a judge that reads rows.

    A subclass says which columns it needs and which content of a row identifies the item. See ``Judge`` for the
    arguments.

    Attributes:
        named: the key under which the configuration names a task, such as ``evaluation.tasks[0]``, for messages.
    """

    def __init__(self, config: Config, numbers: Sequence[int]) -> None:
        self.settings = config.evaluation
        self.named = {config.evaluation.tasks[n].task: f"evaluation.tasks[{n}]" for n in numbers}
        self._rows: dict[str, list[Row]] = {}
        self.warnings: list[str] = []

    def tells_padding(self, entry: TaskEntry) -> bool:
        """See ``Judge``."""
        return False

    def gives_examples(self, entry: TaskEntry) -> bool:
        """See ``Judge``."""
        return False

    def columns(self, entry: TaskEntry) -> list[str]:
        """The columns that every row must have."""
        return []

    def prepare(self, rows: list[Row], entry: TaskEntry, data: str | DataSet, key: str) -> list[Row]:
        """The rows in the form in which the judge keeps them."""
        return rows

    def content(self, row: Row, entry: TaskEntry) -> Any:
        """The content that identifies an item. Items are drawn, and recognised as equal, by its hash."""
        return [row[column] for column in self.columns(entry)]

    def items(self, entry: TaskEntry, split: Split) -> list[Item] | None:
        """The items of all rows; see ``Judge``.

        Raises BadInput where the data are missing or cannot be read, and where a row lacks a column.
        """
        key = self.named[entry.task]
        if split != "dev":
            part = f"{split}_data"
            data = getattr(entry, part)
            return self._read(entry, data, f"{key}.{part}") if data else None
        if entry.data is None:
            raise BadInput(f"{key}.data: missing; give the file or the data set of {entry.task}.")
        return self._read(entry, entry.data, f"{key}.data")

    def right(self, asked: AskedItem) -> float:
        """See ``Judge``. Items that are judged one by one, or of which counts are kept, need none."""
        return 0.0

    def document(self, asked: AskedItem) -> Any:
        """See ``Sourced``: the text of the row; of a pair of texts, the first one."""
        column = asked.entry.text
        return self.row(asked)[column] if column in self.columns(asked.entry) else None

    def text(self, asked: AskedItem) -> Any:
        """See ``Sourced``."""
        return self.document(asked)

    def row(self, asked: AskedItem) -> Row:
        """The row of an item."""
        return self._rows[asked.item.task][asked.item.index]

    def _read(self, entry: TaskEntry, data: str | DataSet, key: str) -> list[Item]:
        rows = read_rows(data, key)
        _check(rows, self.columns(entry), key)
        name = f"{entry.task}:{data if isinstance(data, str) else data.spelled}"
        self._rows[name] = self.prepare(rows, entry, data, key)
        return [Item(name, n, item_hash(self.content(row, entry))) for n, row in enumerate(self._rows[name])]


def _check(rows: Iterable[Row], columns: Sequence[str], key: str) -> None:
    for number, row in enumerate(rows, 1):
        for column in columns:
            if row.get(column) is None:
                raise BadInput(f"{key}: row {number} lacks the key {column!r}; {nearest(column, row)}")
