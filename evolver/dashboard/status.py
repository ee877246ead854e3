"""How far the runs of a folder have come. Only the folders are read; the drivers of the runs are not asked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from evolver.dashboard.overview import Overview
from evolver.errors import BadInput
from evolver.runs.about import Job, runs_in
from evolver.runs.files import summary_of
from evolver.storage import Storage
from evolver.storage.lease import LEASE_SECONDS, read_lease

State = Literal["running", "stopped", "done", "unreadable", "reading"]  # reading: the run has not been read yet


@dataclass(frozen=True)
class Status:
    """One run.

    Attributes:
        best: dev score of the best candidate; ``expert`` that of the best expert.
        spent: candidates, items; ``budget`` what they may come to, where it is limited.
        age: seconds since the last result, by this machine's clock.
        holder: the process that drives it, if there is one.
        ended: why its search has ended, as far as it has.
        infeasible: candidates that break a constraint; None where a run has none.
    """

    name: str
    state: State
    algorithm: str = ""
    best: float | None = None
    expert: float | None = None
    spent: tuple[int, int] = (0, 0)
    budget: tuple[int | None, int | None] = (None, None)
    failed: int = 0
    workers: int = 0
    age: float | None = None
    holder: str = ""
    verdict: str = ""
    ended: str = ""
    infeasible: int | None = None


def status_of(run: Overview, name: str) -> Status:
    """The status of a run as it was when it was looked at last."""
    search, plain, config = run.rows("search"), run.rows("baseline"), run.about.config
    scores = search.numbers("score")
    expert = [s for label, s in zip(plain.texts("label"), plain.numbers("score"), strict=True)
              if label in config.experts and s == s]  # fmt: skip
    summary, verdict = summary_of(run.folder)
    held = holder_of(run.folder.folder("ledger"))
    # A run that is continued with a larger budget has a report already, but is not done.
    done = _limits(summary) == config.budget.limits and summary.get("candidates") == len(search)
    return Status(
        name,
        "running" if held else "done" if done else "stopped",
        str(config.search["algorithm"]),
        None if search.best is None else float(scores[search.best]),
        max(expert, default=None),
        (len(search), int(search.numbers("cost").sum())),
        (config.budget.candidates, config.budget.items),
        search.texts("status").count("failed"),
        len(set(search.texts("worker")) - {""}),
        time.time() - run.last if run.last else None,
        _holder(held, run.about.job),
        verdict,
        run.about.ended.why if run.about.ended else "",
        int((search.numbers("violation") > 0).sum()) if config.constraints else None,
    )


def statuses(root: Storage) -> list[Status]:
    """All runs of a folder, by name."""
    found = []
    for name in runs_in(root):
        try:
            found.append(status_of(Overview(root.folder(name)), name))
        except (BadInput, OSError) as error:
            found.append(Status(name, "unreadable", verdict=str(error)))
    return found


def _limits(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The limits of the budget that a report is about; older versions of Evolver knew fewer of them."""
    found = summary.get("budget")
    return {key: limit for key, limit in found.items() if limit is not None} if isinstance(found, dict) else {}


def _holder(held: Mapping[str, Any] | None, job: Job | None) -> str:
    if held is None:
        return ""
    return f"job {job.id}, on {held['host']}" if job else f"process {held['pid']} on {held['host']}"


def holder_of(ledger: Storage) -> dict[str, Any] | None:
    """The process that has the lease, if it renewed the lease lately: ``host``, ``pid``."""
    try:
        held = read_lease(ledger)
    except OSError:
        return None
    at = (held or {}).get("at")
    return held if isinstance(at, int | float) and time.time() - at <= 2 * LEASE_SECONDS else None
