"""The jobs of Ray clusters, for the dashboard: stopped and submitted again through Ray's own job API.

``RAY_API_SERVER_ADDRESS`` names the API where it cannot be asked for under the address that the job knew. Where the
cluster asks for a token, it is found as by ``ray job``: by ``RAY_AUTH_MODE=token`` and Ray's own file.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from evolver.errors import BadInput
from evolver.runs.about import Job

WAIT_SECONDS = 10.0
JOB_WAITS, JOB_FAILED = "PENDING", "FAILED"  # in Ray's words


class RayJobs:
    """Jobs by the submission ids and addresses that their runs have noted."""

    def stop(self, job: Job) -> None:
        """Ask a job to stop, as ``ray job stop`` does.

        Raises BadInput where its cluster does not answer or does not know it.
        """
        with _asking(job) as client:
            client.stop_job(job.id)

    def resume(self, job: Job, arguments: list[str]) -> None:
        """Submit a job again under its id, in the environment that it had.

        Args:
            arguments: of ``evolver``, to be called instead of what was called then; empty: the same again.

        Raises BadInput where its cluster does not answer or does not know it, or the job does not end.
        """
        with _asking(job) as client:
            was = client.get_job_info(job.id)
            command = was.entrypoint if not arguments else _command(was.entrypoint, arguments)
            # One that was asked to stop takes a moment.
            if not _comes(lambda: client.get_job_status(job.id).is_terminal()):
                raise BadInput(f"job {job.id} has not ended; wait for it, or stop it first.")
            client.delete_job(job.id)  # Ray gives an id once
            client.submit_job(
                entrypoint=command, submission_id=job.id, runtime_env=was.runtime_env, metadata=was.metadata
            )
            _comes(lambda: client.get_job_status(job.id) != JOB_WAITS)
            now = client.get_job_info(job.id)
            if now.status == JOB_FAILED:  # its environment may be gone: Ray keeps a job's working folder for a while
                raise BadInput(f"job {job.id} failed ({now.message}); submit it again from where its folder is.")


def _comes(true: Callable[[], bool]) -> bool:
    """Whether something comes true in a while."""
    until = time.monotonic() + WAIT_SECONDS
    while not (found := true()) and time.monotonic() < until:
        time.sleep(0.5)
    return found


def _command(entrypoint: str, arguments: list[str]) -> str:
    """``evolver`` by the interpreter that the job was started with."""
    first = next((word for word in shlex.split(entrypoint) if "python" in word.rpartition("/")[2]), "python")
    return shlex.join([first, "-m", "evolver", *arguments])


@contextmanager
def _asking(job: Job) -> Iterator[Any]:
    from ray.job_submission import JobSubmissionClient  # Ray takes seconds to import: only who asks pays

    try:
        yield JobSubmissionClient(job.address)
    except BadInput:
        raise
    except Exception as error:  # the client raises half a dozen kinds, and RuntimeError for most of them
        raise BadInput(
            f"job {job.id} at {job.address}: {' '.join(str(error).split())[:300]}; where the address is another one "
            "from here, name it by RAY_API_SERVER_ADDRESS."
        ) from error
