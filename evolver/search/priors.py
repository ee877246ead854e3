"""Weights that are guessed before any merge is scored, from task vectors or from the experts' scores: where a search
begins.

Functions of task vectors take their Gram matrix, (E, E) in float64: inner products over a whole model or over a part of
it, with the squared norms on the diagonal. The weights that all functions return are not negative and sum to 1. An
expert whose task vector is zero equals the base there and adds nothing, so its weight is 0; where that holds for all,
the weights are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from evolver.records import Standing

GramMatrix = NDArray[np.float64]
Weighing = Callable[[GramMatrix], tuple[float, ...]]

# Sums of millions of products differ in their last digits from machine to machine. Weights are rounded to so many
# digits, so that a run which is resumed elsewhere begins with the same models.
WEIGHT_DIGITS = 6

COCKTAIL_TEMPERATURE = 0.1


def inverse_norms(products: GramMatrix) -> tuple[float, ...]:
    """Weights in inverse proportion to the norms of the task vectors (NAN, Si et al. 2025, arXiv 2505.16148): w_i ∝
    1 / ‖τ_i‖, so that each expert moves the merge equally far.
    """
    norms = _norms(products)
    return _shares(np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0))


def relevance(products: GramMatrix) -> tuple[float, ...]:
    """Weights in proportion to how far each task vector points where all of them want to go: w_i ∝ max(0, cos(τ_i, u))
    with u = Σ_j τ_j / ‖τ_j‖.

    This is the first linear minimisation of FW-Merging (Chen et al. 2025, arXiv 2503.12649) read without data. There
    the expert is most relevant that lies furthest along the negative gradient of the tasks' losses; here each expert's
    unit task vector stands for the direction in which its task's loss falls.
    """
    return _shares(_cosines(products).sum(1).clip(min=0.0))


def cluster_weights(products: GramMatrix) -> tuple[float, ...]:
    """Equal weights for clusters of similar experts, and within each cluster for its experts: the average of the
    clusters' averages (Model-GLUE, Zhao et al. 2024, arXiv 2410.05357, which clusters before it merges).

    Clusters are joined as long as the mean cosine between their task vectors is not below that of all pairs. Model-GLUE
    compares whole weights with a fixed bound; the task vectors of fine-tunes have cosines of any size, so the bound is
    relative here.
    """
    moved = np.flatnonzero(_norms(products) > 0)
    out = np.zeros(len(products))
    if len(moved) < 2:
        out[moved] = 1.0
        return _shares(out)
    distances = squareform((1.0 - _cosines(products)[np.ix_(moved, moved)]).clip(min=0.0), checks=False)
    bound = distances.mean() + 1e-9  # equal cosines differ by their rounding
    cluster = fcluster(linkage(distances, "average"), bound, "distance")
    sizes = np.bincount(cluster)
    out[moved] = 1.0 / sizes[cluster]
    return _shares(out)


def depth_mass(depth: float, mass: float) -> float:
    """The total mass at a depth, from 0 in the first layer to 1 in the last: it grows linearly from half of ``mass`` to
    one and a half times it (LiNeS, Wang et al. 2024, arXiv 2410.17146, α + β·l / (L - 1) with β = 2·α).
    """
    return mass * (0.5 + depth)


def soup_order(standings: Sequence[Standing]) -> list[tuple[float, ...]]:
    """Weights of the averages of the best two experts, the best three and so on, up to all of them: the order of the
    greedy soup (Wortsman et al. 2022, arXiv 2203.05482). Of equally good ones the earlier comes first.
    """
    ranked = sorted(range(len(standings)), key=lambda i: standings[i], reverse=True)  # a stable sort
    return [
        tuple(1.0 / count if i in ranked[:count] else 0.0 for i in range(len(ranked)))
        for count in range(2, len(ranked) + 1)
    ]


def score_shares(standings: Sequence[Standing]) -> tuple[float, ...]:
    """Weights in proportion to the experts' scores (MWA, Yu and Choi 2025, arXiv 2504.18580, with a power of 1): w_i ∝
    max(0, score_i).

    An expert without a score has the weight 0; where no score is above 0, the weights are equal.
    """
    return _shares(_scores(standings).clip(min=0.0))


def score_softmax(standings: Sequence[Standing]) -> tuple[float, ...]:
    """Weights w_i ∝ exp(score_i / (T · max |score|)) with T = 0.1 (LM-Cocktail, Xiao et al. 2023, arXiv 2311.13534).

    The paper has losses of language models and T = 5. Relative to the largest score, T depends on no unit; an expert
    that is better by a tenth of that has e times the weight. An expert without a score has the weight 0.
    """
    scores = _scores(standings)
    known = np.isfinite(scores)
    if not known.any():
        return _shares(np.zeros(len(scores)))
    largest = np.abs(scores[known]).max() or 1.0
    return _shares(np.exp((scores - scores[known].max()) / (COCKTAIL_TEMPERATURE * largest)))


def _scores(standings: Sequence[Standing]) -> GramMatrix:
    """The scores (E); minus infinity for a model that has none."""
    return np.array([score for _, score in standings], dtype=np.float64)


def _norms(products: GramMatrix) -> GramMatrix:
    out: GramMatrix = np.sqrt(np.diagonal(products).clip(min=0.0))
    return out


def _cosines(products: GramMatrix) -> GramMatrix:
    """Cosines (E, E); a vector of norm 0 has cosine 0 with all."""
    scale = np.outer(_norms(products), _norms(products))
    out: GramMatrix = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return out


def _shares(raw: GramMatrix) -> tuple[float, ...]:
    total = float(raw.sum())
    found = [round(float(v) / total, WEIGHT_DIGITS) if total > 0 else 1.0 for v in raw]
    return tuple(v / sum(found) for v in found)
