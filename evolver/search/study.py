"""Writes a coefficient search as Optuna studies, for Optuna's own tools: into a file, or into a PostgreSQL database."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from evolver.errors import BadInput
from evolver.records import Candidate, Result
from evolver.search.base import Search
from evolver.search.coefficients.base import RECEIVED, Coefficients
from evolver.search.coefficients.cmaes import CMAESByMethod
from evolver.search.continued import ContinuedSearch

# Objectives and trials by the name of a study.
Studies = dict[str, tuple[Sequence[str], Sequence[FrozenTrial]]]


def write_study(
    search: Search, recorded: Callable[[Candidate], Result | None], name: str,
    target: AbstractContextManager[BaseStorage],
) -> int:  # fmt: skip
    """Replay a search from its results, write its studies, and return the number of trials.

    CMA-ES over several methods has a study for each method, ``NAME, METHOD``. If the run has several
    tasks, there is a second study for each, ``NAME, by task``, with one objective for each task, so that Optuna's tools
    can show Pareto fronts.

    Args:
        search: the search in its initial state.
        recorded: returns the result of a candidate, or None if there is none.
        name: name of the study.
        target: where they are written; it is entered when they are complete.

    Models that the run began with, or took over from another run, are trials where the sampler learns from them; each
    has the number of its candidate as an attribute.

    Raises BadInput for a search that tunes no coefficients, and what ``target`` raises.
    """
    inner, first = (search.inner, search.first) if isinstance(search, ContinuedSearch) else (search, 0)
    if not isinstance(inner, Coefficients | CMAESByMethod):
        raise BadInput(
            "evolver study: only runs of the searches tpe, gp, cmaes, nsga2, nsga3, random, qmc and grid can be "
            "written as an Optuna study, and this run used another search; give the folder of another run."
        )
    own: dict[tuple[str, int], Result] = {}
    received: dict[int, Result] = {}
    while asked := search.ask(1):
        number, result = asked[0].number, recorded(asked[0])
        if result is None:
            break
        if number < first:
            received[number] = result
        else:
            own[inner.trial_of(number - first)] = result
        search.tell(result)
    studies, count = Studies(), 0
    for part, study in inner.studies.items():
        told = _told(study, part, own, received)
        count += len(told)
        studies |= _studies(f"{name}, {part}" if part else name, told, inner.setup.tasks)
    with target as storage:
        _create(storage, studies)
    return count


def _told(
    study: optuna.study.Study, part: str, own: Mapping[tuple[str, int], Result], received: Mapping[int, Result]
) -> list[tuple[FrozenTrial, Result]]:  # fmt: skip
    """The finished trials with their results, each with what people look for beside its score."""
    told = list[tuple[FrozenTrial, Result]]()
    for trial in study.trials:
        if trial.state.is_finished():
            candidate = trial.user_attrs.get(RECEIVED)
            result = own[part, trial.number] if candidate is None else received[candidate]
            trial.user_attrs |= {"recipe": result.recipe_id, "items": len(result.items), "reason": result.reason}
            told.append((trial, result))
    return told


def _studies(name: str, told: Sequence[tuple[FrozenTrial, Result]], tasks: Sequence[str]) -> Studies:
    studies: Studies = {name: (["score"], [_valued(t, _alone(r.score)) for t, r in told])}
    if len(tasks) > 1:
        studies[f"{name}, by task"] = tasks, [_valued(t, r.objectives(tasks)) for t, r in told]
    return studies


def _create(storage: BaseStorage, studies: Studies) -> None:
    """Create all studies, or none of them.

    Raises BadInput where there is a study of such a name.
    """
    created = list[str]()
    try:
        for name, (objectives, trials) in studies.items():
            directions = [StudyDirection.MAXIMIZE] * len(objectives)
            study = optuna.create_study(storage=storage, study_name=name, directions=directions)
            created.append(name)
            with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
                study.set_metric_names(list(objectives))
            study.add_trials(trials)
    except (optuna.exceptions.DuplicatedStudyError, KeyboardInterrupt) as error:
        for done in created:
            optuna.delete_study(study_name=done, storage=storage)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise BadInput(
            f"evolver study: the database has a study called {name!r} already; write to another database, or remove "
            "that study with optuna delete-study."
        ) from error


def _alone(score: float | None) -> tuple[float, ...] | None:
    return None if score is None else (score,)


def _valued(trial: FrozenTrial, values: Sequence[float] | None) -> FrozenTrial:
    """The trial with these values in place of its own; without any, it has failed."""
    whole = trial.state == TrialState.COMPLETE and values is not None
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE if whole else TrialState.FAIL, params=trial.params, distributions=trial.distributions,
        user_attrs=trial.user_attrs, values=values if whole else None, constraints=trial.constraints or None,
    )  # fmt: skip
