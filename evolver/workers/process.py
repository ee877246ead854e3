"""A pool of one worker in a process of its own, which can be killed when it hangs and replaced when it dies."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from evolver.errors import BadInput
from evolver.records import Candidate, Result, Split
from evolver.threads import let_threads_sleep
from evolver.workers.messages import pack_candidate, pack_result, unpack_candidate, unpack_result
from evolver.workers.plan import Plan
from evolver.workers.worker import Worker

READY = b"ready"


class ProcessPool:
    """Evaluates one candidate at a time in a spawned process.

    An evaluation that takes longer than ``pool.timeout_s`` is a failed result, and the process is killed. One whose
    process dies is tried again ``pool.retries`` times in a new one.

    Raises BadInput where the worker cannot be built.
    """

    def __init__(self, plan: Plan, split: Split) -> None:
        self._plan, self._split = plan, split
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._waiting: list[Candidate] = []

    def free(self) -> int:
        return 1 - len(self._waiting)

    def submit(self, candidate: Candidate) -> None:
        self._waiting.append(candidate)

    def wait(self) -> list[Result]:
        candidate = self._waiting.pop(0)
        settings = self._plan.config.pool
        for attempt in range(settings.retries + 1):
            pipe = self._pipe or self._start()
            try:
                pipe.send_bytes(pack_candidate(candidate))
                if not pipe.poll(settings.timeout_s):
                    self._kill()
                    return [Result.failed(candidate, f"timed out after {settings.timeout_s:g} s")]
                return [unpack_result(pipe.recv_bytes())]
            except (EOFError, OSError):  # the process is gone
                reason = f"its worker died ({self._kill()}); tried {attempt + 1} times"
            except BaseException:  # somebody stops the run: nobody waits for this answer any more
                self._kill()
                raise
        return [Result.failed(candidate, reason)]

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()  # the process ends when it finds nobody at the other end
        if self._process is not None:
            self._process.join(timeout=10)
        self._kill()

    def _start(self) -> Connection:
        # Spawned: a forked process would inherit threads' locks without the threads. Not a daemon, which may have no
        # children: some engines are several processes.
        let_threads_sleep()  # it inherits our environment, and reads it when it brings torch
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._plan, self._split))
        self._process.start()
        atexit.register(self._kill)  # before multiprocessing waits for it
        theirs.close()
        try:
            said = ours.recv_bytes()
        except EOFError:
            raise BadInput(f"pool: the worker's process ended before it was ready ({self._kill()}).") from None
        if said != READY:
            self._kill()
            raise BadInput(said.decode())
        self._pipe = ours
        return ours

    def _kill(self) -> str:
        """End the process, however it is, and say how it ended."""
        process, self._process, self._pipe = self._process, None, None
        atexit.unregister(self._kill)
        if process is None:
            return "there was none"
        process.join(timeout=0.5)
        if process.is_alive():
            process.kill()
        process.join()
        status = process.exitcode or 0
        # What a system does that has no memory left is SIGKILL.
        return f"status {status}" if status >= 0 else signal.Signals(-status).name


def _serve(pipe: Connection, plan: Plan, split: Split) -> None:
    """What the process does: build the worker, then answer until nobody asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver, too, which decides
    threading.Thread(target=_end_with_driver, daemon=True).start()
    try:
        worker = Worker(plan, split, name="process")
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
