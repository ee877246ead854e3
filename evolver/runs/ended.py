"""The file ``ended.json`` of a run: which part of its budget ended the search."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from evolver.config import Budget
from evolver.errors import BadInput
from evolver.runs.files import ENDED_FILE, mapping_of
from evolver.search.ending import Reason
from evolver.storage import Storage

REASONS: Mapping[Reason, str] = {
    "candidates": "it has proposed the {candidates} candidates of its budget",
    "items": "the search has scored the {items} items of its budget",
    "minutes": "the search has taken the {minutes:g} minutes of its budget",
    "patience": "{patience} candidates in a row did not improve the best dev score",
    "target": "a candidate has reached the target of {target}",
    "search": "the search came to its own end",
}


@dataclass(frozen=True)
class Ended:
    """Why a search has ended.

    Attributes:
        reason: the limit that was reached first, a key of the section ``budget``, or ``search``.
        budget: the limits that were set.
    """

    reason: Reason
    budget: Mapping[str, float]

    @property
    def why(self) -> str:
        """The reason in words, without a full stop."""
        return REASONS[self.reason].format(**self.budget)


def write_ended(folder: Storage, budget: Budget, reason: Reason) -> Ended:
    """Record why the search has ended, unless the run's folder says so of this budget already, and return what it says.

    So a run that is called again says the same as before, until its budget is another one.
    """
    if (found := read_ended(folder, budget)) is not None:
        return found
    ended = Ended(reason, budget.limits)
    folder.write(ENDED_FILE, json.dumps(asdict(ended)).encode())
    return ended


def read_ended(folder: Storage, budget: Budget) -> Ended | None:
    """Why the search has ended within a budget; None where it has not, where nobody recorded it, and where the file
    cannot be read.
    """
    try:
        form = mapping_of(folder, ENDED_FILE, "")
    except (OSError, BadInput):
        return None
    limits = budget.limits
    reason = next((known for known in REASONS if known == form.get("reason")), None)
    if reason is None or form.get("budget") != limits or not (reason == "search" or reason in limits):
        return None
    return Ended(reason, limits)
