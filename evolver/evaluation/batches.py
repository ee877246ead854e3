"""Batches under a token budget, halved where memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import torch

Batch = TypeVar("Batch")
Answer = TypeVar("Answer")


def by_length(lengths: Mapping[int, int], budget: int, most: int | None = None) -> Iterator[list[int]]:
    """Keys in batches of like lengths, each batch of at most ``budget`` tokens with padding (or of one key).

    The same lengths give the same batches: in bfloat16 a score can depend on its batch.

    Args:
        most: rows of a batch.
    """
    batch: list[int] = []
    for key in sorted(lengths, key=lambda k: (lengths[k], k)):
        if batch and ((len(batch) + 1) * lengths[key] > budget or len(batch) == most):
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


class Batches(Generic[Batch]):
    """Batches whose tensors are built once. One that does not fit into memory is cut in two, and stays so.

    Args:
        keys: of the rows of every batch.
        build: makes a batch of the rows of these keys.
    """

    def __init__(self, keys: Iterable[Sequence[int]], build: Callable[[Sequence[int]], Batch]) -> None:
        self._build = build
        self._batches: list[tuple[Sequence[int], Batch | None]] = [(k, None) for k in keys]

    def run(self, forward: Callable[[Batch], Answer]) -> Iterator[tuple[Sequence[int], Answer]]:
        """What ``forward`` says of every batch, with the batch's keys.

        Raises MemoryError where a batch of one row is too much.
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
            self._halve(number)  # only here: within the handler the traceback still holds the forward pass's tensors

    def _halve(self, number: int) -> None:
        keys, _ = self._batches[number]
        middle = len(keys) // 2
        self._batches[number : number + 1] = [(keys[:middle], None), (keys[middle:], None)]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an accelerator, or the CPU's allocator, had no room."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
