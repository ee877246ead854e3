"""How far the runs of a folder have come, as their folders tell: nothing is asked of the processes behind them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any, Literal

from evolver.errors import BadInput
from evolver.history import History, read_history, runs_in
from evolver.storage import Storage
from evolver.storage.lease import FILE, LEASE_SECONDS

State = Literal["running", "stopped", "done", "unreadable"]


@dataclass(frozen=True)
class Status:
    """One run.

    Attributes:
        best: dev score of the best candidate; ``expert`` that of the best expert.
        spent: candidates, items; ``budget`` what they may come to, where it is limited.
        age: seconds since the last result, by this machine's clock.
        holder: who runs it, where somebody does.
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


def status_of(folder: Storage, name: str, history: History | None = None) -> Status:
    """The status of the run in a folder."""
    try:
        history = history or read_history(folder)
    except BadInput as error:
        return Status(name, "unreadable", verdict=str(error))
    search, experts = history.stages["search"], dict.fromkeys(history.config.experts)
    plain = [r.score for c, r in history.stages["baseline"] if c.label in experts and r.score is not None]
    held = holder_of(folder.folder("ledger"))
    holder = f"process {held['pid']} on {held['host']}" if held else ""
    summary = json.loads(folder.read("summary.json")) if folder.exists("summary.json") else {}
    budget = history.config.budget
    # A run that was called again with a larger budget has an end behind it, and is not done.
    done = summary.get("budget") == budget.model_dump() and summary["candidates"] == len(search)
    return Status(
        name,
        "running" if holder else "done" if done else "stopped",
        str(history.config.search["algorithm"]),
        history.best[1].score if history.best else None,
        max(plain, default=None),
        (len(search), sum(r.cost for _, r in search)),
        (budget.candidates, budget.items),
        sum(r.status == "failed" for _, r in search),
        len({r.worker for _, r in search if r.worker}),
        time.time() - history.last if history.last else None,
        holder,
        str(summary.get("verdict", "")),
    )


def statuses(root: Storage) -> list[Status]:
    """All runs of a folder, by name."""
    return [status_of(root.folder(name), name) for name in runs_in(root)]


def holder_of(ledger: Storage) -> dict[str, Any] | None:
    """Who has the lease, if it was renewed lately: ``host``, ``pid``."""
    try:
        held: dict[str, Any] = json.loads(ledger.read(FILE))
    except (FileNotFoundError, ValueError):
        return None
    return None if time.time() - float(held.get("at", 0.0)) > 2 * LEASE_SECONDS else held
