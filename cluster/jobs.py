"""How the dashboard stops Ray jobs and submits them again, through Ray's job API.

A run's folder holds the address of the API as the job saw it. Where this machine needs another address for it, the
environment variable ``RAY_API_SERVER_ADDRESS`` names it. Where the cluster asks for a token, the client finds it as
the command ``ray job`` does: with ``RAY_AUTH_MODE=token`` it reads Ray's own token file.
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
# What Ray gives as the command of a job that was deleted while its last state was still being written.
NO_COMMAND = "Entrypoint not found."
JOB_WAITS, JOB_FAILED = "PENDING", "FAILED"  # states of a job, as Ray's API writes them


class RayJobs:
    """Stops and resumes jobs, which it finds by the submission id and the address in the run's folder."""

    def stop(self, job: Job) -> None:
        """Ask a job to stop, as ``ray job stop`` does.

        Raises BadInput where the cluster does not answer or does not know the job.
        """
        with _asking(job) as client:
            client.stop_job(job.id)

    def resume(self, job: Job, arguments: list[str]) -> None:
        """Submit a job again under the same id and with the same runtime environment.

        Args:
            arguments: arguments of ``evolver`` that replace the command of the job; empty: the same command again.

        Raises BadInput where the cluster does not answer or does not know the job, where the job has not ended after
        WAIT_SECONDS, and where it fails at once.
        """
        with _asking(job) as client:
            was = client.get_job_info(job.id)
            if was.entrypoint == NO_COMMAND:
                raise LookupError("the cluster no longer knows the job's command")
            command = was.entrypoint if not arguments else _command(was.entrypoint, arguments)
            # A job that was asked to stop needs a moment to end.
            if not _comes(lambda: client.get_job_status(job.id).is_terminal()):
                raise BadInput(f"job {job.id} has not ended; wait for it, or stop it first.")
            client.delete_job(job.id)  # Ray refuses an id as long as it remembers a job of this id
            client.submit_job(
                entrypoint=command, submission_id=job.id, runtime_env=was.runtime_env, metadata=was.metadata
            )
            _comes(lambda: client.get_job_status(job.id) != JOB_WAITS)
            now = client.get_job_info(job.id)
            if now.status == JOB_FAILED:  # Ray may have deleted the job's working folder, which it keeps for a while
                raise BadInput(
                    f"job {job.id} failed ({now.message}); submit it again from the folder that it was submitted from."
                )


def _comes(true: Callable[[], bool]) -> bool:
    """Whether a condition becomes true within WAIT_SECONDS."""
    until = time.monotonic() + WAIT_SECONDS
    while not (found := true()) and time.monotonic() < until:
        time.sleep(0.5)
    return found


def _command(entrypoint: str, arguments: list[str]) -> str:
    """A command line that calls ``evolver`` with the interpreter of the job's own command."""
    first = next((word for word in shlex.split(entrypoint) if "python" in word.rpartition("/")[2]), "python")
    return shlex.join([first, "-m", "evolver", *arguments])


@contextmanager
def _asking(job: Job) -> Iterator[Any]:
    from ray.job_submission import JobSubmissionClient  # importing Ray takes seconds, so it is imported only here

    try:
        yield JobSubmissionClient(job.address)
    except BadInput:
        raise
    except Exception as error:  # the client raises half a dozen classes, mostly RuntimeError
        raise BadInput(
            f"job {job.id} at {job.address}: {' '.join(str(error).split())[:300]}; if this machine "
            "reaches the cluster under another address, set RAY_API_SERVER_ADDRESS to it."
        ) from error
