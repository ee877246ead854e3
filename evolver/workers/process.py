"""A crew of processes on this machine. A process that hangs can be killed, and one that dies can be replaced."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from evolver.errors import BadInput
from evolver.records import Split
from evolver.threads import let_threads_sleep
from evolver.workers.crew import Answered, Event, Gone, Ready
from evolver.workers.plan import Plan
from evolver.workers.telling import Inbox
from evolver.workers.worker import Worker

READY = b"ready"
# What the fork server imports before it forks the first process. It takes seconds and most of a process's memory.
PRELOADED = ["evolver.workers.worker"]
# Seconds that an idle process may take to end when its pool is closed.
CLOSE_SECONDS = 10.0


@dataclass
class _Hired:
    """A process with a worker in it.

    Attributes:
        pipe: the driver's end of the pipe to it.
        ready: whether its worker is built.
        busy: whether an answer is expected from it.
    """

    process: BaseProcess
    pipe: Connection
    ready: bool = False
    busy: bool = True


class ProcessCrew:
    """A crew (see ``evolver.workers.crew``) of processes. They end when this process ends, even by a kill.

    A fork server imports what workers need once. Each process is forked from it, so a process that replaces another one
    starts within a moment, and all of them share the memory of the imported modules.

    Args:
        plan: describes the run to the workers.
        split: the items that the workers score.
    """

    def __init__(self, plan: Plan, split: Split) -> None:
        self._plan, self._split = plan, split
        self._hired: dict[int, _Hired] = {}
        self._count = 0
        atexit.register(self._kill_all)  # at exit, multiprocessing would wait for these processes: they end before

    def hire(self) -> int:
        number, self._count = self._count, self._count + 1
        # The process is forked from the server, which has no threads; one that is forked from this process would
        # inherit locks of threads that it does not have. It is no daemon, as a daemon may have no child processes, and
        # some inference engines start several.
        let_threads_sleep()  # the server inherits this environment, and OpenMP reads it when torch is imported
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._plan, self._split, f"process-{number}"))
        process.start()
        theirs.close()
        self._hired[number] = _Hired(process, ours)
        return number

    def send(self, worker: int, message: bytes) -> None:
        hired = self._hired[worker]
        hired.busy = True
        with contextlib.suppress(OSError):  # the process has ended, which the next wait reports
            hired.pipe.send_bytes(message)

    def dismiss(self, worker: int) -> None:
        _kill(self._hired.pop(worker))

    def wait(self, seconds: float) -> list[Event]:
        numbers = {hired.pipe: number for number, hired in self._hired.items()}
        if not numbers:
            time.sleep(seconds)
        return [self._hear(numbers[pipe]) for pipe in wait(list(numbers), seconds) if isinstance(pipe, Connection)]

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        for hired in self._hired.values():
            if hired.busy:  # its answer is no longer needed
                hired.process.kill()
            hired.pipe.close()  # an idle process ends by itself when the pipe is closed
        for hired in self._hired.values():
            hired.process.join(CLOSE_SECONDS)
        self._kill_all()
        atexit.unregister(self._kill_all)

    def _hear(self, worker: int) -> Event:
        hired = self._hired[worker]
        try:
            said = hired.pipe.recv_bytes()
        except (EOFError, OSError):
            ended = _kill(self._hired.pop(worker))
            if not hired.ready:
                raise BadInput(f"pool: the worker's process ended before it was ready ({ended}).") from None
            return Gone(worker, ended)
        hired.busy = False
        if hired.ready:
            return Answered(worker, said)
        if said != READY:
            raise BadInput(said.decode())
        hired.ready = True
        return Ready(worker)

    def _kill_all(self) -> None:
        while self._hired:
            _kill(self._hired.popitem()[1])


def _kill(hired: _Hired) -> str:
    """End a process, whether it still runs or not, and return how it ended: its exit status, or the signal's name."""
    hired.pipe.close()
    hired.process.join(timeout=0.5)
    if hired.process.is_alive():
        hired.process.kill()
    hired.process.join()
    status = hired.process.exitcode or 0
    # A negative status is a signal. A system that runs out of memory sends SIGKILL.
    return f"status {status}" if status >= 0 else signal.Signals(-status).name


def _serve(pipe: Connection, plan: Plan, split: Split, name: str) -> None:
    """What the process does: build the worker, then evaluate candidates until the driver closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the driver, which then ends the workers
    threading.Thread(target=_end_with_driver, daemon=True).start()
    try:
        worker = Worker(plan, split, name=name)
    except BadInput as error:
        pipe.send_bytes(str(error).encode())
        return
    inbox = Inbox()
    try:
        pipe.send_bytes(READY)
        while True:
            pipe.send_bytes(inbox.answer(pipe.recv_bytes(), worker.evaluate))
    except (EOFError, OSError):
        worker.close()


def _end_with_driver() -> None:
    """End this process when the driver ends. An evaluation that hangs would never notice it."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        wait([driver.sentinel])
        os._exit(1)
