"""What is asked of a cluster before a run begins: in which dtype its workers compute faster."""

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
    """Have a task with the resources of a worker choose; it waits for a place as a worker does.

    Raises BadInput where no node could ever hold a worker, or the task cannot be carried out.
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
            f"pool: no worker could say in which dtype it computes faster ({said}); name one under model.compute."
        ) from error
    return found


@ray.remote
def _chosen(config: Config) -> ComputeChoice:
    # A task that was given no GPU must not take one that it happens to see.
    return choose_compute(config, default_device() if ray.get_gpu_ids() else "cpu")
