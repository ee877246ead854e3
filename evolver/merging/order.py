"""Exact order statistics of a stream of scores, by counting instead of sorting.

The bits of a non-negative float32 order as the number does. A first pass counts the scores by their upper bits; the
wanted ones then lie in one bin, whose few scores the next pass takes out, or counts again by lower bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A bin of so many scores (or fewer) is taken out and ordered at once.
FEW = 1 << 22
# Bits below each round of counting.
SHIFTS = (19, 9, 0)

Pass = Callable[[], Iterable[Tensor]]


@dataclass
class Search:
    """Where the score of one rank lies: in row ``row``, with ``prefix`` as its bits above ``shift``.

    ``rank`` counts from the largest score with that prefix; ``count`` is the number of those scores.
    """

    row: int
    rank: int
    prefix: int = 0
    shift: int = 31
    count: int = 0


def kth_largest(scores: Pass, ranks: Sequence[Sequence[int]], size: int) -> Tensor:
    """The k-th largest scores.

    Args:
        scores: sends one pass over the scores, pieces of (C, ...) float32, none negative.
        ranks: C lists of K ranks from 1; rank 0 gives infinity, a rank of ``size`` or more 0.
        size: number of scores in each row.

    Returns:
        (C, K) float32, on the CPU.
    """
    out = torch.zeros(len(ranks), len(ranks[0]))
    searches: dict[tuple[int, int], Search] = {}
    for c, row in enumerate(ranks):
        for k, rank in enumerate(row):
            if 0 < rank < size:
                searches[c, k] = Search(c, rank, count=size)
            else:
                out[c, k] = torch.inf if rank <= 0 else 0.0
    for shift in SHIFTS:
        wide = [s for s in searches.values() if s.count > FEW or s.shift == 31]
        if wide:
            _narrow(scores, wide, shift)
    for place, bits in zip(searches, _values(scores, list(searches.values())), strict=True):
        out[place] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    return out


def _narrow(scores: Pass, searches: Sequence[Search], shift: int) -> None:
    """One pass: from the bits above each search's shift to those above ``shift``."""
    counts: list[Tensor | None] = [None] * len(searches)
    for piece in scores():
        bits = _bits(piece)
        for i, s in enumerate(searches):
            row = bits[s.row]
            inside = row if s.shift == 31 else row[(row >> s.shift) == s.prefix]
            bins = 1 << (s.shift - shift)
            found = torch.bincount((inside >> shift) & (bins - 1), minlength=bins)
            held = counts[i]
            counts[i] = found if held is None else held.add_(found)
    for s, total in zip(searches, counts, strict=True):
        assert total is not None  # a tensor has at least one piece
        above = total.cpu().flip(0).cumsum(0)  # above[j]: scores in the j + 1 highest bins
        top = int(torch.searchsorted(above, s.rank))
        s.rank -= int(above[top - 1]) if top else 0
        s.count = int(total[len(above) - 1 - top])
        s.prefix = (s.prefix << (s.shift - shift)) + len(above) - 1 - top
        s.shift = shift


def _values(scores: Pass, searches: Sequence[Search]) -> list[int]:
    """The bits of the wanted scores."""
    taken: list[list[Tensor]] = [[] for _ in searches]
    if any(s.shift for s in searches):
        for piece in scores():
            bits = _bits(piece)
            for s, inside in zip(searches, taken, strict=True):
                if s.shift:
                    row = bits[s.row]
                    inside.append(row[(row >> s.shift) == s.prefix])
    return [
        int(torch.cat(inside).sort(descending=True).values[s.rank - 1]) if s.shift else s.prefix
        for s, inside in zip(searches, taken, strict=True)
    ]


def _bits(piece: Tensor) -> Tensor:
    return piece.reshape(piece.shape[0], -1).contiguous().view(torch.int32)
