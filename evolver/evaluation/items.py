"""Decides which items the search may see, which ones are kept for the report, and in which order they are scored."""

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
    """One item of a task.

    Attributes:
        task: name of the task or data set that it comes from.
        index: its place in the data set.
        hash: hash of its content, which stays the same if the data set is reordered.
    """

    task: str
    index: int
    hash: str


@dataclass(frozen=True)
class Items:
    """The items of both splits, in the order in which every candidate is scored on them."""

    dev: tuple[Item, ...]
    report: tuple[Item, ...]

    def of(self, split: Split) -> tuple[Item, ...]:
        return self.dev if split == "dev" else self.report


def item_hash(document: Any) -> str:
    """The first 80 bits of the SHA-256 of a document's canonical JSON, as 20 hexadecimal digits."""
    plain = _plain(document)
    return hashlib.sha256(canonical_json(plain).encode()).hexdigest()[:20]


def draw(entry: TaskEntry, own: Sequence[Item], report: Sequence[Item] | None, seed: int, key: str) -> Items:
    """Draw the dev and report items of one task without replacement.

    The items are sorted by a hash of the seed and their content, and the first ones are taken.

    Args:
        entry: the task of the configuration.
        own: all items of the task.
        report: the items that the report items are drawn from; None: both splits are drawn from ``own``.
        seed: seed of the run.
        key: the key of the configuration that errors name.

    Raises BadInput for a set that is empty or too small, and for dev and report items that overlap.
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
            f"{key}: {len(shared)} items are both dev items and report items of {entry.task}; "
            "name data that share no item, or leave the report data out, so that one set is split."
        )
    return Items(tuple(dev), tuple(rest))


def in_order(items: Iterable[Item], seed: int) -> tuple[Item, ...]:
    """The items of all tasks in one order that looks random and depends on the seed and the items only.

    The first items, however many, are thus a random sample of all tasks.
    """
    return tuple(sorted(items, key=lambda i: _rank(f"{seed}:order:{i.task}:{i.hash}")))


def _ranked(items: Sequence[Item], seed: int) -> list[Item]:
    unique = {i.hash: i for i in reversed(items)}  # of items with the same content, only the first one is kept
    return sorted(unique.values(), key=lambda i: _rank(f"{seed}:{i.hash}"))


def _enough(name: str, have: int, wanted: int, key: str) -> None:
    if have == 0:
        raise BadInput(f"{key}: {name} has no items; name data that are not empty.")
    if have < wanted:
        raise BadInput(f"{key}: {wanted} items are asked for, but {name} has {have} different ones; ask for fewer.")


def _rank(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, bool | int | float | str) or value is None else repr(value)
