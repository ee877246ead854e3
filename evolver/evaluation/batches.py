"""Batches with a limited number of tokens. A batch that does not fit into memory is divided in two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import torch

Batch = TypeVar("Batch")
Answer = TypeVar("Answer")
Prepared = TypeVar("Prepared")
MOST_TIMES = 4


def by_length(lengths: Mapping[int, int], budget: int, most: int | None = None) -> Iterator[list[int]]:
    """Group rows of similar lengths into batches, shortest rows first.

    The same lengths always give the same batches, because in bfloat16 a score can depend on its batch.

    Args:
        lengths: the number of tokens of each row, by the row's key.
        budget: most tokens of a batch, padding included; a longer row is a batch of its own.
        most: most rows of a batch; None: any number.

    Yields the keys of each batch.
    """
    batch: list[int] = []
    for key in sorted(lengths, key=lambda k: (lengths[k], k)):
        if batch and ((len(batch) + 1) * lengths[key] > budget or len(batch) == most):
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


class PreparedParts(dict[tuple[int, ...], Prepared]):
    """What was prepared for parts of the items, by the places of each part.

    The parts of a run's own order come again for every candidate. Those of other orders come a few times only, so the
    oldest parts are let go when all together hold ``MOST_TIMES`` as many places as there are items.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[int] = set()

    def __setitem__(self, places: tuple[int, ...], prepared: Prepared) -> None:
        super().__setitem__(places, prepared)
        self._seen.update(places)
        held = sum(map(len, self))
        while held > MOST_TIMES * len(self._seen):
            oldest = next(iter(self))
            held -= len(oldest)
            del self[oldest]


class Batches(Generic[Batch]):
    """Batches whose tensors are built once and then used for every candidate.

    A batch that does not fit into memory is divided in two, and stays divided for later candidates.

    Args:
        keys: the keys of the rows of every batch.
        build: builds the tensors of a batch from the keys of its rows.
    """

    def __init__(self, keys: Iterable[Sequence[int]], build: Callable[[Sequence[int]], Batch]) -> None:
        self._build = build
        self._batches: list[tuple[Sequence[int], Batch | None]] = [(k, None) for k in keys]

    def run(self, forward: Callable[[Batch], Answer]) -> Iterator[tuple[Sequence[int], Answer]]:
        """Call ``forward`` on every batch; yields the keys of each batch with what ``forward`` returned.

        Raises MemoryError where even a batch of one row does not fit into memory.
        """
        number = 0
        while number < len(self._batches):
            keys, batch = self._batches[number]
            if batch is None:
                batch = self._build(keys)
                self._batches[number] = (keys, batch)
            try:
                answer = forward(batch)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(keys) == 1:
                    raise MemoryError("a batch of one row does not fit into memory") from error
            else:
                yield keys, answer
                number += 1
                continue
            del batch
            self._halve(number)  # not in the handler, where the traceback still holds the tensors of the forward pass

    def _halve(self, number: int) -> None:
        keys, _ = self._batches[number]
        middle = len(keys) // 2
        self._batches[number : number + 1] = [(keys[:middle], None), (keys[middle:], None)]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the error says that an accelerator or the CPU had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
