"""How much of the space of objectives a set of points dominates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from optuna._hypervolume import compute_hypervolume


def hypervolume(points: Sequence[Sequence[float]]) -> float:
    """The volume of what lies between the origin and the points, more being better in every objective (Optuna's
    algorithm, which minimises).
    """
    values = np.clip(np.asarray(points, dtype=float), 0.0, None)
    return float(compute_hypervolume(-values, np.zeros(values.shape[1])))
