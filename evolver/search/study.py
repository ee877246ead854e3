"""A coefficient search as an Optuna study in a file, for Optuna's own tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna

from evolver.errors import BadInput
from evolver.records import Candidate, Result
from evolver.search.base import Search
from evolver.search.optuna_samplers import Coefficients


def write_study(search: Search, recorded: Callable[[Candidate], Result | None], name: str, file: Path) -> int:
    """Replay a search from its results, and write its study into an SQLite file; the number of trials.

    Args:
        search: as it was at its beginning.
        recorded: the result of a candidate, as far as there is one.
        name: of the study.

    Raises BadInput for a search that tunes no coefficients, or a file that is there already.
    """
    if not isinstance(search, Coefficients):
        raise BadInput("only searches of coefficients (tpe, cmaes) are studies of Optuna's; this one is none.")
    if file.exists():
        raise BadInput(f"{file}: it is there already; name another file, or remove it.")
    while asked := search.ask(1):
        result = recorded(asked[0])
        if result is None:
            break
        search.tell(result)
    told = [t for t in search.study.trials if t.state.is_finished()]
    study = optuna.create_study(storage=f"sqlite:///{file}", study_name=name, direction="maximize")
    study.add_trials(told)
    return len(told)
