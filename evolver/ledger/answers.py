"""Every answer of a run: the items that it was asked, and what each candidate scored on each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evolver.errors import BadInput, cause_of
from evolver.ledger.parts import part_bytes, read_table
from evolver.records import SPLITS, Split, split_of
from evolver.records.order import reordered
from evolver.storage import Storage

ITEMS_FILE = "items.parquet"
ItemName = tuple[str, str]  # the task and the hash of an item


def write_items(run: Storage, items: Mapping[Split, Sequence[tuple[str, int, str]]]) -> None:
    """Write ``items.parquet`` into a run's folder: of every place of each split the task, its index in the task's
    data, and the hash of its content. The ledger's answers stand in this order.
    """
    rows = [
        {"split": split, "place": place, "task": task, "index": index, "hash": content}
        for split, members in items.items()
        for place, (task, index, content) in enumerate(members)
    ]
    run.write(ITEMS_FILE, part_bytes(pa.Table.from_pylist(rows)))


def answer_table(run: Storage) -> pa.Table:
    """Every answer of a run: one row for each candidate and item, with the item's hash."""
    items: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for row in items_of(run):
        items[row["split"]].append(row)
    finished = [r for r in read_table(run.folder("ledger")).to_pylist() if _holds_answers(r)]
    rows = [
        {**{k: r[k] for k in ("stage", "number", "recipe_id")}, "task": i["task"], "hash": i["hash"], "answer": a}
        for r in finished
        for i, a in zip(_order_of(r, items[split_of(r["stage"])]), r["items"] or (), strict=False)
    ]
    return pa.Table.from_pylist(rows)


def item_places(run: Storage) -> dict[Split, dict[ItemName, int]]:
    """The place of every item in the answers of a run, by split."""
    found: dict[Split, dict[ItemName, int]] = {split: {} for split in SPLITS}
    for row in items_of(run):
        found[row["split"]][row["task"], row["hash"]] = row["place"]
    return found


def _holds_answers(row: Mapping[str, Any]) -> bool:
    """Whether a row is the one that holds a model's answers: other rows may repeat them."""
    return row["event"] == "inherited" or (row["event"] == "finished" and not row["reused"])


def _order_of(row: Mapping[str, Any], items: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The items in the order of a row's answers."""
    return items if row["complete"] else reordered(items, row["order"])


def items_of(run: Storage) -> list[dict[str, Any]]:
    """The rows of ``items.parquet``: split, place, task, index and hash of every item, in the order of the answers.

    Raises BadInput where it cannot be read.
    """
    try:
        rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(run.read(ITEMS_FILE))).to_pylist()
        if not all({"split", "task", "hash"} <= row.keys() and row["split"] in SPLITS for row in rows):
            raise ValueError("it has other columns or splits")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadInput(
            f"{run.location}/{ITEMS_FILE}: it cannot be read ({cause_of(error)}); run the configuration again, which "
            "writes this file again."
        ) from error
    return rows
