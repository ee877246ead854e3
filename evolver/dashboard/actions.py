"""What a user can do from the pages: start a run, stop it, continue it, and export a model of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Lock
from typing import IO, Protocol

import psutil

from evolver.config.reading import load
from evolver.dashboard.status import holder_of
from evolver.errors import BadInput
from evolver.runs.about import Job, read_about
from evolver.runs.files import ABOUT_FILE, holds_a_run
from evolver.storage import Storage, check_target, is_remote
from evolver.storage.lease import this_machine

PATH_LENGTH = 1000  # characters of the path of a configuration
CONFIGURATION_BYTES = 2**20
COUNT_LIMIT = 2**53  # numbers of candidates are below this: browsers round larger integers
CHECK_SECONDS = 600.0  # that a check may take: task data may have to be fetched first
WATCH_SECONDS = 20.0  # that a new run is watched, so that the page can show why it was refused

_checking = Lock()


class Jobs(Protocol):
    """The jobs of clusters. Raises BadInput, with the reason, for what cannot be done."""

    def stop(self, job: Job) -> None:
        """Ask a job to stop."""
        ...

    def resume(self, job: Job, arguments: list[str]) -> None:
        """Submit a job again under its id; if ``arguments`` are given, the job runs ``evolver`` with them."""
        ...


def start_run(root: Storage, path: object) -> str:
    """Start the run of a configuration file of this machine, in a process of its own that outlives the dashboard.

    The file is first checked as ``evolver validate`` checks it. Waits until the run's folder is there, or for
    ``WATCH_SECONDS``.

    Args:
        root: the folder of all runs.
        path: of the file, as somebody typed it; a relative one is taken from where the dashboard was started.

    Raises BadInput for a configuration that cannot be used, a run that exists already, and a run that ends at once.
    """
    file = _configuration(path)
    if not _checking.acquire(blocking=False):
        raise BadInput("another configuration is being checked; start this one when that is done.")
    try:
        _validate(file)
        name = load(file).run
        if holds_a_run(root.folder(name)):
            raise BadInput(
                f"{file}: there is a run {name} already; resume it on its page, or give the configuration another name."
            )
        with tempfile.TemporaryFile() as errors:
            process = _start(["run", str(file), "--results", root.location], errors)
            return _watch(process, root.folder(name), name, errors)
    finally:
        _checking.release()


def stop_run(folder: Storage, jobs: Jobs) -> str:
    """Ask the driver of a run to stop: a process of this machine, or a Ray job.

    Raises BadInput if no process drives the run, or a process of another machine does.
    """
    held = holder_of(folder.folder("ledger"))
    if held is None:
        raise BadInput("no process is running it.")
    if job := read_about(folder).job:
        jobs.stop(job)
    elif held["host"] == socket.gethostname() and held["machine"] == this_machine():
        _terminate(int(held["pid"]), float(held["at"]))
    else:
        raise BadInput(f"process {held['pid']} on {held['host']} is running it; stop it there.")
    return "the run was asked to stop; everything that is finished is kept"


def resume_run(folder: Storage, jobs: Jobs, candidates: int | None) -> str:
    """Continue a run as it was started last: as a Ray job, or in a separate process that outlives the dashboard.

    Raises BadInput if a process is running it already.
    """
    if (held := holder_of(folder.folder("ledger"))) is not None:
        raise BadInput(f"process {held['pid']} on {held['host']} is running it already.")
    if candidates is not None and not (_is_whole(candidates) and 1 <= candidates < COUNT_LIMIT):
        raise BadInput(
            f"a budget of {str(candidates)[:40]} candidates is not usable; write a number from 1 to below 2^53."
        )
    more = [] if candidates is None else ["--candidates", str(candidates)]
    if job := read_about(folder).job:
        jobs.resume(job, ["resume", job.location, *more] if more else [])
        return f"job {job.id} is submitted again"
    _start(["resume", folder.location, *more])
    return "goes on"


def export_candidate(folder: Storage, candidate: int | None) -> str:
    """Write a candidate's model into a new folder beside the run's folder, in a separate process.

    Raises BadInput for a run in an object store, and if the candidate was exported before.
    """
    if is_remote(folder.location):
        raise BadInput(f"to write the model to a folder of your choice, run: evolver export {folder.location} FOLDER")
    which = "best" if candidate is None else str(candidate)
    target = Path(folder.location).parent / f"{Path(folder.location).name}-export-{which}"
    check_target(target)
    _start(["export", folder.location, str(target), *([] if candidate is None else ["--candidate", which])])
    return f"writes {target}"


def candidate_number(given: object) -> int:
    """The number of a candidate as a request names it.

    Raises BadInput if it is no number that a candidate can have.
    """
    if not (isinstance(given, int) and _is_whole(given) and 0 <= given < COUNT_LIMIT):
        raise BadInput(f"{str(given)[:40]!r} is not the number of a candidate; give a number.")
    return given


def _is_whole(value: object) -> bool:
    """Whether a value is a whole number. In Python, True and False are integers; here they do not count."""
    return isinstance(value, int) and not isinstance(value, bool)


def _terminate(pid: int, seen: float) -> None:
    """Ask a process of this machine to end, if it already had this number at the time ``seen``."""
    try:
        process = psutil.Process(pid)
        if process.create_time() > seen:
            raise psutil.NoSuchProcess(pid)
        process.terminate()
    except psutil.NoSuchProcess:
        raise BadInput(f"process {pid} was running it and has ended; the run can be resumed in a minute.") from None
    except psutil.AccessDenied:
        raise BadInput(f"process {pid} of another user is running it; stop it as that user.") from None


def _configuration(path: object) -> Path:
    """The file that the user named. Devices and pipes are not opened, because reading them may never end.

    Raises BadInput if it is not a file, or too large.
    """
    if not isinstance(path, str) or not path.strip() or not path.isprintable():
        raise BadInput("the path of a configuration is missing; write one such as configs/demo.yaml.")
    if len(path) > PATH_LENGTH:
        raise BadInput(f"the path of the configuration has {len(path)} characters; at most {PATH_LENGTH} are read.")
    file = Path(
        os.path.expanduser(path.strip())
    ).absolute()  # environment variables are not expanded: messages would show their values
    try:
        if not file.is_file():
            raise BadInput(f"{file}: there is no such file on the dashboard's machine; check the path.")
        size = file.stat().st_size
    except OSError as error:
        raise BadInput(f"{file}: the file cannot be read ({error.strerror or error}); check the path.") from error
    if size > CONFIGURATION_BYTES:
        raise BadInput(
            f"{file}: has {size} bytes, which is too large for a configuration; give the path of a YAML file."
        )
    return file


def _validate(file: Path) -> None:
    """Raises BadInput, with the sentence that ``evolver validate`` says of a file."""
    command = [sys.executable, "-m", "evolver", "validate", str(file)]
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise BadInput(
            f"{file}: checking it took more than {CHECK_SECONDS:.0f} s; check it with: evolver validate {file}"
        ) from None
    if ended.returncode:
        raise BadInput(_last_line(ended.stderr, file))


def _watch(process: subprocess.Popen[bytes], folder: Storage, name: str, errors: IO[bytes]) -> str:
    """What to tell the user about a process that was started.

    Raises BadInput if it ends before the run's folder is there.
    """
    until = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < until:
        if process.poll():
            errors.seek(0)
            raise BadInput(_last_line(errors.read().decode(errors="replace"), folder.location))
        if folder.exists(ABOUT_FILE):
            return f"{name} is started"
        time.sleep(0.1)
    return f"{name} is started and reads its models; it appears in the list once it has read them"


def _last_line(text: str, what: object) -> str:
    """The last line that a command printed, which says why it ended."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else f"{what}: the run ended without a message; run it on a terminal to see why."


def _start(arguments: list[str], errors: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Call ``evolver`` in a process that outlives this one; its error output goes to the file ``errors``."""
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-m", "evolver", *arguments]
    return subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=errors or quiet, start_new_session=True)
