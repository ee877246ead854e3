"""A coefficient search as an Optuna study in a file, for Optuna's own tools."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from evolver.errors import BadInput
from evolver.records import Candidate, Result
from evolver.search.base import Search
from evolver.search.optuna_samplers import Coefficients


def write_study(search: Search, recorded: Callable[[Candidate], Result | None], name: str, file: Path) -> int:
    """Replay a search from its results, and write its study into an SQLite file; the number of trials.

    Where there are several tasks, a second study, ``NAME, by task``, has an objective for each, so that fronts can be
    seen.

    Args:
        search: as it was at its beginning.
        recorded: the result of a candidate, as far as there is one.
        name: of the study.

    Raises BadInput for a search that tunes no coefficients, or a file that is there already.
    """
    if not isinstance(search, Coefficients):
        raise BadInput("only searches of coefficients (tpe, cmaes, nsga2) are studies of Optuna's; this one is none.")
    if file.exists():
        raise BadInput(f"{file}: it is there already; name another file, or remove it.")
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
    storage = f"sqlite:///{file}"
    _create(storage, name, ["score"], [_valued(t, _alone(results[t.number].score)) for t in told])
    if len(tasks := search.setup.tasks) > 1:
        by_task = [_valued(t, results[t.number].objectives(tasks)) for t in told]
        _create(storage, f"{name}, by task", tasks, by_task)
    return len(told)


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
        user_attrs=trial.user_attrs, values=values if whole else None,
    )  # fmt: skip
