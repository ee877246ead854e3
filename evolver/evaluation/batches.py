"""Batches under a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def by_length(lengths: Mapping[int, int], budget: int) -> Iterator[list[int]]:
    """Keys in batches of like lengths, each batch of at most ``budget`` tokens with padding (or of one key).

    The same lengths give the same batches: in bfloat16 a score can depend on its batch.
    """
    batch: list[int] = []
    for key in sorted(lengths, key=lambda k: (lengths[k], k)):
        if batch and (len(batch) + 1) * lengths[key] > budget:
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch
