"""A row of the ledger: its columns, and how a candidate and its result are written into one and read from it."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import pyarrow as pa

from evolver.errors import BadInput
from evolver.records import Candidate, Question, Result, own_score
from evolver.records.graph import NodeTable, UnknownNode, texts_of

STATUSES = ("ok", "failed")
EVENTS = ("asked", "finished", "guessed", "retried", "listed", "inherited", "described")
PROPOSALS = ("asked", "listed", "described")  # the events without a result

SCHEMA = pa.schema(
    [
        ("event", pa.string()),  # one of EVENTS
        ("time", pa.timestamp("us", tz="UTC")),
        ("stage", pa.string()),
        ("number", pa.int64()),
        ("recipe_id", pa.string()),
        # the nodes of the recipe that no earlier row holds, as texts by their ids; inputs come first
        ("nodes", pa.map_(pa.string(), pa.string())),
        ("label", pa.string()),
        ("proposer", pa.string()),
        ("parents", pa.list_(pa.string())),
        ("bar", pa.float64()),
        ("limit", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("score", pa.float64()),
        ("bound", pa.float64()),
        ("complete", pa.bool_()),
        ("reused", pa.bool_()),
        ("raced", pa.bool_()),
        ("transient", pa.bool_()),
        ("given", pa.int64()),
        ("items", pa.list_(pa.float64())),
        ("tasks", pa.map_(pa.string(), pa.float64())),
        ("seconds", pa.map_(pa.string(), pa.float64())),
        ("counts", pa.map_(pa.string(), pa.float64())),
        ("worker", pa.string()),
        ("said", pa.list_(pa.string())),
        # for metrics that are computed from counts over all items, the counts of each item; else empty
        ("item_counts", pa.list_(pa.list_(pa.float64()))),
        # the name of the order in which items are scored; empty: the run's own, in which the answers to all items are
        ("order", pa.string()),
        # by how much a candidate breaks the run's constraints
        ("violations", pa.map_(pa.string(), pa.float64())),
        # how probable the model finds the right answer to each new item; NaN where that is not known
        ("probabilities", pa.list_(pa.float32())),
        # the loss on the items and its derivatives by the coefficients of the merge, for a search that descends
        ("loss", pa.float64()),
        ("gradient", pa.list_(pa.float64())),
    ]
)

# A table without these columns is not a ledger. If any other column is missing, an earlier version wrote the table, and
# the column has its default. To add a column, add it to SCHEMA only.
OLDEST = ("event", "time", "stage", "number", "recipe_id", "nodes")
DEFAULTS = {f.name: f.default for kind in (Candidate, Result) for f in fields(kind) if f.default is not MISSING}

# The fields of a result that a row holds unchanged, and those that are mappings or sequences.
PLAIN_FIELDS = (
    "status", "reason", "score", "bound", "complete", "reused", "raced", "transient", "given", "worker", "loss",
)  # fmt: skip
MAPS = ("tasks", "seconds", "counts", "violations")
LIST_FIELDS = ("said", "probabilities", "gradient")


class LostRecipe(BadInput):
    """The recipe of a row cannot be rebuilt, because a part of the ledger with some of its nodes is gone."""


def row_of(candidate: Candidate, result: Result | None, held: Container[str] = ()) -> dict[str, Any]:
    """The row of a result or, where there is none yet, that of a candidate that is sent out.

    Args:
        held: ids of the nodes that earlier rows hold.
    """
    row: dict[str, Any] = {
        "event": "finished" if result else "asked",
        "time": now(),
        "stage": candidate.stage,
        "number": candidate.number,
        "recipe_id": candidate.recipe.id,
        "nodes": list(texts_of(candidate.recipe, held).items()),
        "label": candidate.label,
        "proposer": candidate.proposer,
        "parents": list(candidate.parents),
        "bar": candidate.question.bar,
        "limit": candidate.question.limit,
        "order": candidate.question.order,
    }
    if result:
        row |= {name: getattr(result, name) for name in PLAIN_FIELDS} | {"items": [own_score(a) for a in result.items]}
        row["item_counts"] = [list(a[1:]) if isinstance(a, tuple) else [] for a in result.items]
        if not any(row["item_counts"]):
            row["item_counts"] = []
        row |= {name: list(getattr(result, name)) for name in LIST_FIELDS}
        row |= {name: list(getattr(result, name).items()) for name in MAPS}
    return row


def inherited_rows(
    listed: Sequence[Candidate], results: Sequence[tuple[Candidate, Result]], held: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """The rows of what a run takes over from an earlier one.

    Args:
        listed: the candidates of the earlier search, which the run's own search begins with.
        results: what models scored in the earlier run, by this run's measure.
        held: ids of the nodes that earlier rows hold.
    """
    held = set(held)
    pairs = [("listed", candidate, None) for candidate in listed]
    for event, candidate, result in [*pairs, *(("inherited", *pair) for pair in results)]:
        row = row_of(candidate, result, held) | {"event": event}
        held |= {key for key, _ in row["nodes"]}
        yield row


def nodes_of(tables: Iterable[pa.Table]) -> NodeTable:
    """The nodes that the rows of these parts of a ledger hold."""
    found = NodeTable()
    for table in tables:
        found.add(pair for nodes in table["nodes"].to_pylist() for pair in nodes)
    return found


def candidate_of(row: Mapping[str, Any], nodes: NodeTable) -> Candidate:
    """The candidate of a row; what a worker was told beside it (rival, known items) is not kept.

    Args:
        nodes: the nodes of the whole ledger.

    Raises LostRecipe where some nodes of its recipe are missing, and ValueError where they are damaged.
    """
    try:
        recipe = nodes.recipe(row["recipe_id"])
    except UnknownNode as error:
        raise LostRecipe(
            f"candidate {row['number']} of stage {row['stage']}: a part of its recipe was lost with a damaged file of "
            "the ledger; run the configuration again, which writes it again."
        ) from error
    return Candidate(
        row["number"], recipe, row["proposer"], tuple(row["parents"]),
        Question(bar=row["bar"], limit=row["limit"], order=row["order"]), row["stage"], row["label"],
    )  # fmt: skip


def result_of(row: Mapping[str, Any]) -> Result:
    """The result of a row that has one."""
    same = ("number", "recipe_id", "stage", "order", *PLAIN_FIELDS, *MAPS)
    items: tuple[Any, ...] = tuple(row["items"])
    if row["item_counts"]:
        items = tuple((own, *counts) if counts else own for own, counts in zip(items, row["item_counts"], strict=True))
    more: dict[str, Any] = {name: tuple(row[name] or ()) for name in LIST_FIELDS}
    return Result(**{name: row[name] for name in same}, items=items, **more)


def now() -> int:
    """The time of a row that is written now, in microseconds since 1970."""
    return time.time_ns() // 1000
