"""The Ray actor around a worker."""

from __future__ import annotations

import os
from typing import Any

import ray

from evolver.evaluation.live import default_device
from evolver.records import Split
from evolver.workers.messages import pack_result, unpack_candidate
from evolver.workers.plan import Plan
from evolver.workers.worker import Worker


@ray.remote
class PopulationWorker:
    """One per accelerator, or share of one: holds a worker, and with it experts, population and live model."""

    def __init__(self, plan: Plan, split: Split, name: str) -> None:
        # An actor that was given no GPU must not take one that it happens to see.
        device = default_device() if ray.get_gpu_ids() else "cpu"
        self.worker = Worker(plan, split, name, device=device)

    def ready(self) -> dict[str, Any]:
        """Answers once the worker is built: who and where it is."""
        return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}

    def evaluate(self, message: bytes) -> bytes:
        """Score a packed candidate, return the packed result."""
        return pack_result(self.worker.evaluate(unpack_candidate(message)))
