"""What a person sees while a run goes: bars on a terminal, plain lines elsewhere, with the time left of the run."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from evolver.loggers.pace import in_words
from evolver.records import Candidate, Result

# Without a terminal, one line at most so often, so that a long run does not fill a log.
QUIET_SECONDS = 5.0


class Display(Protocol):
    """Where a run tells how it goes."""

    def say(self, line: str) -> None: ...
    def stage(self, name: str, total: int | None) -> None: ...
    def result(self, candidate: Candidate, result: Result, left: float | None) -> None:
        """Tell of a result, and of the seconds that the rest of the run will take, where somebody knows."""
        ...

    def close(self) -> None: ...


def display() -> Display:
    """Bars on a terminal, lines elsewhere."""
    return Bars() if sys.stdout.isatty() else Lines()


def describe_result(candidate: Candidate, result: Result) -> str:
    """One line about one result."""
    what = candidate.label or f"{candidate.proposer} {candidate.number}"
    if result.status == "failed":
        return f"{what}: failed ({result.reason})"
    took = "known" if result.reused else f"{result.seconds.get('total', 0.0):.1f} s"
    if result.loss is not None:
        return f"{what}: loss {result.loss:.4f} on {len(result.items)} items ({took})"
    if result.score is None:
        how = "rejected after" if candidate.question.limit is None else "scored on"
        return f"{what}: {how} {len(result.items)} items ({took})"
    breaks = "" if result.feasible else ", breaks a constraint"
    return f"{what}: {result.score:.4f}{breaks} ({took})"


class Lines:
    """Plain lines."""

    def __init__(self) -> None:
        self._done, self._total, self._best = 0, 0, float("-inf")
        self._spoke = time.monotonic()
        self._name = ""

    def say(self, line: str) -> None:
        print(line, flush=True)

    def stage(self, name: str, total: int | None) -> None:
        self._name, self._total, self._done = name, total or 0, 0
        self._best, self._spoke = float("-inf"), 0.0

    def result(self, candidate: Candidate, result: Result, left: float | None) -> None:
        self._done += 1
        score = result.score if result.feasible else None
        improved = score is not None and score > self._best
        if score is not None:
            self._best = max(self._best, score)
        now = time.monotonic()
        last = self._done == self._total
        if improved or last or result.status == "failed" or now - self._spoke >= QUIET_SECONDS:
            self._spoke = now
            of = f"/{self._total}" if self._total else ""
            eta = "" if left is None else f"; the whole run takes about {in_words(left)} more"
            print(f"{self._name} {self._done}{of}: {describe_result(candidate, result)}{eta}", flush=True)

    def close(self) -> None: ...


class Bars:
    """A bar a stage, with the best score so far."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"), console=Console(),
        )  # fmt: skip
        self._progress.start()
        self._task: TaskID | None = None
        self._best = float("-inf")

    def say(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False)

    def stage(self, name: str, total: int | None) -> None:
        self._best = float("-inf")
        self._task = self._progress.add_task(name, total=total, note="")

    def result(self, candidate: Candidate, result: Result, left: float | None) -> None:
        if self._task is None:
            return
        if result.score is not None and result.feasible:
            self._best = max(self._best, result.score)
        notes = [f"best {self._best:.4f}"] * (self._best > float("-inf"))
        notes += [] if left is None else [f"about {in_words(left)} left in all"]
        note = ", ".join(notes)
        self._progress.update(self._task, advance=1, note=note)
        if result.status == "failed":
            self.say(describe_result(candidate, result))

    def close(self) -> None:
        self._progress.stop()
