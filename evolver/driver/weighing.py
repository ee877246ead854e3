"""The best model of a run for weights that a user gives to its objectives."""

from __future__ import annotations

import math
from collections.abc import Mapping

from evolver.errors import BadInput, nearest
from evolver.records import Candidate
from evolver.records.objective import Objective, values_of
from evolver.runs.finals import on_front
from evolver.runs.history import History

_OPTION = "--weights"


def best_for(history: History, given: str) -> Candidate:
    """The candidate on the front with the highest weighted sum of the objectives; of equals the one that comes first.

    The values are those on dev and select items together or, before the finals are held, those on the dev items.

    Args:
        given: the weights as a user writes them, such as ``maths=2,safety=1``. Objectives without one have weight 0.

    Raises BadInput for weights that are none, and for a run that has the score alone or no front yet.
    """
    objectives = history.about.objectives
    if not objectives:
        raise BadInput(
            f"{_OPTION}: this run has no objectives to be weighed against each other; export it without this option, "
            "or give the configuration objectives and another run name."
        )
    weights = _weights(given, objectives)
    finals = history.finals
    if finals is not None and finals.held:
        points = [(contender.candidate, finals.values(contender)) for contender in finals.front]
    else:
        pairs = on_front(history.stages["search"], objectives, len(history.stages["search"]))
        points = [(candidate, values_of(objectives, result.tasks)) for candidate, result in pairs]
    known = [(candidate, values) for candidate, values in points if values is not None]
    if not known:
        raise BadInput(f"{_OPTION}: no candidate of the run has a score yet; continue the run first (evolver resume).")
    names = [objective.name for objective in objectives]

    def worth(values: tuple[float, ...]) -> float:
        return math.fsum(weights.get(name, 0.0) * value for name, value in zip(names, values, strict=True))

    return max(known, key=lambda pair: worth(pair[1]))[0]


def _weights(given: str, objectives: tuple[Objective, ...]) -> Mapping[str, float]:
    """The weights by the name of the objective."""
    names, found = [objective.name for objective in objectives], dict[str, float]()
    for part in given.split(","):
        name, sign, number = (word.strip() for word in part.rpartition("="))
        if not sign:
            raise BadInput(f"{_OPTION}: {part.strip()!r} is no name with a weight; write {names[0]}=1, for example.")
        if name not in names:
            raise BadInput(f"{_OPTION}: there is no objective {name!r}; {nearest(name, names)}")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise BadInput(f"{_OPTION}: {number!r} is not a weight; write a number of at least 0.")
        if name in found:
            raise BadInput(f"{_OPTION}: {name} has two weights; give it one.")
        found[name] = weight
    if not any(found.values()):
        raise BadInput(f"{_OPTION}: all weights are 0; give at least one objective a weight above 0.")
    return found
