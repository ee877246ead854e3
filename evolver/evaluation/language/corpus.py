"""What is kept of an item for metrics of lm-eval that are computed from the answers to all items.

The counts come from sacreBLEU, with the settings that lm-eval uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np


@cache
def _counting(metric: str) -> Any:
    """The class of sacreBLEU that counts for a metric. The effective order matters only for scores of single items."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    match metric:
        case "bleu":
            return BLEU(effective_order=True, force=True)
        case "ter":
            return TER()
    return CHRF(word_order=2 if metric == "chrf++" else 0)


def counted(metric: str, references: str | Sequence[str], said: str | Sequence[str]) -> tuple[float, ...]:
    """The score of an item alone, more being better, and after it the counts that the metric adds up over all items.

    Args:
        metric: ``bleu``, ``chrf``, ``chrf++`` or ``ter``.
        references: the right text, or several of them.
        said: the answer; a list may hold it, but no second one.

    Raises ValueError where there are several answers.
    """
    texts = [references] if isinstance(references, str) else list(references)
    answers = [said] if isinstance(said, str) else list(said)
    if len(answers) != 1:
        raise ValueError(f"{metric} needs one answer to each item, and the filters left {len(answers)}")
    counting = _counting(metric)
    (counts,) = counting._extract_corpus_statistics(answers, [[text] for text in texts])
    score = counting._compute_score_from_stats(list(counts)).score / 100
    return (-score if metric == "ter" else min(score, 1.0), *map(float, counts))


def brier(right: int, probabilities: Sequence[float]) -> float:
    """The squared distance between the probabilities of the options and the right answer, from 0 to 2."""
    wanted = np.zeros(len(probabilities))
    wanted[right] = 1.0
    return float(np.sum((np.asarray(probabilities) - wanted) ** 2))
