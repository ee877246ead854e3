"""The Ray actor around a worker."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray

from evolver.evaluation.live import default_device
from evolver.records import Split
from evolver.workers.failures import BrokenDevice
from evolver.workers.plan import Plan
from evolver.workers.telling import Inbox
from evolver.workers.worker import Worker


@ray.remote
class PopulationWorker:
    """A Ray actor that holds one worker, and with it the opened experts, the cached population and the live model.

    An actor has one accelerator, a share of one, or CPUs only.

    Args:
        plan: describes the run to the worker.
        split: the items that the worker scores.
        name: the worker's name in the ledger.

    Raises BadInput where the worker cannot be built on this node.
    """

    def __init__(self, plan: Plan, split: Split, name: str) -> None:
        # Ray may leave GPUs visible to an actor that asked for none. Such an actor must not use them.
        device = default_device() if ray.get_gpu_ids() else "cpu"
        self.worker, self.inbox = Worker(plan, split, name, device=device), Inbox()

    def ready(self) -> dict[str, Any]:
        """The process id and the node id of the worker. Ray answers this call only after the worker is built."""
        return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}

    def evaluate(self, message: bytes) -> bytes:
        """Score a candidate, and return the result; both travel as ``evolver.workers.messages`` packs them. An actor
        that lacks nodes of the candidate's recipe, as it was started anew, says so instead.

        The actor ends where its accelerator has failed; the pool then starts another one.
        """
        try:
            return self.inbox.answer(message, self.worker.evaluate)
        except BrokenDevice as error:
            logging.getLogger(__name__).error("%s", error)
            ray.actor.exit_actor()
            raise  # not reached: the call above ends the process
