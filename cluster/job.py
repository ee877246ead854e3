"""The job: from a configuration to a finished run, on a laptop or inside a Ray job.

The exit status is 0 when the run is done (or when a Ray job was stopped), 2 when the user's input is wrong, 3 when the
run was stopped and can be continued, and 1 when Evolver itself has a bug.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from cluster.connection import connect
from cluster.pools import check_pool, pool_named
from evolver.config import Config, PoolSettings
from evolver.config.reading import ConfigText
from evolver.driver.run import run
from evolver.errors import BadInput, file_sentence, takes_nothing
from evolver.evaluation.live import default_device
from evolver.evaluation.scores.course import Evaluation
from evolver.evaluation.tasks import Tasks
from evolver.loggers.terminal import Display, display
from evolver.pool import Pool
from evolver.records import Split
from evolver.runs.about import Job
from evolver.storage import Storage, storage_at
from evolver.workers.compute import ComputeChoice
from evolver.workers.opened import check_backend_device
from evolver.workers.plan import Plan
from evolver.workers.retrying import RetryingPool
from evolver.workers.shared import SharedPool
from evolver.workers.worker import choose_compute

# The environment variable in which Ray describes a job to its driver, and the prefix of ids that Ray chose itself.
RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
DRAWN_BY_RAY = "raysubmit_"
# Keys of the section ``pool`` that describe a Ray actor.
RAY_KEYS = ("num_cpus", "num_gpus", "resources")


class Stopped(BaseException):
    """The process was asked to stop (SIGTERM).

    It does not derive from Exception, as KeyboardInterrupt does not: a worker turns every Exception into a failed
    result.
    """


def drive(given: ConfigText, results: str | None, name: str | None, retry_failed: bool = False) -> int:
    """Run a configuration or continue it, show its progress on the terminal, and return the exit status.

    Args:
        given: the configuration.
        results: folder of all runs, or its URI; default: see ``results_at``.
        name: name of the run; default: the id of the Ray job if the user chose one, else the key ``run``.
        retry_failed: whether candidates that failed in an earlier call are tried again.
    """
    signal.signal(signal.SIGTERM, _stop)
    shown = display()
    try:
        run_here(given, results_at(results), submission_id() if name is None else name, shown, retry_failed)
        return 0
    except BadInput as error:
        shown.close()
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        if not takes_nothing(error):
            raise
        shown.close()
        print(file_sentence(error, "a file of this command"), file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt, SystemError) as error:
        # Where a signal handler raises inside of compiled code such as Ray's, a SystemError arrives here instead.
        if isinstance(error, SystemError) and not isinstance(error.__cause__, Stopped | KeyboardInterrupt):
            raise
        shown.say("stopped; everything that finished is kept, and the same command continues the run")
        # A Ray job that exits with another status counts as failed, although `ray job stop` was asked for.
        return 0 if in_ray_job() else 3
    finally:
        shown.close()


def run_here(
    given: ConfigText, results: Storage, name: str | None, shown: Display, retry_failed: bool = False
) -> Storage:  # fmt: skip
    """Run a configuration or continue it on the pool that it asks for, and return the run's folder.

    Raises BadInput for anything that the user has to correct.
    """
    config = given.parsed()
    device = device_of(config, given.origin)
    for warning in unread_by_pool(config.pool):
        shown.say(f"warning: {warning}")
    return run(given, results, make_pool, shown, device, name, this_job(), choose_for_workers, retry_failed)


def make_pool(plan: Plan, split: Split, tasks: Tasks) -> Pool:
    """The pool that the configuration asks for.

    Raises BadInput for an unknown ``pool.kind``, and for a pool whose workers no node could ever hold.
    """
    settings, scale = plan.config.pool, tasks.scale(split)
    pool = pool_named(pool_kind(settings))(plan, split, tasks)
    if settings.share > 1:
        block, alpha = plan.block(split, len(scale.tasks)), plan.config.evaluation.racing
        pool = SharedPool(pool, settings.share, lambda candidate: Evaluation(candidate, scale, block, alpha))
    return RetryingPool(pool, settings.retries)


def choose_for_workers(config: Config) -> ComputeChoice:
    """Measure, on a machine where the workers of a configuration run, in which dtype forward passes are faster."""
    if not uses_ray(config.pool):
        return choose_compute(config)
    from cluster.survey import choose_on_ray

    connect()
    return choose_on_ray(config)


def device_of(config: Config, file: str) -> str:
    """The device on which this process computes: the CPU where Ray actors do the work, because they need the GPUs.

    Raises BadInput where this machine does the work and lacks the device of ``evaluation.backend``. Where Ray actors do
    it, each of them looks at its own machine.
    """
    if uses_ray(config.pool):
        return "cpu"
    try:
        check_backend_device(config.evaluation)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error
    return default_device()


def unread_by_pool(settings: PoolSettings) -> list[str]:
    """A sentence on each key of the section ``pool`` that the user wrote and that the kind of pool does not read."""
    if pool_kind(settings) != "local":
        return []
    return [
        f"pool.{key} does nothing: the pool is local, and the key describes a Ray actor; leave it out, or write "
        "kind: ray"
        for key in RAY_KEYS if key in settings.model_fields_set
    ]  # fmt: skip


def pool_kind(settings: PoolSettings) -> str:
    """The kind of pool. ``auto`` means ``ray`` in a process that Ray started as a job, and ``local`` elsewhere.

    Raises BadInput for an unknown kind.
    """
    kind = ("ray" if in_ray_job() else "local") if settings.kind == "auto" else settings.kind
    check_pool(kind)
    return kind


def uses_ray(settings: PoolSettings) -> bool:
    """Whether candidates are evaluated by Ray actors."""
    return pool_kind(settings) == "ray"


def in_ray_job() -> bool:
    """Whether this process was started by ``ray job submit``."""
    return RAY_JOB in os.environ


def submission_id() -> str | None:
    """The id of this Ray job if the user chose it, else None. It names the run: a job that is submitted again under
    the same id continues the same run.
    """
    job = this_job()
    return None if job is None or job.id.startswith(DRAWN_BY_RAY) else job.id


def this_job() -> Job | None:
    """The Ray job that this process drives; None where it drives none."""
    found = json.loads(os.environ.get(RAY_JOB, "{}")).get("metadata", {}).get("job_submission_id")
    return Job(found, os.environ.get("RAY_ADDRESS", "auto")) if found else None


def results_at(given: str | None) -> Storage:
    """The folder of all runs: the one that was given, else ``./results``, or ``~/evolver-results`` in a Ray job.

    Ray copies the working folder of a job and deletes the copy later, so results must not lie there.
    """
    default = Path.home() / "evolver-results" if in_ray_job() else Path("results")
    return storage_at(default if given is None else given)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped
