"""Metrics: functions from the answers to a task's items, and the right answers, to one number.

Most metrics are means over items that were judged one by one, for example accuracy. The others look at all answers
together, for example Matthews' correlation. For these, the ledger keeps the answer to an item (a class, a value, or a
set of labels as the bits of a number), and the metric is computed again on every resample of the items. Some of these
are functions of counts that are added up over the items, for example BLEU. For them, the ledger keeps each item's
counts.
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
    """A metric of which higher values are better. Where lower values are better, as of perplexity, it is the negative.

    Args:
        name: name of the metric.
        of: function from the answers and the right answers of n items in R resamples, both (R, n), to the values (R).
        best: the highest possible value; None where it is unknown.
        judged: whether an answer is already the score of its item, and the metric the mean of these scores.
        negative: whether the values are those of the usual metric with the opposite sign.
        counts: how many counts of each item the metric is computed from; 0 for metrics that are computed from the
            answers. Where there are counts, ``of`` gets their sums over the items of each resample, (R, counts).
    """

    name: str
    of: Callable[[Numbers, Numbers], Numbers]
    best: float | None = 1.0
    judged: bool = False
    negative: bool = False
    counts: int = 0

    @property
    def share(self) -> bool:
        """Whether values lie between 0 and 1 (or -1 and 1) and read well as percentages."""
        return self.best == 1.0

    @property
    def points(self) -> bool:
        """Whether values are written times 100."""
        return self.share or self.of is ter

    @property
    def compares(self) -> bool:
        """Whether the metric is computed from answers and right answers."""
        return not self.judged and not self.counts

    def form(self) -> dict[str, Any]:
        """The metric as a JSON object, in which the function stands by its name."""
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
    """The means of judged items, (R)."""
    means: Numbers = answers.mean(-1)
    return means


def macro_f1(answers: Numbers, right: Numbers) -> Numbers:
    """Macro F1, (R): the mean of F1 = 2·hits / (given + right) over the classes that occur."""
    counts = _confusion(answers, right)
    hits, occur = np.diagonal(counts, axis1=1, axis2=2), counts.sum(1) + counts.sum(2)
    f1: Numbers = divided(2 * hits, occur).sum(1) / (occur > 0).sum(1)
    return f1


def mcc(answers: Numbers, right: Numbers) -> Numbers:
    """Matthews' correlation for any number of classes (Gorodkin 2004, equation 8), (R). It is 0 where undefined."""
    counts = _confusion(answers, right).astype(np.float64)
    given, wanted, total = counts.sum(1), counts.sum(2), counts.sum((1, 2))
    hits = np.trace(counts, axis1=1, axis2=2)
    spread = (total**2 - (given**2).sum(1)) * (total**2 - (wanted**2).sum(1))
    return divided(hits * total - (given * wanted).sum(1), np.sqrt(spread))


def pearson(answers: Numbers, right: Numbers) -> Numbers:
    """Pearson's correlation of answers and right answers, (R). It is 0 where undefined."""
    a = answers - answers.mean(-1, keepdims=True)
    b = right - right.mean(-1, keepdims=True)
    return divided((a * b).sum(-1), np.sqrt((a * a).sum(-1) * (b * b).sum(-1)))


def labels_f1(answers: Numbers, right: Numbers) -> Numbers:
    """Macro F1 of answers that are sets of labels, (R): the mean of each label's F1 over the labels that occur."""
    given, wanted = answers.astype(np.int64), right.astype(np.int64)
    total, labels = np.zeros(len(given)), np.zeros(len(given))
    for label in range(int(max(given.max(initial=0), wanted.max(initial=0))).bit_length()):
        g, w = given >> label & 1, wanted >> label & 1
        occur = g.sum(-1) + w.sum(-1)
        total += divided(2 * (g & w).sum(-1), occur)
        labels += occur > 0
    return divided(total, labels)


def binary_f1(answers: Numbers, right: Numbers) -> Numbers:
    """F1 of class 1, (R). It is 0 where neither the answers nor the right answers contain this class."""
    given, wanted = answers == 1, right == 1
    return divided(2 * (given & wanted).sum(-1), given.sum(-1) + wanted.sum(-1))


def right_share(sums: Numbers, _: Numbers) -> Numbers:
    """The share of right parts, such as words, (R).

    Args:
        sums: right parts, and all parts, (R, 2).
    """
    return divided(sums[:, 0], sums[:, 1])


def span_f1(sums: Numbers, _: Numbers) -> Numbers:
    """F1 of spans, (R). It is 0 where there are no spans.

    Args:
        sums: given spans that are right, given spans, and right spans, (R, 3).
    """
    return divided(2 * sums[:, 0], sums[:, 1] + sums[:, 2])


def median_item(answers: Numbers, _: Numbers) -> Numbers:
    """The upper median of judged items, (R)."""
    middle: Numbers = np.sort(answers, -1)[..., answers.shape[-1] // 2]
    return middle


def perplexity(answers: Numbers, _: Numbers) -> Numbers:
    """The negative perplexity, (R): -exp(-mean of the items' log-likelihoods)."""
    found: Numbers = -np.exp(-answers.mean(-1))
    return found


def weighted_perplexity(answers: Numbers, right: Numbers) -> Numbers:
    """The negative perplexity of a word or byte, (R): -exp(-Σ log-likelihoods / Σ words or bytes).

    ``right`` holds the number of words or bytes of each item.
    """
    found: Numbers = -np.exp(-answers.sum(-1) / right.sum(-1))
    return found


def bits_per_byte(answers: Numbers, right: Numbers) -> Numbers:
    """The negative number of bits for each byte, (R): Σ log₂-likelihoods / Σ bytes.

    ``right`` holds the number of bytes of each item.
    """
    found: Numbers = answers.sum(-1) / right.sum(-1) / np.log(2)
    return found


def opposite(answers: Numbers, right: Numbers) -> Numbers:
    """The negative of the upper median, (R)."""
    return -median_item(answers, right)


def bleu(sums: Numbers, _: Numbers) -> Numbers:
    """BLEU between 0 and 1, (R), with the smoothing of sacreBLEU (``exp``).

    Args:
        sums: words of the answers, words of the nearest references, and for n from 1 to 4 the n-grams that agree, then
            for the same n the n-grams of the answers, (R, 10).
    """
    said, wanted, agree, total = sums[:, 0], sums[:, 1], sums[:, 2:6], sums[:, 6:]
    # Of the orders in which no n-gram agrees, the first counts as half an n-gram, the next as a quarter, and so on.
    agree = np.where(agree > 0, agree, 0.5 ** np.cumsum(agree == 0, axis=1))
    usable = (sums[:, 2:6] > 0).any(1) & (total > 0).all(1)
    precision = divided(agree, total)[usable]
    found = np.zeros(len(sums))
    brevity = np.exp(np.minimum(0.0, 1 - divided(wanted, said)))
    found[usable] = brevity[usable] * np.exp(np.log(precision).mean(1))
    return np.minimum(found, 1.0)  # rounding may lead above, and bounds rest on 1


def chrf(sums: Numbers, _: Numbers) -> Numbers:
    """The metric chrF or chrF++ between 0 and 1, (R): F2 of the mean precision and
    the mean recall over the orders of n-grams.

    Args:
        sums: for each order the n-grams of the answers, those of the references, and those that agree,
            (R, 3 · orders).
    """
    said, wanted, agree = sums[:, 0::3], sums[:, 1::3], sums[:, 2::3]
    orders = ((said > 0) & (wanted > 0)).sum(1)
    both = np.where((said > 0) & (wanted > 0), agree, 0)
    precision, recall = divided(divided(both, said).sum(1), orders), divided(divided(both, wanted).sum(1), orders)
    return np.minimum(divided(5 * precision * recall, 4 * precision + recall), 1.0)


def ter(sums: Numbers, _: Numbers) -> Numbers:
    """The negative translation error rate, (R): edits for each word of the references.

    Args:
        sums: edits, and words of the references, (R, 2). Without any word, each answer with edits counts as one.
    """
    edits, words = sums[:, 0], sums[:, 1]
    return -np.where(words > 0, divided(edits, words), edits > 0)


def closeness(metric: Metric, answers: Numbers, right: Numbers) -> Numbers:
    """How good each answer is, (n), more being better: comparable between models, not between metrics.

    Args:
        answers, right: as they are kept, (n) both; of answers with counts, the items' own scores.
    """
    found: Numbers = answers
    if metric.of in (macro_f1, mcc, labels_f1, binary_f1):
        found = (answers == right).astype(np.float64)
    elif metric.of is pearson:
        found = -np.abs(answers - right)
    return -found if metric.of is opposite else found


JUDGED = Metric("mean", mean, judged=True)
ENDLESS = Metric("mean", mean, best=None, judged=True)
# Judged items of which lower values are better are kept with the opposite sign.
ERRORS = Metric("mean", mean, best=None, judged=True, negative=True)
# The metrics of classifiers that give one class, a set of labels, or a number.
# What a search may see of the answers to dev items beside the scores.
FITNESS = {name: Metric(name, mean, judged=True) for name in ("probability", "both")}
CLASS = {"acc": JUDGED, "macro_f1": Metric("macro_f1", macro_f1), "mcc": Metric("mcc", mcc)}
LABELS = {"acc": JUDGED, "macro_f1": Metric("macro_f1", labels_f1)}
VALUE = {"pearson": Metric("pearson", pearson)}
# The metrics of models that give a tag to each word.
TAGS = {"acc": Metric("acc", right_share, counts=2), "f1": Metric("f1", span_f1, counts=3)}


def _functions() -> dict[str, Callable[[Numbers, Numbers], Numbers]]:
    known = (
        mean, macro_f1, mcc, pearson, labels_f1, binary_f1, right_share, span_f1, median_item, perplexity,
        weighted_perplexity, bits_per_byte, opposite, bleu, chrf, ter,
    )  # fmt: skip
    return {function.__name__: function for function in known}


def _confusion(answers: Numbers, right: Numbers) -> NDArray[Any]:
    """Confusion matrices, (R, right, given): how often each class was given where another one was right."""
    classes, resamples = int(max(answers.max(initial=0), right.max(initial=0))) + 1, len(answers)
    cells = (np.arange(resamples)[:, None] * classes + right.astype(np.int64)) * classes + answers.astype(np.int64)
    return np.bincount(cells.ravel(), minlength=resamples * classes**2).reshape(resamples, classes, classes)


def divided(above: NDArray[Any], below: NDArray[Any]) -> Numbers:
    """The quotient of two arrays, and 0 where ``below`` is 0 or less."""
    out: Numbers = np.divide(above, below, out=np.zeros(np.shape(above)), where=below > 0)
    return out
