"""The Pareto front of a set of points, the hypervolume that they dominate, and the points that matter most for it.

More is better in every objective. The computations are moocore's.
"""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

RowPlaces = NDArray[np.int64]


def front(points: ArrayLike) -> RowPlaces:
    """The places of the points that no other point reaches in every objective and exceeds in one; equal ones are all
    on the front.

    Args:
        points: (N, objectives).
    """
    values = np.asarray(points, dtype=float)
    if not len(values):
        return np.zeros(0, np.int64)
    return np.flatnonzero(moocore.is_nondominated(values, maximise=True, keep_weakly=True))


def hypervolume(points: ArrayLike) -> float:
    """The volume that is dominated by the points, with the origin as reference point.

    Args:
        points: (N, objectives), N at least 1; negative values count as 0.
    """
    values = np.clip(np.asarray(points, dtype=float), 0.0, None)
    return float(moocore.hypervolume(values, ref=np.zeros(values.shape[1]), maximise=True))


def thinned(points: ArrayLike, count: int) -> list[int]:
    """At most ``count`` places of a front, those that matter most for its hypervolume above its lowest values.

    The point that adds least to the volume goes first, until so many are left; of those that add equally little the
    last one. The objectives are scaled to the range of the points, so that each counts alike.

    Args:
        points: (N, objectives), the front, each point once.
    """
    values = np.asarray(points, dtype=float)
    low, high = values.min(0), values.max(0)
    scaled = (values - low) / np.where(high > low, high - low, 1.0)
    kept: Sequence[int] = list(range(len(values)))
    # Below the lowest values, so that the points at the ends of the front have volumes of their own.
    reference = np.full(values.shape[1], -1.0)
    while len(kept) > count:
        adds = moocore.hv_contributions(scaled[kept], ref=reference, maximise=True)
        least = len(kept) - 1 - int(np.argmin(adds[::-1]))
        kept = [place for at, place in enumerate(kept) if at != least]
    return list(kept)


def spread_front(points: Sequence[tuple[float, ...]], count: int) -> list[int]:
    """The places of the points on the front, of equal ones the first; if there are more than ``count``, those that
    matter most for its hypervolume (see ``thinned``). They ascend.
    """
    first: dict[tuple[float, ...], int] = {}
    for place in front(points):
        first.setdefault(points[place], int(place))
    places = list(first.values())
    return [places[at] for at in thinned(list(first), count)] if first else []
