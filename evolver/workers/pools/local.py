"""The pool of this machine: one worker in this process, or workers in processes of their own."""

from __future__ import annotations

from collections.abc import Callable

from evolver.errors import BadInput
from evolver.evaluation.tasks import Tasks
from evolver.pool import Pool
from evolver.records import Candidate, Result, Split
from evolver.workers.crew_pool import CrewPool
from evolver.workers.failures import BrokenDevice
from evolver.workers.plan import Plan
from evolver.workers.pools import pool
from evolver.workers.process import ProcessCrew
from evolver.workers.worker import Worker


@pool("local")
def on_this_machine(plan: Plan, split: Split, tasks: Tasks) -> Pool:
    """One worker in this process. With several workers or a time limit, workers in processes of their own, because only
    processes can work at the same time and be stopped when one hangs.
    """
    settings = plan.config.pool
    if settings.timeout_s is None and settings.num_workers == 1:
        return LocalPool(plan, split, tasks)
    return CrewPool(ProcessCrew(plan, split), settings, eager=False)


class LocalPool:
    """Evaluates in this process, one candidate at a time. The worker is built when the first candidate comes."""

    def __init__(self, plan: Plan, split: Split, tasks: Tasks | None = None) -> None:
        self._make: Callable[[], Worker] = lambda: Worker(plan, split, tasks=tasks)
        self._worker: Worker | None = None
        self._waiting: list[Candidate] = []

    def free(self) -> int:
        return 1 - len(self._waiting)

    def submit(self, candidate: Candidate) -> None:
        self._waiting.append(candidate)

    def wait(self) -> list[Result]:
        self._worker = self._worker or self._make()
        try:
            return [self._worker.evaluate(self._waiting.pop(0))]
        except BrokenDevice as error:
            raise BadInput(f"pool: {error}; all scores are kept, and the same command continues the run.") from error

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = None
