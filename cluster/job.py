"""The job: from the command line to a finished run, on a laptop or inside a Ray job.

Exit status: 0 done (or a Ray job that was stopped), 2 bad input, 3 stopped with everything finished kept, 1 a fault
of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from cluster.connection import connect
from cluster.pools import check_pool, pool_named
from evolver.config import Config, ConfigText, PoolSettings, config_at
from evolver.driver.run import run
from evolver.errors import BadInput
from evolver.evaluation.live import default_device
from evolver.evaluation.scores.course import Evaluation
from evolver.evaluation.tasks import Tasks
from evolver.loggers.terminal import Display, display
from evolver.pool import Pool
from evolver.records import Split
from evolver.runs.about import Job
from evolver.storage import Storage, storage_at
from evolver.workers.compute import ComputeChoice
from evolver.workers.plan import Plan
from evolver.workers.shared import SharedPool
from evolver.workers.worker import choose_compute

# What Ray tells the driver of a job, and how ids begin that Ray drew itself.
RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
DRAWN_BY_RAY = "raysubmit_"
RESULTS = (
    "folder of all runs, or a URI such as s3://bucket/runs (default: ./results, or ~/evolver-results in a Ray job)"
)


class Stopped(BaseException):
    """Somebody asked the run to stop. Like KeyboardInterrupt no Exception, so that no worker takes it for a failure."""


def run_job(arguments: Sequence[str] | None = None) -> int:
    """Run the configuration that the command line names."""
    parser = argparse.ArgumentParser(prog="evolve.py", description="Search for the best merge of fine-tuned models.")
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("--run", help="name of the run (default: the id of the Ray job, if you chose one; else `run:`)")
    parser.add_argument("--results", help=RESULTS)
    given = parser.parse_args(arguments)
    try:
        config = config_at(given.config)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    return drive(config, given.results, given.run)


def drive(given: ConfigText, results: str | None, name: str | None) -> int:
    """Run a configuration, or the rest of it, and tell on the terminal how it goes; the exit status.

    Args:
        results: folder of all runs; default: see ``results_at``.
        name: of the run; default: the id of the Ray job, if somebody chose one, else the configuration's.
    """
    signal.signal(signal.SIGTERM, _stop)
    shown = display()
    try:
        run_here(given, results_at(results), name or submission_id(), shown)
        return 0
    except BadInput as error:
        shown.close()
        print(error, file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt, SystemError) as error:
        # Compiled code, as Ray's, says SystemError where a signal has raised something inside of it.
        if isinstance(error, SystemError) and not isinstance(error.__cause__, Stopped | KeyboardInterrupt):
            raise
        shown.say("stopped; everything that finished is kept: the same command goes on from here")
        # `ray job stop` is no failure, and Ray says itself that the job was stopped.
        return 0 if in_ray_job() else 3
    finally:
        shown.close()


def run_here(given: ConfigText, results: Storage, name: str | None, shown: Display) -> Storage:
    """Run a configuration, or the rest of it, on the pool that it asks for; the run's folder.

    Raises BadInput for anything that the user has to mend.
    """
    device = device_of(given.parsed().pool)
    return run(given, results, make_pool, shown, device, name, this_job(), choose_for_workers)


def make_pool(plan: Plan, split: Split, tasks: Tasks) -> Pool:
    """The pool that the configuration asks for.

    Raises BadInput for an unknown kind, or a pool that can never be.
    """
    settings, scale = plan.config.pool, tasks.scale(split)
    pool = pool_named(pool_kind(settings))(plan, split, tasks)
    if settings.share == 1:
        return pool
    block, alpha = plan.block(split, len(scale.tasks)), plan.config.evaluation.racing
    return SharedPool(pool, settings.share, lambda candidate: Evaluation(candidate, scale, block, alpha))


def choose_for_workers(config: Config) -> ComputeChoice:
    """The dtype of forward passes that is faster where the workers of a configuration are."""
    if not uses_ray(config.pool):
        return choose_compute(config)
    from cluster.survey import choose_on_ray

    connect()
    return choose_on_ray(config)


def device_of(settings: PoolSettings) -> str:
    """Where this process computes. The driver of a Ray job has no GPU to itself, and uses the CPU."""
    return "cpu" if uses_ray(settings) else default_device()


def pool_kind(settings: PoolSettings) -> str:
    """The kind of pool: Ray's where nothing else is asked for and Ray started this process, else this machine's.

    Raises BadInput for an unknown one.
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
    """The id of this Ray job, where somebody chose one: jobs of one id are one run."""
    job = this_job()
    return None if job is None or job.id.startswith(DRAWN_BY_RAY) else job.id


def this_job() -> Job | None:
    """The Ray job that this process is."""
    found = json.loads(os.environ.get(RAY_JOB, "{}")).get("metadata", {}).get("job_submission_id")
    return Job(found, os.environ.get("RAY_ADDRESS", "auto")) if found else None


def results_at(given: str | None) -> Storage:
    """Where runs are kept: what was given, else ./results, else (in a Ray job, whose folder is a copy that vanishes)
    ``~/evolver-results``.
    """
    return storage_at(given or (Path.home() / "evolver-results" if in_ray_job() else Path("results")))


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped
