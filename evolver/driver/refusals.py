"""What of a configuration does not go together with its search or its tasks, and is refused before any scoring."""

from __future__ import annotations

from typing import Any

from evolver.config import Config
from evolver.config.evaluation import TaskEntry
from evolver.driver.objectives import objectives_of
from evolver.errors import BadInput
from evolver.evaluation.scores.estimates import Estimates, first_unjudged
from evolver.evaluation.scores.metrics import VALUE
from evolver.evaluation.scores.scoring import Scale
from evolver.evaluation.tasks import Tasks
from evolver.search import SEARCHES
from evolver.search.halving import HalvingSettings


def refuse_estimate(config: Config, algorithm: str) -> None:
    """Raises BadInput for what needs whole scores while the search goes on, where it sees estimates."""
    given = {
        f"search.algorithm: {algorithm}": SEARCHES[algorithm].partial,
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


def refuse_unfit(config: Config, algorithm: str, settings: Any, estimates: Estimates, tasks: Tasks) -> None:
    """Raises BadInput for keys that do not go together with the search or the tasks."""
    _refuse_racing(config, algorithm, estimates)
    _refuse_subset(config, settings)
    _refuse_goals(config, estimates.scale)
    _refuse_unmet(config, tasks, estimates)
    _refuse_gradients(config, tasks, algorithm, settings)


def _refuse_gradients(config: Config, tasks: Tasks, algorithm: str, settings: Any) -> None:
    """Raises BadInput where a search needs gradients and this run has none, or none of the loss that it makes small."""
    if not (losses := SEARCHES[algorithm].losses):
        return
    evaluation, loss = config.evaluation, getattr(settings, "loss", losses[0])
    if evaluation.backend != "resident":
        raise BadInput(
            f"evaluation.backend: {algorithm} takes gradients, which the backend {evaluation.backend} does not give; "
            "write resident."
        )
    if evaluation.rounding("dev"):
        raise BadInput(
            f"evaluation.quantise: {algorithm} takes gradients, and rounded weights have none; leave quantise out, or "
            "write quantise_search: false, so that only the models that are chosen from are rounded."
        )
    for number, entry in enumerate(tasks.entries):
        key = f"evaluation.tasks[{number}]"
        if not tasks.judges[entry.task].tells_padding(entry):
            raise BadInput(
                f"{key}: {algorithm} takes gradients of forward passes, and {entry.task} is scored in a way that does "
                "not show them, as where a text is written; leave the task out, or search with scores, such as tpe."
            )
        if loss == "entropy" and not _chooses_labels(config, entry):
            raise BadInput(
                f"{key}: {algorithm} makes the entropy of predicted labels small, and {entry.task} has no labels to "
                "predict; a language model would only learn to repeat itself. Write algorithm: expert_merging."
            )


def _chooses_labels(config: Config, entry: TaskEntry) -> bool:
    kinds = ("classifier", "token-classifier", "image-classifier")
    return (entry.judge or config.model.kind) in kinds and entry.metric not in VALUE


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


def _refuse_unmet(config: Config, tasks: Tasks, estimates: Estimates) -> None:
    """Raises BadInput where an objective would have no estimate, as the means of the first items say nothing of it."""
    estimate, block = config.evaluation.estimate, estimates.block
    if estimate is None or estimate.kind != "mean" or config.evaluation.subset == "rotate":
        return
    met = set(estimates.scale.tasks[: -(-estimate.items // block) * block])
    for objective in objectives_of(config, tasks):
        missing = [task for task in objective.shares if task not in met]
        if missing:
            raise BadInput(
                f"evaluation.estimate.items: none of the first {estimate.items} dev items is of {missing[0]}, which "
                f"the objective {objective.name} needs; write more items, or write kind: difference, which estimates "
                "it from the other tasks."
            )
