"""What of a configuration does not go together with its search or its tasks, and is refused before any scoring."""

from __future__ import annotations

from typing import Any

from evolver.config import Config
from evolver.errors import BadInput
from evolver.evaluation.scores.estimates import Estimates, first_unjudged
from evolver.evaluation.scores.scoring import Scale
from evolver.search import SEARCHES
from evolver.search.halving import HalvingSettings


def refuse_misfits(config: Config, algorithm: str, settings: Any, estimates: Estimates) -> None:
    """Raises BadInput for racing, a part of the items, a target or a constraint that cannot be used."""
    _refuse_racing(config, algorithm, estimates)
    _refuse_subset(config, settings)
    _refuse_goals(config, estimates.scale)


def refuse_estimate(config: Config, settings: Any) -> None:
    """Raises BadInput for what needs whole scores while the search goes on, where it sees estimates."""
    given = {
        "search.algorithm: halving": isinstance(settings, HalvingSettings),
        "evaluation.racing": config.evaluation.racing is not None,
        "constraints": bool(config.constraints),
        "budget.minutes": config.budget.minutes is not None,
        "budget.patience": config.budget.patience is not None,
        "budget.target": config.budget.target is not None,
    }
    for key, wanted in given.items():
        if wanted:
            raise BadInput(
                f"evaluation.estimate: with estimates, candidates have no scores of all items until the search has "
                f"ended, and {key} needs them before; leave one of the two out."
            )


def _refuse_racing(config: Config, algorithm: str, estimates: Estimates) -> None:
    """Raises BadInput if racing is switched on but cannot be used."""
    if config.evaluation.racing is None:
        return
    if not SEARCHES[algorithm].incumbent:
        able = ", ".join(n for n, a in SEARCHES.items() if a.incumbent)
        raise BadInput(
            "evaluation.racing: in a race, a candidate competes with the model that it would replace, and "
            f"{algorithm} replaces none; leave racing out, or search with {able}."
        )
    if not config.evaluation.early_stopping:
        raise BadInput(
            "evaluation.racing: racing stops candidates early, but early_stopping is false; leave racing out, or "
            "write early_stopping: true."
        )
    task = first_unjudged(estimates.scale)
    if task is not None:
        raise BadInput(
            f"evaluation.racing: racing needs a score from 0 to 1 for each item, which the metric of {task} does not "
            "give; leave racing out, or choose another metric."
        )


def _refuse_subset(config: Config, settings: Any) -> None:
    """Raises BadInput if the part of the items is chosen for a search that scores all of them."""
    given = config.evaluation
    partial = isinstance(settings, HalvingSettings) or given.racing is not None or given.estimate is not None
    if given.subset is not None and not partial:
        raise BadInput(
            "evaluation.subset: this search scores every candidate on the same dev items up to the end, or until its "
            "decision is certain; leave subset out, or use the search halving, evaluation.racing or "
            "evaluation.estimate."
        )


def _refuse_goals(config: Config, scale: Scale) -> None:
    """Raises BadInput for a target that no model can reach, and for a constraint on a group whose metric is made of
    those of several tasks.
    """
    budget, highest = config.budget, scale.bound(())
    if budget.target is not None and budget.target > highest:
        more = f", such as {budget.target / 100:g} for {budget.target:g} %" if scale.shares else ""
        raise BadInput(
            f"budget.target: {budget.target:g} is above the highest score that there is, {highest:g}; write a score as "
            f"the terminal prints it{more}."
        )

    for number, constraint in enumerate(config.constraints):
        if constraint.task is not None and constraint.task not in scale.weights:
            raise BadInput(
                f"constraints[{number}].task: {constraint.task} is a group, whose metric is made of those of its "
                "tasks; list its tasks one by one under evaluation.tasks, and name one of them."
            )
