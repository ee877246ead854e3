"""Items: which ones the search may see, which ones are kept for the report, and in which order they are scored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from evolver.config import TaskEntry
from evolver.errors import BadInput
from evolver.records import Split, canonical_json


@dataclass(frozen=True)
class Item:
    """One item of a task: its place in the data set, and a hash of its content that outlives any reordering."""

    task: str
    index: int
    hash: str


@dataclass(frozen=True)
class Items:
    """The items of both splits, each in the order in which every candidate meets them."""

    dev: tuple[Item, ...]
    report: tuple[Item, ...]

    def of(self, split: Split) -> tuple[Item, ...]:
        return self.dev if split == "dev" else self.report


def item_hash(document: Any) -> str:
    """80 bits of the SHA-256 of a document's canonical JSON."""
    plain = _plain(document)
    return hashlib.sha256(canonical_json(plain).encode()).hexdigest()[:20]


def draw(entry: TaskEntry, own: Sequence[Item], report: Sequence[Item] | None, seed: int, key: str) -> Items:
    """The dev and report items of one task, drawn without replacement by the hash of seed and item.

    Args:
        own: items of the task.
        report: items of another task that the report set is to be taken from, if any.

    Raises BadInput for an empty or too small set, and for dev and report sets that overlap.
    """
    ranked = _ranked(own, seed)
    if report is None:
        _enough(entry.task, len(ranked), entry.dev + entry.report, f"{key}.dev + report")
        return Items(tuple(ranked[: entry.dev]), tuple(ranked[entry.dev : entry.dev + entry.report]))
    theirs = _ranked(report, seed)
    _enough(entry.task, len(ranked), entry.dev, f"{key}.dev")
    _enough(entry.report_task or f"the report data of {entry.task}", len(theirs), entry.report, f"{key}.report")
    dev, rest = ranked[: entry.dev], theirs[: entry.report]
    shared = {i.hash for i in dev} & {i.hash for i in rest}
    if shared:
        raise BadInput(
            f"{key}: {len(shared)} items stand in the dev set of {entry.task} and in its report set; "
            "name data that share no item, or let one set be split."
        )
    return Items(tuple(dev), tuple(rest))


def in_order(items: Iterable[Item], seed: int) -> tuple[Item, ...]:
    """The tasks' items mixed into one fixed order, so that any first part of it is a fair sample of all tasks."""
    return tuple(sorted(items, key=lambda i: _rank(f"{seed}:order:{i.task}:{i.hash}")))


def _ranked(items: Sequence[Item], seed: int) -> list[Item]:
    unique = {i.hash: i for i in reversed(items)}  # of items with the same content, the first one stays
    return sorted(unique.values(), key=lambda i: _rank(f"{seed}:{i.hash}"))


def _enough(name: str, have: int, wanted: int, key: str) -> None:
    if have == 0:
        raise BadInput(f"{key}: {name} holds no items; name data that are not empty.")
    if have < wanted:
        raise BadInput(f"{key}: {wanted} items are asked for and {name} holds {have} different ones; ask for fewer.")


def _rank(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, bool | int | float | str) or value is None else repr(value)
