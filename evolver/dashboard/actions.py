"""What can be done to a run from its page: stop it, go on with it, take a model of it."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import psutil

from evolver.dashboard.status import holder_of
from evolver.errors import BadInput
from evolver.runs.about import Job, read_about
from evolver.storage import Storage, check_target, is_remote
from evolver.storage.lease import this_machine


class Jobs(Protocol):
    """The jobs of clusters. Raises BadInput for what cannot be done, saying why."""

    def stop(self, job: Job) -> None:
        """Ask a job to stop."""
        ...

    def resume(self, job: Job, arguments: list[str]) -> None:
        """Submit a job again under its id; with ``arguments`` of ``evolver``, these are called instead."""
        ...


def stop_run(folder: Storage, jobs: Jobs) -> str:
    """Ask whoever drives a run to stop: a process of this machine, or a Ray job.

    Raises BadInput where nobody does, or a process of another machine.
    """
    held = holder_of(folder.folder("ledger"))
    if held is None:
        raise BadInput("nobody runs it.")
    if job := read_about(folder).job:
        jobs.stop(job)
    elif held["host"] == socket.gethostname() and held["machine"] == this_machine():
        _terminate(int(held["pid"]), float(held["at"]))
    else:
        raise BadInput(f"process {held['pid']} on {held['host']} runs it; stop it there.")
    return "asked to stop; everything that is finished is kept"


def resume_run(folder: Storage, jobs: Jobs, candidates: int | None) -> str:
    """Go on with a run as it was called last: as a Ray job, or in a process of its own that outlives the dashboard.

    Raises BadInput where somebody runs it already.
    """
    if (held := holder_of(folder.folder("ledger"))) is not None:
        raise BadInput(f"process {held['pid']} on {held['host']} runs it already.")
    if candidates is not None and not (_is_whole(candidates) and candidates >= 1):
        raise BadInput(f"a budget of {candidates!r} candidates is not usable; write a number above 0.")
    more = [] if candidates is None else ["--candidates", str(candidates)]
    if job := read_about(folder).job:
        jobs.resume(job, ["resume", job.location, *more] if more else [])
        return f"job {job.id} is submitted again"
    _start(["resume", folder.location, *more])
    return "goes on"


def export_candidate(folder: Storage, candidate: int | None) -> str:
    """Write a candidate's model, in a process of its own, beside the run's folder.

    Raises BadInput for a run in an object store, or where it was exported before.
    """
    if is_remote(folder.location):
        raise BadInput(f"export it to where you want it: evolver export {folder.location} FOLDER")
    if candidate is not None and not _is_whole(candidate):
        raise BadInput(f"{candidate!r} is no candidate; give its number.")
    which = "best" if candidate is None else str(candidate)
    target = Path(folder.location).parent / f"{Path(folder.location).name}-export-{which}"
    check_target(target)
    _start(["export", folder.location, str(target), *([] if candidate is None else ["--candidate", which])])
    return f"writes {target}"


def _is_whole(value: object) -> bool:
    """Whether what was sent is a whole number; in Python true and false are, too."""
    return isinstance(value, int) and not isinstance(value, bool)


def _terminate(pid: int, seen: float) -> None:
    """Ask a process of this machine to end, if it is the one that had this number at that time."""
    try:
        process = psutil.Process(pid)
        if process.create_time() > seen:
            raise psutil.NoSuchProcess(pid)
        process.terminate()
    except psutil.NoSuchProcess:
        raise BadInput(f"process {pid} ran it, and is gone; it can be resumed in a minute.") from None
    except psutil.AccessDenied:
        raise BadInput(f"process {pid} runs it, and is another user's; stop it there.") from None


def _start(arguments: list[str]) -> None:
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-m", "evolver", *arguments]
    subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
