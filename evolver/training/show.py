"""What a person sees of a training: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SHOW_SECONDS = 10.0


class Show(Protocol):
    """Where a training tells how it goes."""

    def say(self, line: str) -> None: ...
    def begin(self, name: str, steps: int) -> None: ...
    def step(self, step: int, loss: float) -> None: ...
    def close(self) -> None: ...


def show() -> Show:
    """A bar on a terminal, lines elsewhere."""
    console = Console()
    return _Bar(console) if console.is_terminal else _Lines(console)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console, self._name, self._steps, self._spoke, self._began = console, "", 0, 0.0, 0.0
        self._first = 0

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def begin(self, name: str, steps: int) -> None:
        self._name, self._steps, self._began, self._spoke, self._first = name, steps, time.monotonic(), 0.0, 0

    def step(self, step: int, loss: float) -> None:
        now = time.monotonic()
        self._first = self._first or step
        if now - self._spoke >= SHOW_SECONDS or step == self._steps:
            self._spoke = now
            left = (now - self._began) / (step - self._first + 1) * (self._steps - step)
            self.say(f"{self._name}: step {step} of {self._steps}, loss {loss:.3f}, about {left:.0f} s left")

    def close(self) -> None: ...


class _Bar:
    def __init__(self, console: Console) -> None:
        columns = TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, TextColumn("loss {task.fields[loss]}"), console=console)
        self._progress.start()
        self._task: TaskID | None = None
        self._fresh = True

    def say(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False)

    def begin(self, name: str, steps: int) -> None:
        self._task, self._fresh = self._progress.add_task(name, total=steps, loss="–"), True

    def step(self, step: int, loss: float) -> None:
        if self._task is None:
            return
        if self._fresh:  # steps of an earlier call say nothing of the pace of this one
            self._progress.reset(self._task, completed=step - 1)
            self._fresh = False
        self._progress.update(self._task, completed=step, loss=f"{loss:.3f}")

    def close(self) -> None:
        self._progress.stop()
