"""Exact order statistics of a stream of scores, without sorting it.

A sample says between which two scores the wanted one lies; one pass counts what is above and takes out what is
between. Where the sample misled (scores may be arranged in any way), passes that count by bits find it all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evolver.kernels import native

# So many scores (or fewer) are ordered at once.
DIRECT = 1 << 17
# A sample has at least so many scores, or one in so many; and how many standard deviations it may be off. More would
# widen the edges of every search to spare one in some hundreds a second way.
SAMPLE, ONE_IN, SIGMAS = 1 << 14, 1 << 8, 3.0
# More scores than these are never held: they are counted instead.
FEW = 1 << 24
# Bits below each round of counting; those of a non-negative float32 order as the number does.
SHIFTS = (19, 9, 0)


RankRange = tuple[int, int]
Floats = npt.NDArray[np.float32]
Found = dict[RankRange, float]


class Taken(NamedTuple):
    """What a piece says to a question of order: for C rows of scores and K pairs of edges."""

    above: Tensor  # (C, K) int64: how many scores are above the upper edge
    inside: Tensor  # (C, K) int64: how many are above the lower edge and not above the upper one
    scores: Sequence[Tensor]  # C, float32: those inside any pair that holds more than one value


class Scores(Protocol):
    """A stream of scores, C rows of ``size`` each, none negative."""

    size: int

    def sample(self, count: int) -> Tensor: ...  # (C, about count), from all over the rows
    def taken(self, edges: Tensor) -> Iterable[Taken]: ...  # of every piece; edges: (C, K, 2), lower and upper
    def pieces(self) -> Iterable[Sequence[Tensor]]: ...


def take(scores: Sequence[Tensor], edges: Tensor) -> Taken:
    """Count a piece's scores, C of (n), against ``edges`` (C, K, 2), and take out what lies inside."""
    loops = native.library()
    counts, taken = [], []
    for row, pairs in zip((s.reshape(-1) for s in scores), edges.unbind(0), strict=True):
        lows, highs = pairs.unbind(1)
        single = hold_one_value(pairs)
        if loops is not None and row.is_cpu:
            of_row, out = native.take_row(loops, row, lows, highs, single)
        else:
            over = row > highs[:, None]
            inside = (row > lows[:, None]) & ~over
            of_row = torch.stack([over.sum(1), inside.sum(1)])
            out = row[(inside & ~single[:, None]).any(0)]
        counts.append(of_row.cpu())
        taken.append(out.cpu())
    above, within = torch.stack(counts, dim=1)
    return Taken(above, within, taken)


def hold_one_value(pairs: Tensor) -> Tensor:
    """Whether only one float32 lies above the lower and not above the upper edge, (…, 2) to (…)."""
    lows, highs = pairs.unbind(-1)
    return torch.nextafter(lows, torch.full_like(lows, math.inf)) >= highs


def kth_largest(scores: Scores, ranks: Sequence[Sequence[int]]) -> Tensor:
    """The k-th largest scores, exactly.

    Args:
        ranks: C lists of K ranks from 1; rank 0 gives infinity, a rank of ``scores.size`` or more 0.

    Returns:
        (C, K) float32, on the CPU.
    """
    out = torch.tensor([[math.inf if r <= 0 else 0.0 for r in row] for row in ranks])
    wanted = [(c, k) for c, row in enumerate(ranks) for k, r in enumerate(row) if 0 < r < scores.size]
    if not wanted:
        return out
    if scores.size <= DIRECT:
        rows = [_joined(parts).cpu().numpy() for parts in zip(*scores.pieces(), strict=True)]
        found = _direct(rows, ranks, wanted)
    else:
        found = _between(scores, ranks, wanted)
        missing = [place for place in wanted if place not in found]
        found |= _counted(scores, ranks, missing)
    for place in wanted:
        out[place] = found[place]
    return out


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _direct(rows: Sequence[Floats], ranks: Sequence[Sequence[int]], wanted: Sequence[RankRange]) -> Found:
    found: Found = {}
    for c, row in enumerate(rows):
        mine = [k for of, k in wanted if of == c]
        found |= {(c, k): v for k, v in zip(mine, _largest(row, [ranks[c][k] for k in mine]), strict=True)}
    return found


def _between(scores: Scores, ranks: Sequence[Sequence[int]], wanted: Sequence[RankRange]) -> Found:
    """What one pass finds between edges that a sample suggests."""
    edges = _edges(scores.sample(max(SAMPLE, scores.size // ONE_IN)), ranks, scores.size)
    above, inside = torch.zeros((2, *edges.shape[:2]), dtype=torch.int64)
    taken: list[list[Floats]] = [[] for _ in ranks]
    held = 0
    for piece in scores.taken(edges):
        above += piece.above
        inside += piece.inside
        held += sum(found.numel() for found in piece.scores)
        if held > FEW * len(ranks):
            return {}
        for row, more in zip(taken, piece.scores, strict=True):
            row.append(more.numpy())
    rows, single = [np.concatenate(parts) for parts in taken], hold_one_value(edges)
    found = {}
    for c, k in wanted:
        low, high = edges[c, k].tolist()
        rank = ranks[c][k] - int(above[c, k])
        if 0 < rank <= int(inside[c, k]):
            found[c, k] = high if single[c, k] else _largest(rows[c][(rows[c] > low) & (rows[c] <= high)], [rank])[0]
        elif rank > 0 and low == 0:  # nothing but zeros is left
            found[c, k] = 0.0
    return found


def _edges(sample: Tensor, ranks: Sequence[Sequence[int]], size: int) -> Tensor:
    """Two sampled scores around every wanted one, (C, K, 2); -1 and infinity where the sample has none.

    The lower one is meant to be inside, so the number just below it is the edge; but 0 itself is outside, as there may
    be no end of zeros.
    """
    count = sample.shape[1]
    rows = sample.cpu().numpy()
    out = np.empty((len(ranks), len(ranks[0]), 2), dtype=np.float32)
    for c, row in enumerate(ranks):
        for k, rank in enumerate(row):
            share = min(1.0, max(0.0, rank / size))
            slack = SIGMAS * math.sqrt(count * share * (1 - share)) + SIGMAS
            first, last = math.floor(share * count - slack), math.ceil(share * count + slack)
            low = np.nextafter(np.float32(_largest(rows[c], [last + 1])[0]), np.float32(0)) if last < count else -1.0
            out[c, k] = low, _largest(rows[c], [first + 1])[0] if first >= 0 else np.inf
    return torch.from_numpy(out)


def _largest(row: Floats, ranks: Sequence[int]) -> list[float]:
    places, loops = [row.size - r for r in ranks], native.library()
    if loops is not None:
        return [native.select_rank(loops, row, place) for place in places]
    # One place at a time: numpy finds several at once without vector instructions.
    return [float(np.partition(row, place)[place]) for place in places]


@dataclass
class _Search:
    """Where the score of one rank lies: in row ``row``, with ``prefix`` as its bits above ``shift``.

    ``rank`` counts from the largest score with that prefix.
    """

    row: int
    rank: int
    prefix: int = 0
    shift: int = 31


def _counted(scores: Scores, ranks: Sequence[Sequence[int]], wanted: Sequence[RankRange]) -> Found:
    """By counting scores by their bits, from the upper ones down: three passes, whatever the scores."""
    searches = {(c, k): _Search(c, ranks[c][k]) for c, k in wanted}
    if searches:
        for shift in SHIFTS:
            _narrow(scores.pieces(), list(searches.values()), shift)
    prefixes = torch.tensor([s.prefix for s in searches.values()], dtype=torch.int32)
    return dict(zip(searches, prefixes.view(torch.float32).tolist(), strict=True))


def _narrow(pieces: Iterable[Sequence[Tensor]], searches: Sequence[_Search], shift: int) -> None:
    """One pass: from the bits above each search's shift to those above ``shift``."""
    bins = [1 << (s.shift - shift) for s in searches]
    counts = [torch.zeros(b, dtype=torch.int64) for b in bins]
    for piece in pieces:
        for s, count, width in zip(searches, counts, bins, strict=True):
            row = piece[s.row].contiguous().view(torch.int32)
            inside = row if s.shift == 31 else row[(row >> s.shift) == s.prefix]
            count += torch.bincount((inside >> shift) & (width - 1), minlength=width).cpu()
    for s, count in zip(searches, counts, strict=True):
        above = count.flip(0).cumsum(0)  # above[j]: scores in the j + 1 highest bins
        top = int(torch.searchsorted(above, s.rank))
        s.rank -= int(above[top - 1]) if top else 0
        s.prefix = (s.prefix << (s.shift - shift)) + len(above) - 1 - top
        s.shift = shift


def spread(count: int, size: int) -> Tensor:
    """``count`` places in [0, size), one in each of as many equal stretches, not at equal distances, (count) int64."""
    if count >= size:
        return torch.arange(size)
    stretch = torch.arange(count, dtype=torch.float64)
    inside = (stretch * ((math.sqrt(5) - 1) / 2)) % 1.0  # equal distances would meet the same columns again and again
    return ((stretch + inside) * (size / count)).long().clamp(max=size - 1)
