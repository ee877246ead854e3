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
from evolver.search.coefficients.base import Coefficients
from evolver.search.coefficients.cmaes import Islands
from evolver.search.continued import ContinuedSearch

# Objectives and trials by the name of a study.
Studies = dict[str, tuple[Sequence[str], Sequence[FrozenTrial]]]


def write_study(
    search: Search, recorded: Callable[[Candidate], Result | None], name: str,
    target: AbstractContextManager[BaseStorage],
) -> int:  # fmt: skip
    """Replay a search from its results, write its studies, and return the number of trials.

    A search over several methods on islands has a study for each method, ``NAME, METHOD``. If the run has several
    tasks, there is a second study for each, ``NAME, by task``, with one objective for each task, so that Optuna's tools
    can show Pareto fronts.

    Args:
        search: the search in its initial state.
        recorded: returns the result of a candidate, or None if there is none.
        name: name of the study.
        target: where they are written; it is entered when they are complete.

    Raises BadInput for a search that tunes no coefficients, and what ``target`` raises.
    """
    if isinstance(search, ContinuedSearch):
        raise BadInput(
            "evolver study: this run begins with models that its sampler did not propose (start), so it is no Optuna "
            "study; give the folder of a run without start."
        )
    if not isinstance(search, Coefficients | Islands):
        raise BadInput(
            "evolver study: only runs of the searches tpe, gp, cmaes, nsga2, nsga3, random, qmc and grid can be "
            "written as an Optuna study, and this run used another search; give the folder of another run."
        )
    results: dict[tuple[str, int], Result] = {}
    while asked := search.ask(1):
        result = recorded(asked[0])
        if result is None:
            break
        results[search.trial_of(result.number)] = result
        search.tell(result)
    studies, count = Studies(), 0
    for part, study in search.studies.items():
        own = {number: result for (of, number), result in results.items() if of == part}
        told = _told(study, own)
        count += len(told)
        studies |= _studies(f"{name}, {part}" if part else name, told, own, search.setup.tasks)
    with target as storage:
        _create(storage, studies)
    return count


def _told(study: optuna.study.Study, results: Mapping[int, Result]) -> list[FrozenTrial]:
    """The finished trials, each with what people look for beside its score."""
    told = [t for t in study.trials if t.state.is_finished()]
    for trial in told:
        result = results[trial.number]
        trial.user_attrs |= {"recipe": result.recipe_id, "items": len(result.items), "reason": result.reason}
    return told


def _studies(
    name: str, told: Sequence[FrozenTrial], results: Mapping[int, Result], tasks: Sequence[str]
) -> Studies:  # fmt: skip
    studies: Studies = {name: (["score"], [_valued(t, _alone(results[t.number].score)) for t in told])}
    if len(tasks) > 1:
        studies[f"{name}, by task"] = tasks, [_valued(t, results[t.number].objectives(tasks)) for t in told]
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
