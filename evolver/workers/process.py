"""A crew of processes on this machine: what hangs can be killed, and what dies is replaced."""

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
from evolver.workers.messages import pack_result, unpack_candidate
from evolver.workers.plan import Plan
from evolver.workers.worker import Worker

READY = b"ready"
# How long an idle process may take to end when its pool is closed.
CLOSE_SECONDS = 10.0


@dataclass
class _Hired:
    """A process, our end of the pipe to it, and whether it is to say something."""

    process: BaseProcess
    pipe: Connection
    ready: bool = False
    busy: bool = True


class ProcessCrew:
    """Workers in spawned processes. They end with this process, also where it is killed."""

    def __init__(self, plan: Plan, split: Split) -> None:
        self._plan, self._split = plan, split
        self._hired: dict[int, _Hired] = {}
        self._count = 0
        atexit.register(self._kill_all)  # before multiprocessing waits for them

    def hire(self) -> int:
        number, self._count = self._count, self._count + 1
        # Spawned: a forked process would inherit threads' locks without the threads. Not a daemon, which may have no
        # children: some engines are several processes.
        let_threads_sleep()  # it inherits our environment, and reads it when it brings torch
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._plan, self._split, f"process-{number}"))
        process.start()
        theirs.close()
        self._hired[number] = _Hired(process, ours)
        return number

    def send(self, worker: int, message: bytes) -> None:
        hired = self._hired[worker]
        hired.busy = True
        with contextlib.suppress(OSError):  # it has ended: the next wait says so
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
            if hired.busy:  # nobody waits for its answer any more
                hired.process.kill()
            hired.pipe.close()  # an idle one ends when it finds nobody at the other end
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
    """End a process, however it is, and say how it ended."""
    hired.pipe.close()
    hired.process.join(timeout=0.5)
    if hired.process.is_alive():
        hired.process.kill()
    hired.process.join()
    status = hired.process.exitcode or 0
    # What a system does that has no memory left is SIGKILL.
    return f"status {status}" if status >= 0 else signal.Signals(-status).name


def _serve(pipe: Connection, plan: Plan, split: Split, name: str) -> None:
    """What the process does: build the worker, then answer until nobody asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver, too, which decides
    threading.Thread(target=_end_with_driver, daemon=True).start()
    try:
        worker = Worker(plan, split, name=name)
    except BadInput as error:
        pipe.send_bytes(str(error).encode())
        return
    try:
        pipe.send_bytes(READY)
        while True:
            pipe.send_bytes(pack_result(worker.evaluate(unpack_candidate(pipe.recv_bytes()))))
    except (EOFError, OSError):
        worker.close()


def _end_with_driver() -> None:
    """An evaluation that hangs never finds out that nobody waits for it."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        wait([driver.sentinel])
        os._exit(1)
