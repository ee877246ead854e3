"""The hypervolume indicator: how much of the objective space a set of points dominates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from optuna._hypervolume import compute_hypervolume


def hypervolume(points: Sequence[Sequence[float]]) -> float:
    """The volume that is dominated by the points, with the origin as reference point.

    Computed by Optuna's implementation, which minimises, on the negated points.

    Args:
        points: (N, objectives), more being better in every objective; negative values count as 0.
    """
    values = np.clip(np.asarray(points, dtype=float), 0.0, None)
    return float(compute_hypervolume(-values, np.zeros(values.shape[1])))
