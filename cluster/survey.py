"""Measures on a Ray cluster, before a run begins, in which dtype its workers compute faster."""

from __future__ import annotations

import ray
from ray.exceptions import RayError

from cluster.pools.ray import worker_options
from evolver.config import Config
from evolver.errors import BadInput
from evolver.evaluation.live import default_device
from evolver.workers.compute import ComputeChoice
from evolver.workers.worker import choose_compute


def choose_on_ray(config: Config) -> ComputeChoice:
    """Have a Ray task measure the dtypes and choose one. The task asks for the same resources as a worker, so that it
    runs where a worker would run, and it waits until these resources are free.

    Raises BadInput where no node could ever hold a worker, and where the task fails.
    """
    options = worker_options(config)
    try:
        found: ComputeChoice = ray.get(_chosen.options(**options).remote(config))
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, BadInput):
            raise cause from error
        said = " ".join(str(cause or error).split())[:300]
        raise BadInput(
            f"pool: no worker could measure which dtype is faster ({said}); set model.compute to a dtype."
        ) from error
    return found


@ray.remote
def _chosen(config: Config) -> ComputeChoice:
    # Ray may leave GPUs visible to a task that asked for none. Such a task must not use them.
    return choose_compute(config, default_device() if ray.get_gpu_ids() else "cpu")
