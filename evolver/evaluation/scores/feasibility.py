"""Whether a model keeps the constraints of a run, as far as they are about its answers to the dev items.

A constraint on a task is kept if a one-sided lower confidence bound of the paired difference to a reference model is
not below the drop that is allowed. Where a metric is the mean of scores from 0 to 1, the bound is the normal one of the
items' differences and of one more item, which the model loses. Such pseudo-items keep a bound from collapsing where two
models differ on few items (Agresti & Min 2005, "Simple improved confidence intervals for comparing matched
proportions"); with this one it holds at its confidence for any number of items, as the tests show. Of other means the
bound is Student's. Of metrics that look at all answers together it is the percentile of a paired bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy

from evolver.config.constraints import BEST_EXPERT, Constraint
from evolver.errors import BadInput
from evolver.evaluation.scores.comparison import resampled
from evolver.evaluation.scores.metrics import Numbers
from evolver.evaluation.scores.scoring import Scale
from evolver.records import ItemAnswer, Result


@dataclass(frozen=True)
class Difference:
    """A model's metric of a task less that of a reference model, and its one-sided lower bound; in the metric's own
    units, more being better.
    """

    mean: float
    low: float


@dataclass(frozen=True)
class Guards:
    """The constraints of a run on tasks, with the models that they compare with.

    Args:
        constraints: all constraints of the run; those that are not about a task are left to the workers.
        scale: how the items make up the score.
        references: the answers of the reference model of each constraint on a task, by the constraint's number.
        seed: seed of the resampling of metrics that look at all answers together.
    """

    constraints: Sequence[Constraint]
    scale: Scale
    references: Mapping[int, Sequence[ItemAnswer]]
    seed: int = 0

    def judged(self, result: Result) -> Result:
        """The result with all violations; as it is where not all items are scored."""
        if not self.references or not result.complete or result.score is None:
            return result
        found = {str(n): self.violation(n, result.items) for n in self.references}
        return replace(result, violations={**result.violations, **found})

    def violation(self, number: int, items: Sequence[ItemAnswer]) -> float:
        """By how much a model with these answers breaks a constraint on a task; at most 0 where it is kept."""
        return -self.allowed(number) - self.difference(number, items).low

    def allowed(self, number: int) -> float:
        """The drop that a constraint allows, in the metric's own units."""
        constraint = self.constraints[number]
        points = self.scale.metrics[str(constraint.task)].points
        return constraint.drop / 100 if points else constraint.drop

    def difference(self, number: int, items: Sequence[ItemAnswer]) -> Difference:
        """The difference that a constraint is about."""
        constraint = self.constraints[number]
        task, theirs = str(constraint.task), self.references[number]
        metric, places = self.scale.metrics[task], self.scale.places[task]
        if not metric.judged:
            alone = self.scale.alone(task)
            ours, others = ([answers[p] for p in places] for answers in (items, theirs))
            one, other = resampled([ours, others], alone, self.seed)
            low = float(np.quantile(one - other, 1 - constraint.confidence))
            return Difference(alone.score(ours) - alone.score(others), low)
        each = np.asarray([items[p] for p in places], float) - np.asarray([theirs[p] for p in places], float)
        return _of_means(each, constraint.confidence, bounded=metric.best == 1.0)


def guards(
    constraints: Sequence[Constraint], scale: Scale, baselines: Mapping[str, Result], experts: Sequence[str], seed: int
) -> Guards:
    """The constraints with their reference models.

    Args:
        baselines: results of all baselines on the items, by label.
        experts: the labels of the experts.

    Raises BadInput where a reference model could not be scored.
    """
    references = {}
    for number, constraint in enumerate(constraints):
        if constraint.task is not None:
            label = compared_with(constraint, baselines, experts) or constraint.against
            if label not in baselines or baselines[label].score is None:
                reason = baselines[label].reason if label in baselines else "there is no result of it"
                raise BadInput(
                    f"constraints[{number}].against: {label} could not be scored on the dev "
                    f"items ({reason}), so no merge can be compared with it; compare with another model."
                )
            references[number] = baselines[label].items
    return Guards(constraints, scale, references, seed)


def compared_with(constraint: Constraint, results: Mapping[str, Result], experts: Sequence[str]) -> str | None:
    """The label of the model that a constraint on a task compares with; of equal experts the first."""
    if constraint.against != BEST_EXPERT:
        return constraint.against if constraint.against in results else None
    scored = [e for e in experts if e in results and results[e].score is not None]
    return max(scored, key=lambda e: results[e].tasks[str(constraint.task)], default=None)


def unprovable(constraints: Sequence[Constraint], scale: Scale) -> Iterator[str]:
    """A sentence on each constraint that even a model with the reference's very answers does not keep: the dev items
    are too few to show so small a drop.
    """
    for number, constraint in enumerate(constraints):
        places = scale.places.get(constraint.task or "", [])
        if places and scale.metrics[str(constraint.task)].judged:
            same = Guards(constraints, scale, {number: (0.0,) * len(scale.tasks)})
            if same.violation(number, (0.0,) * len(scale.tasks)) > 0:
                yield (
                    f"constraints[{number}]: on {len(places)} dev items of {constraint.task}, not even equal answers "
                    f"show at a confidence of {constraint.confidence:g} that at most {constraint.drop:g} points are "
                    "lost, so only a merge that gains can keep it; use more dev items, or allow a larger drop"
                )


def _of_means(each: Numbers, confidence: float, bounded: bool) -> Difference:
    """The mean of paired differences and its lower bound.

    Args:
        each: the difference on each item, (n).
        bounded: whether differences lie between -1 and 1.
    """
    mean = math.fsum(each) / len(each)
    if bounded:
        more = [*each, -1.0]
        middle = math.fsum(more) / len(more)
        spread = math.fsum(d * d for d in more) / len(more) - middle**2
        low = middle - float(scipy.stats.norm.ppf(confidence)) * math.sqrt(max(0.0, spread) / len(more))
        return Difference(mean, low)
    if len(each) < 2:
        return Difference(mean, -math.inf)
    error = float(np.std(each, ddof=1)) / math.sqrt(len(each))
    return Difference(mean, mean - scipy.stats.t.ppf(confidence, len(each) - 1) * error)
