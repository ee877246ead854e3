"""Writes a coefficient search as an Optuna study into a file, for Optuna's own tools."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from evolver.errors import BadInput
from evolver.records import Candidate, Result
from evolver.search.base import Search
from evolver.search.coefficients.base import Coefficients
from evolver.storage import check_target, new_file

# Objectives and trials by the name of a study.
Studies = dict[str, tuple[Sequence[str], Sequence[FrozenTrial]]]


def write_study(search: Search, recorded: Callable[[Candidate], Result | None], name: str, file: Path) -> int:
    """Replay a search from its results, write its study into an SQLite file, and return the number of trials.

    If the run has several tasks, the file also holds a second study, ``NAME, by task``, with one objective for each
    task, so that Optuna's tools can show Pareto fronts.

    Args:
        search: the search in its initial state.
        recorded: returns the result of a candidate, or None if there is none.
        name: name of the study.
        file: the file to write.

    Raises BadInput for a search that tunes no coefficients, for a file that
    exists already, and where it cannot be written.
    """
    if not isinstance(search, Coefficients):
        raise BadInput(
            "evolver study: only runs of the searches tpe, cmaes and nsga2 can be written as an Optuna study, and "
            "this run used another search; give the folder of another run."
        )
    check_target(file, "file")
    results: dict[int, Result] = {}
    while asked := search.ask(1):
        result = recorded(asked[0])
        if result is None:
            break
        results[result.number] = result
        search.tell(result)
    told = [t for t in search.study.trials if t.state.is_finished()]
    for trial in told:
        result = results[trial.number]
        trial.user_attrs |= {"recipe": result.recipe_id, "items": len(result.items), "reason": result.reason}
    studies: Studies = {name: (["score"], [_valued(t, _alone(results[t.number].score)) for t in told])}
    if len(tasks := search.setup.tasks) > 1:
        studies[f"{name}, by task"] = tasks, [_valued(t, results[t.number].objectives(tasks)) for t in told]
    with new_file(file) as whole, tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as scratch:
        _write(studies, Path(scratch) / "study.db", file)
        os.replace(Path(scratch) / "study.db", whole)
    return len(told)


def _write(studies: Studies, place: Path, file: Path) -> None:
    """Write studies to ``place``; errors name ``file``."""
    try:
        for name, (objectives, trials) in studies.items():
            _create(f"sqlite:///{place}", name, objectives, trials)
    except (SQLAlchemyError, StorageInternalError) as error:
        said = str(getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or error)
        raise BadInput(
            f"{file}: it cannot be written ({said}); free disk space or correct the permissions, and run the command "
            "again."
        ) from error


def _create(storage: str, name: str, objectives: Sequence[str], trials: Sequence[FrozenTrial]) -> None:
    directions = [StudyDirection.MAXIMIZE] * len(objectives)
    study = optuna.create_study(storage=storage, study_name=name, directions=directions)
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        study.set_metric_names(list(objectives))
    study.add_trials(trials)


def _alone(score: float | None) -> tuple[float, ...] | None:
    return None if score is None else (score,)


def _valued(trial: FrozenTrial, values: Sequence[float] | None) -> FrozenTrial:
    """The trial with these values in place of its own; without any, it has failed."""
    whole = trial.state == TrialState.COMPLETE and values is not None
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE if whole else TrialState.FAIL, params=trial.params, distributions=trial.distributions,
        user_attrs=trial.user_attrs, values=values if whole else None, constraints=trial.constraints or None,
    )  # fmt: skip
