"""Bootstrap resamples of items, as numbers of times that each item is drawn.

Items that come from one source document are not independent: a model that misreads the document tends to get all of
them wrong. Documents are therefore drawn, each with all of its items. They are drawn within strata. A stratum holds the
documents whose items belong to the same tasks, so that where every document has one item the strata are the tasks.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from evolver.evaluation.scores.metrics import Numbers
from evolver.evaluation.scores.scoring import Scale

# The most numbers that are held in memory at once.
HELD = 1 << 22
# Of two-sided tests.
SIGNIFICANCE = 0.05
# Scores that agree to so many digits are equal: sums are rounded.
DIGITS_OF_SCORES = 12

Indices = NDArray[np.int64]


def clusters_of(keys: Sequence[Sequence[Hashable]]) -> tuple[int, ...]:
    """The number of each item's source document; empty where no two items share one.

    Args:
        keys: what each item may share with others, such as hashes of its content and of its text. Items that share a
            key come from one document, and so do items that are connected by others.
    """
    known: dict[Hashable, int] = {}
    pairs = [(item, known.setdefault(key, len(known))) for item, own in enumerate(keys) for key in own]
    if len(known) == sum(map(len, keys)):  # all keys differ
        return ()
    rows, columns = (np.asarray(side) for side in zip(*pairs, strict=True))
    size = len(keys) + len(known)
    graph = coo_array((np.ones(len(pairs)), (rows, len(keys) + columns)), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    _, numbers = np.unique(labels[: len(keys)], return_inverse=True)
    return tuple(map(int, numbers)) if numbers.max() + 1 < len(keys) else ()


class Resampling:
    """The resamples of the items of a scale.

    Args:
        scale: how items make up the score, and which items share a document.

    Attributes:
        clusters: the document of every item, (n), numbered from 0.
        strata: the documents of each stratum.
    """

    def __init__(self, scale: Scale) -> None:
        self.clusters: Indices = np.asarray(scale.clusters or range(len(scale.tasks)), dtype=np.int64)
        self._tasks = scale.tasks
        tasks: list[set[str]] = [set() for _ in range(int(self.clusters.max()) + 1)]
        for cluster, task in zip(self.clusters, scale.tasks, strict=True):
            tasks[cluster].add(task)
        strata: dict[tuple[str, ...], list[int]] = {}
        for cluster, members in enumerate(tasks):
            strata.setdefault(tuple(sorted(members)), []).append(cluster)
        self.strata: list[Indices] = [np.asarray(found) for _, found in sorted(strata.items())]

    @cached_property
    def smallest(self) -> int:
        """The smallest number of documents of a task that a resample can leave out. The only document of a stratum is
        in every resample.
        """
        free = {int(c) for members in self.strata if len(members) > 1 for c in members}
        found: dict[str, set[int]] = {task: set() for task in self._tasks}
        for cluster, task in zip(map(int, self.clusters), self._tasks, strict=True):
            found[task] |= {cluster} & free
        return min(map(len, found.values()))

    def draw(self, rng: np.random.Generator, rounds: int) -> Numbers:
        """How often each item is drawn in each round, (rounds, n)."""
        times = np.zeros((rounds, int(self.clusters.max()) + 1))
        for members in self.strata:
            times[:, members] = times_drawn(rng.integers(len(members), size=(rounds, len(members))))
        return times[:, self.clusters]

    def blocks(self, rounds: int, width: int) -> Iterator[int]:
        """Numbers of rounds that add up to ``rounds``, each small enough for tables of this width."""
        step = max(1, HELD // max(width, len(self.clusters)))
        return (min(step, rounds - start) for start in range(0, rounds, step))


def times_drawn(drawn: NDArray[np.int64]) -> Numbers:
    """How often each of n items is among the drawn ones, (R, n), which are given as places, (R, n)."""
    resamples, count = drawn.shape
    cells = (np.arange(resamples)[:, None] * count + drawn).ravel()
    return np.bincount(cells, minlength=resamples * count).reshape(resamples, count).astype(np.float64)
