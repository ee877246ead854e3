"""Metrics: from the answers to a task's items, and the right ones, to one number.

Most are means of items that were judged one by one. The others look at all answers together: what is kept of an item
is then its answer (a class, a value, a set of labels as the bits of a number), and a metric is computed anew on every
resample of the items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evolver.errors import BadInput, nearest

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A metric of which more is better; where the field's metric is one of which less is better, its negative.

    Args:
        of: from answers and right answers of n items, (R, n) both, to values (R).
        best: the highest value, or None where nobody can say.
        judged: an answer is a score of its item already, and the metric their mean.
        negative: values are those of the field's metric with the other sign.
    """

    name: str
    of: Callable[[Numbers, Numbers], Numbers]
    best: float | None = 1.0
    judged: bool = False
    negative: bool = False

    @property
    def share(self) -> bool:
        """Whether values lie between 0 and 1 (or -1 and 1) and read well as percentages."""
        return self.best == 1.0

    def form(self) -> dict[str, Any]:
        """As JSON has it; the function by its name."""
        return {**vars(self), "of": self.of.__name__}

    @staticmethod
    def from_form(form: Mapping[str, Any]) -> Metric:
        """The inverse of ``form``.

        Raises KeyError for a function that is not one of this module's.
        """
        return Metric(**{**form, "of": _functions()[form["of"]]})


def metric_named(name: str, known: Mapping[str, Metric], key: str) -> Metric:
    """The metric of a name.

    Raises BadInput that names ``key`` for one that is not among the ``known``.
    """
    if name not in known:
        raise BadInput(f"{key}: unknown metric {name!r}; {nearest(name, known)}")
    return known[name]


def mean(answers: Numbers, _: Numbers) -> Numbers:
    """Means of items that were judged, (R)."""
    means: Numbers = answers.mean(-1)
    return means


def macro_f1(answers: Numbers, right: Numbers) -> Numbers:
    """The mean over the classes that occur of F1 = 2·hits / (given + right), (R)."""
    counts = _confusion(answers, right)
    hits, occur = np.diagonal(counts, axis1=1, axis2=2), counts.sum(1) + counts.sum(2)
    f1: Numbers = _divided(2 * hits, occur).sum(1) / (occur > 0).sum(1)
    return f1


def mcc(answers: Numbers, right: Numbers) -> Numbers:
    """Matthews' correlation for any number of classes (Gorodkin 2004, equation 8), (R); 0 where it is undefined."""
    counts = _confusion(answers, right).astype(np.float64)
    given, wanted, total = counts.sum(1), counts.sum(2), counts.sum((1, 2))
    hits = np.trace(counts, axis1=1, axis2=2)
    spread = (total**2 - (given**2).sum(1)) * (total**2 - (wanted**2).sum(1))
    return _divided(hits * total - (given * wanted).sum(1), np.sqrt(spread))


def pearson(answers: Numbers, right: Numbers) -> Numbers:
    """Pearson's correlation of values, (R); 0 where it is undefined."""
    a = answers - answers.mean(-1, keepdims=True)
    b = right - right.mean(-1, keepdims=True)
    return _divided((a * b).sum(-1), np.sqrt((a * a).sum(-1) * (b * b).sum(-1)))


def labels_f1(answers: Numbers, right: Numbers) -> Numbers:
    """The mean over the labels that occur of each one's F1, where an answer is a set of labels, (R)."""
    given, wanted = answers.astype(np.int64), right.astype(np.int64)
    total, labels = np.zeros(len(given)), np.zeros(len(given))
    for label in range(int(max(given.max(initial=0), wanted.max(initial=0))).bit_length()):
        g, w = given >> label & 1, wanted >> label & 1
        occur = g.sum(-1) + w.sum(-1)
        total += _divided(2 * (g & w).sum(-1), occur)
        labels += occur > 0
    return _divided(total, labels)


def binary_f1(answers: Numbers, right: Numbers) -> Numbers:
    """F1 of class 1, (R); 0 where neither an answer nor a right one is of it."""
    given, wanted = answers == 1, right == 1
    return _divided(2 * (given & wanted).sum(-1), given.sum(-1) + wanted.sum(-1))


def median_item(answers: Numbers, _: Numbers) -> Numbers:
    """The upper median, (R)."""
    middle: Numbers = np.sort(answers, -1)[..., answers.shape[-1] // 2]
    return middle


def perplexity(answers: Numbers, _: Numbers) -> Numbers:
    """-exp(-mean of the items' log-likelihoods), (R)."""
    found: Numbers = -np.exp(-answers.mean(-1))
    return found


def weighted_perplexity(answers: Numbers, right: Numbers) -> Numbers:
    """-exp(-Σ log-likelihoods / Σ words or bytes), (R); what is kept as the right answer is the count."""
    found: Numbers = -np.exp(-answers.sum(-1) / right.sum(-1))
    return found


def bits_per_byte(answers: Numbers, right: Numbers) -> Numbers:
    """Σ log₂-likelihoods / Σ bytes, (R): the negative of the bits that a byte takes."""
    found: Numbers = answers.sum(-1) / right.sum(-1) / np.log(2)
    return found


def opposite(answers: Numbers, right: Numbers) -> Numbers:
    """The negative of the median, (R)."""
    return -median_item(answers, right)


JUDGED = Metric("mean", mean, judged=True)
ENDLESS = Metric("mean", mean, best=None, judged=True)
# Judged items of which less is better are kept with the other sign.
ERRORS = Metric("mean", mean, best=None, judged=True, negative=True)
# Of a classifier that names one class, of one that names a set of labels, and of one that gives a number.
CLASS = {"acc": JUDGED, "macro_f1": Metric("macro_f1", macro_f1), "mcc": Metric("mcc", mcc)}
LABELS = {"acc": JUDGED, "macro_f1": Metric("macro_f1", labels_f1)}
VALUE = {"pearson": Metric("pearson", pearson)}


def _functions() -> dict[str, Callable[[Numbers, Numbers], Numbers]]:
    known = (
        mean, macro_f1, mcc, pearson, labels_f1, binary_f1, median_item, perplexity, weighted_perplexity, bits_per_byte,
        opposite,
    )  # fmt: skip
    return {function.__name__: function for function in known}


def _confusion(answers: Numbers, right: Numbers) -> NDArray[Any]:
    """How often each class was given for each right one, (R, right, given)."""
    classes, resamples = int(max(answers.max(initial=0), right.max(initial=0))) + 1, len(answers)
    cells = (np.arange(resamples)[:, None] * classes + right.astype(np.int64)) * classes + answers.astype(np.int64)
    return np.bincount(cells.ravel(), minlength=resamples * classes**2).reshape(resamples, classes, classes)


def _divided(above: NDArray[Any], below: NDArray[Any]) -> Numbers:
    """A quotient; 0 where ``below`` is not above 0."""
    out: Numbers = np.divide(above, below, out=np.zeros(np.shape(above)), where=below > 0)
    return out
