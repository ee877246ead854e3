"""Decides which items the search may see, which ones are kept for the report, and in which order they are scored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import islice
from math import ceil
from typing import Any

from evolver.config.evaluation import TaskEntry
from evolver.errors import BadInput
from evolver.records import Split
from evolver.records.canonical import canonical_json


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
    """The items of each split, in the order in which every candidate is scored on them."""

    dev: tuple[Item, ...]
    report: tuple[Item, ...]
    select: tuple[Item, ...] = ()

    def of(self, split: Split) -> tuple[Item, ...]:
        return {"dev": self.dev, "select": self.select, "report": self.report}[split]


def item_hash(document: Any) -> str:
    """The first 80 bits of the SHA-256 of a document's canonical JSON, as 20 hexadecimal digits."""
    plain = _plain(document)
    return hashlib.sha256(canonical_json(plain).encode()).hexdigest()[:20]


def alone(item: Item) -> list[str]:
    """What an item of unknown origin shares with others: its content."""
    return [item.hash]


@dataclass(frozen=True)
class ItemSource:
    """Where the items of one task are drawn from.

    Args:
        key: of the task in the configuration.
        own: items of the task.
        report: items of another task that the report set is to be taken from, if any.
        select: items of other data that the select set is to be taken from, if any.
        origins: what an item shares with others that come from the same source document: the hash of its content, and
            that of the document, if it is known.
    """

    entry: TaskEntry
    key: str
    own: Sequence[Item]
    report: Sequence[Item] | None = None
    select: Sequence[Item] | None = None
    origins: Callable[[Item], Sequence[str]] = alone

    def free(self, ranked: Iterable[Item], used: Set[str]) -> Iterator[Item]:
        """Those of the items that come from no document that is used already."""
        return (item for item in ranked if used.isdisjoint(self.origins(item)))

    def origins_of(self, items: Iterable[Item]) -> set[str]:
        """What any of the items shares with others."""
        return {origin for item in items for origin in self.origins(item)}

    @cached_property
    def wanted(self) -> tuple[int, int]:
        """The numbers of dev and report items that are asked for.

        A share is that of the different documents, rounded up, as lm-eval rounds a limit below 1. Two shares of the
        same documents that add up to 1 at most do so after rounding, too.

        Raises BadInput for two shares of the same documents that add up to more than 1.
        """
        entry, own = self.entry, len({i.hash for i in self.own})
        other = own if self.report is None else len({i.hash for i in self.report})
        dev, report = _count(entry.dev, own), _count(entry.report, other)
        if self.report is None and isinstance(entry.dev, float) and isinstance(entry.report, float):
            if _exact(entry.dev) + _exact(entry.report) > 1:
                raise BadInput(
                    f"{self.key}.dev + report: the shares {entry.dev} and {entry.report} of the documents of "
                    f"{entry.task} add up to more than 1; ask for less."
                )
            report = max(1, min(report, own - dev))
        return dev, report


def draw(sources: Sequence[ItemSource], seed: int, fresh: int = 0) -> list[Items]:
    """The dev, select and report items of every task, drawn without replacement by the hash of seed and item.

    Tasks may ask different things of the same documents, and so may the items of one task: no document that one of them
    has in one of its sets is in another set of any.

    Args:
        fresh: how many sets of report items were drawn before; the items of none of them are drawn again.

    Raises BadInput for an empty or too small set, and for a task whose own dev and report data overlap.
    """
    dev = [_draw_dev(source, seed) for source in sources]
    used = _origins_of(sources, dev)
    report = [_draw_report(s, d, used, seed) for s, d in zip(sources, dev, strict=True)]
    used |= _origins_of(sources, report)
    select = [_draw_select(source, len(d), used, seed) for source, d in zip(sources, dev, strict=True)]
    used |= _origins_of(sources, select)
    for number in range(fresh):
        report = [_draw_again(source, used, number + 1, seed) for source in sources]
        used |= _origins_of(sources, report)
    return [Items(*drawn) for drawn in zip(dev, report, select, strict=True)]


def _origins_of(sources: Sequence[ItemSource], drawn: Sequence[Sequence[Item]]) -> set[str]:
    return set[str]().union(*(s.origins_of(items) for s, items in zip(sources, drawn, strict=True)))


def _draw_dev(source: ItemSource, seed: int) -> tuple[Item, ...]:
    ranked, entry, (dev, report) = _ranked(source.own, seed), source.entry, source.wanted
    if source.report is None:
        require_items(entry.task, len(ranked), dev + report, f"{source.key}.dev + report")
    else:
        require_items(entry.task, len(ranked), dev, f"{source.key}.dev")
    return tuple(ranked[:dev])


def _draw_report(source: ItemSource, dev: Sequence[Item], searched: Set[str], seed: int) -> tuple[Item, ...]:
    entry, key, (_, report) = source.entry, source.key, source.wanted
    ranked = _ranked(source.own if source.report is None else source.report, seed)
    if source.report is not None:
        name = entry.report_task or f"the report data of {entry.task}"
        require_items(name, len(ranked), report, f"{key}.report")
        shared = {i.hash for i in dev} & {i.hash for i in ranked[:report]}
        if shared:
            raise BadInput(
                f"{key}: {len(shared)} items are both dev items and report items of {entry.task}; give data that "
                "share no item, or leave the report data out, so that the dev data is split."
            )
    free = list(islice(source.free(ranked, searched), report))
    if isinstance(entry.report, float) and free:
        return tuple(free)  # a share of the documents, some of which have several items
    if len(free) < report:
        raise BadInput(
            f"{key}.report: {report} items are asked for, and {len(free)} items of {entry.task} share no document with "
            "the dev items of this task or of another one; ask for fewer dev or report items."
        )
    return tuple(free)


def _draw_again(source: ItemSource, used: Set[str], number: int, seed: int) -> tuple[Item, ...]:
    """Another set of report items, after all other sets."""
    entry, wanted = source.entry, source.wanted[1]
    ranked = _ranked(source.own if source.report is None else source.report, seed)
    free = tuple(islice(source.free(ranked, used), wanted))
    if len(free) < wanted:
        raise BadInput(
            f"{source.key}.report: {wanted} unused report items are asked for (evaluation.report_draw: {number}), and "
            f"{len(free)} items of {entry.task} share no document with another set; use the report items again, or "
            "give more data."
        )
    return free


def _draw_select(source: ItemSource, dev: int, used: Set[str], seed: int) -> tuple[Item, ...]:
    """The last ones to be drawn, so that the other two sets are the same with and without them."""
    entry, key = source.entry, f"{source.key}.select"
    ranked = _ranked(source.own if source.select is None else source.select, seed)
    left = source.free(ranked, used)
    if entry.select is None:
        # Tasks whose data have one part only take their few-shot examples from what is left over.
        free = list(islice(left, 2 * dev))
        return tuple(free[: min(dev, len(free) if source.select is not None else len(free) // 2)])
    free = list(left)
    wanted = _count(entry.select, len(ranked))
    shares = [a for a in (entry.dev, entry.select, entry.report) if isinstance(a, float)]
    if len(shares) == 3 and sum(map(_exact, shares)) <= 1:  # which holds for the numbers of documents only nearly
        wanted = max(1, min(wanted, len(free)))
    if len(free) < wanted:
        raise BadInput(
            f"{key}: {wanted} items are asked for, and {len(free)} of the {len(ranked)} items of {entry.task} share no "
            "document with dev or report items of this task or of another one; ask for fewer items of one of the three "
            "sets."
        )
    return tuple(free[:wanted])


def _count(amount: int | float, documents: int) -> int:
    """A number of items, or the number that a share of the documents is."""
    return ceil(_exact(amount) * documents) if isinstance(amount, float) else amount


def _exact(share: float) -> Fraction:
    """A share as it is written: the float next to 0.2 is above it, and a fifth of 50 documents is 10."""
    return Fraction(repr(share))


def in_order(items: Iterable[Item], seed: int) -> tuple[Item, ...]:
    """The items of all tasks in one order that looks random and depends on the seed and the items only.

    The first items, however many, are thus a random sample of all tasks.
    """
    return tuple(sorted(items, key=lambda i: _rank(f"{seed}:order:{i.task}:{i.hash}")))


def _ranked(items: Sequence[Item], seed: int) -> list[Item]:
    unique = {i.hash: i for i in reversed(items)}  # of items with the same content, only the first one is kept
    return sorted(unique.values(), key=lambda i: _rank(f"{seed}:{i.hash}"))


def require_items(name: str, have: int, wanted: int, key: str) -> None:
    """Raises BadInput where a task holds too few items."""
    if have == 0:
        raise BadInput(f"{key}: {name} has no items; give data that are not empty.")
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
