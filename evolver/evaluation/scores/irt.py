"""Item-response estimates of the score of all items from the answers to the first ones.

The answers of earlier models say how difficult each item is and how well it separates models. The first answers of a
new model then say how able it is, and its ability predicts its answers to the other items. The methods are those of
Maia Polo et al. 2024, "tinyBenchmarks: evaluating LLMs with fewer examples", section 4 (the model, p-IRT and gp-IRT),
and of Mencattini et al. 2025, "MERGE3" (mp-IRT, which predicts a merged model's ability from those of the merged ones).

The papers fit abilities of several dimensions to hundreds of public models by variational inference. A search starts
with about ten models, so abilities have one dimension here, and the fit is the maximum of the posterior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy
from numpy.typing import NDArray

from evolver.evaluation.scores.metrics import Numbers
from evolver.evaluation.scores.scoring import Scale

EstimateKind = Literal["p-irt", "gp-irt", "mp-irt"]

# Standard deviations of the normal priors of the log discriminations, around 0, and of the difficulties, around that of
# the mean answer. The prior of the abilities is N(0, 1), which fixes the scale.
DISCRIMINATION, DIFFICULTY = 0.5, 2.0
ITERATIONS = 300
# Abilities are searched in [-FURTHEST, FURTHEST]. To be outside, a hundred answers would have to contradict the model.
FURTHEST = 10.0


@dataclass(frozen=True, eq=False)
class ItemModel:
    """A two-parameter item-response model of N items: P(answer is right) = σ(discrimination · θ - difficulty).

    θ is the ability of the model that answers.

    Attributes:
        discrimination: discrimination of every item, (N).
        difficulty: difficulty of every item, (N).
        answers: the answers of the M models that it was fitted to, (M, N); NaN where a model was not asked.
    """

    discrimination: Numbers
    difficulty: Numbers
    answers: Numbers

    def reordered(self, order: Sequence[int]) -> ItemModel:
        """The same model of the items in another order, given by their places, (N)."""
        at = np.asarray(order)
        return ItemModel(self.discrimination[at], self.difficulty[at], self.answers[:, at])

    def ability(self, items: Sequence[float], mean: float = 0.0, spread: float = 1.0) -> float:
        """The most probable ability given the answers to the first items, under the prior N(mean, spread²).

        Raises ValueError for an answer outside [0, 1], and for more answers than there are items.
        """
        return float(self.abilities(_row(items, len(self.difficulty))[None, : len(items)], mean, spread)[0])

    def estimate(
        self, items: Sequence[float], scale: Scale, kind: EstimateKind = "p-irt", experts: Sequence[float] = ()
    ) -> float:
        """Estimate the score of all items. If all items were answered, this is the score itself.

        Let n of the N items of a task be answered, with the mean ȳ. The kinds differ in the value that they use for an
        item without an answer:

        - ``p-irt`` uses p = P(answer is right). The task then has the score n/N · ȳ + (1 - n/N) · mean of p over the
          other items (tinyBenchmarks, equation 4.2).
        - ``gp-irt`` uses λ · ȳ + (1 - λ) · p. The task then has the score λ · ȳ + (1 - λ) · its p-IRT estimate
          (equation 4.3). As in equation 4.4, λ = β² / (β² + v), where v is the variance of ȳ and β the mean error of p.
          Here β is measured on the models that answered the whole task, from as many first items, and v has the factor
          1 - n/N of sampling without replacement.
        - ``mp-irt`` is p-IRT with the ability Σ w_k · θ_k of a merge of K models with the abilities θ_k (MERGE3). The
          weights w_k are independent and normal, with mean 1/K and standard deviation 1/K. In one dimension only their
          sum Σ w_k · θ_k matters, so they become the prior N(mean θ_k, Σ θ_k² / K²) of the ability.

        Args:
            items: the answers to the first items in the run's order, each in [0, 1].
            scale: how items make up the score.
            kind: the kind of estimate.
            experts: the abilities of the models that were merged; for mp-IRT only.

        Raises ValueError for tasks that are not judged item by item, answers outside [0, 1] or more of them than there
        are items, and for mp-IRT without experts.
        """
        if not all(metric.judged for metric in scale.metrics.values()):
            raise ValueError("only metrics that are judged item by item can be estimated")
        if len(scale.tasks) != len(self.difficulty):
            raise ValueError(f"{len(scale.tasks)} items, of {len(self.difficulty)} that the model knows")
        ability = self.ability(items, *_merged(experts)) if kind == "mp-irt" else self.ability(items)
        filled = scipy.special.expit(self.discrimination * ability - self.difficulty)
        filled[: len(items)] = items
        if kind == "gp-irt":
            self._blend(filled, len(items), scale)
        return scale.score(filled.tolist())

    def _blend(self, filled: Numbers, seen: int, scale: Scale) -> None:
        """Blend the values of the items without an answer with the mean of the answered items of their task (gp-IRT).

        Args:
            filled: the answers, and p for the items without one, (N); changed in place.
            seen: the number of items that were answered.
            scale: how items make up the score.
        """
        known = self.abilities(self.answers[:, :seen])
        expected = scipy.special.expit(np.outer(known, self.discrimination) - self.difficulty)
        for places in map(np.array, scale.places.values()):
            first, rest = places[places < seen], places[places >= seen]
            if len(first) and len(rest):
                share = _share(self.answers[:, places], self.answers[:, rest], expected[:, rest], len(first))
                filled[rest] = share * filled[first].mean() + (1 - share) * filled[rest]

    def abilities(self, answers: Numbers, mean: float = 0.0, spread: float = 1.0) -> Numbers:
        """The abilities of M models from their answers to the first n items, (M, n) to (M).

        The derivative of the log posterior decreases with the ability, so bisection finds the ability at which it is 0.
        """
        a, b = self.discrimination[: answers.shape[1]], self.difficulty[: answers.shape[1]]
        low, high = np.full((2, len(answers)), [[-FURTHEST], [FURTHEST]])
        for _ in range(50):
            middle = (low + high) / 2
            surprise = np.nan_to_num(answers - scipy.special.expit(np.outer(middle, a) - b))
            up = surprise @ a > (middle - mean) / spread**2
            low, high = np.where(up, middle, low), np.where(up, high, middle)
        found: Numbers = (low + high) / 2
        return found


def fit_items(answers: Sequence[Sequence[float]], count: int) -> ItemModel:
    """Fit the most probable item model to the answers of M models.

    It maximises Σ y · log p + (1 - y) · log(1 - p) + log priors with p = σ(α_i · θ_m - β_i) (tinyBenchmarks, equation
    4.1) over the abilities θ, discriminations α > 0 and difficulties β. The optimiser is L-BFGS, started from the mean
    answers, so that the same answers give the same model. An answer y between 0 and 1 counts as y right answers and
    1 - y wrong ones.

    Args:
        answers: the answers of each model to the first items, each in [0, 1]; models may have answered different
            numbers of items.
        count: the number of items.

    Raises ValueError without models, for an answer outside [0, 1], and for more answers than items.
    """
    if not answers:
        raise ValueError("there are no models to fit the items to")
    table = np.stack([_row(items, count) for items in answers])
    asked = ~np.isnan(table)
    known, models = np.nan_to_num(table), len(table)
    centre = -scipy.special.logit((known.sum() + 0.5) / (asked.sum() + 1))
    means = (known.sum(0) + scipy.special.expit(-centre)) / (asked.sum(0) + 1)
    start = np.concatenate([np.zeros(models + count), -scipy.special.logit(np.clip(means, 0.01, 0.99))])
    start[:models] = _standardised(np.where(asked, table - means, 0).sum(1) / np.maximum(asked.sum(1), 1))
    found = scipy.optimize.minimize(
        _loss, start, (known, asked, centre), jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS}
    )
    _, logs, difficulty = np.split(found.x, [models, models + count])
    return ItemModel(np.exp(logs), difficulty, table)


def _loss(x: Numbers, known: Numbers, asked: NDArray[np.bool_], centre: float) -> tuple[float, Numbers]:
    """The negative log posterior of abilities, log discriminations and difficulties, and its gradient."""
    models, count = known.shape
    ability, logs, difficulty = np.split(x, [models, models + count])
    discrimination = np.exp(logs)
    z = np.outer(ability, discrimination) - difficulty
    away = (difficulty - centre) / DIFFICULTY
    priors = (ability @ ability + logs @ logs / DISCRIMINATION**2 + away @ away) / 2
    loss = float(np.sum((np.logaddexp(0, z) - known * z) * asked) + priors)
    error = (scipy.special.expit(z) - known) * asked
    slopes = [
        error @ discrimination + ability,
        (ability @ error) * discrimination + logs / DISCRIMINATION**2,
        away / DIFFICULTY - error.sum(0),
    ]
    return loss, np.concatenate(slopes)


def _share(task: Numbers, rest: Numbers, expected: Numbers, seen: int) -> float:
    """λ of gp-IRT. It is 0 if no model has answered the whole task, as the error of p cannot be measured then.

    Args:
        task: the models' answers to the items of the task, (M, N).
        rest: their answers to the items that the new model has not answered, (M, N - seen).
        expected: the answers to these items that the item model predicts, (M, N - seen).
        seen: the number of items that the new model has answered.
    """
    whole = ~np.isnan(task).any(1)
    if not whole.any():
        return 0.0
    size = task.shape[1]
    bias = np.abs(rest[whole].mean(1) - expected[whole].mean(1)).mean() ** 2
    variance = task[whole].var(1).mean() / seen * (1 - seen / size)
    return float(bias / (bias + variance)) if bias > 0 else 0.0


def _merged(experts: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of the prior of a merge's ability, from the abilities of the merged models."""
    if not experts:
        raise ValueError("mp-irt needs the abilities of the models that were merged")
    return float(np.mean(experts)), max(float(np.linalg.norm(experts)) / len(experts), 1e-3)


def _row(items: Sequence[float], count: int) -> Numbers:
    """Answers to the first items, NaN for the rest, (count)."""
    if len(items) > count:
        raise ValueError(f"{len(items)} items of {count}")
    row: NDArray[Any] = np.full(count, np.nan)
    row[: len(items)] = items
    if not np.all((row[: len(items)] >= 0) & (row[: len(items)] <= 1)):
        raise ValueError("answers lie between 0 and 1")
    return row


def _standardised(values: Numbers) -> Numbers:
    spread: Numbers = (values - values.mean()) / max(float(values.std()), 1e-9)
    return spread
