"""A crew of Ray actors, and the resources that each of them asks the cluster for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.actors import PopulationWorker
from cluster.connection import connect
from cluster.pulse import Pulse, is_alive
from evolver.config import Config
from evolver.errors import BadInput
from evolver.evaluation.tasks import Tasks
from evolver.records import Split
from evolver.threads import waiting
from evolver.workers.crew import Answered, Event, Gone, Ready
from evolver.workers.crew_pool import CrewPool
from evolver.workers.plan import Plan
from evolver.workers.pools import pool


class RayCrew:
    """A crew (see ``evolver.workers.crew``) of Ray actors.

    Args:
        plan: describes the run to the workers.
        split: the items that the workers score.
        options: options of every actor, such as the resources that the configuration gives a worker.
    """

    def __init__(self, plan: Plan, split: Split, options: dict[str, Any]) -> None:
        self._plan, self._split = ray.put(plan), split  # Ray then sends the plan once to each node, not to each actor
        self._options = options
        self._actors: dict[int, Any] = {}
        self._where: dict[int, dict[str, Any]] = {}
        self._futures: dict[Any, int] = {}
        self._hired = 0
        self._pulse = Pulse()

    def hire(self) -> int:
        number, self._hired = self._hired, self._hired + 1
        options = PopulationWorker.options(**self._options)  # type: ignore[attr-defined]
        actor = options.remote(self._plan, self._split, f"ray-{number}")
        self._actors[number] = actor
        self._futures[actor.ready.remote()] = number
        return number

    def send(self, worker: int, message: bytes) -> None:
        self._futures[self._actors[worker].evaluate.remote(message)] = worker

    def dismiss(self, worker: int) -> None:
        self._futures = {f: w for f, w in self._futures.items() if w != worker}
        self._where.pop(worker, None)
        ray.kill(self._actors.pop(worker))

    def wait(self, seconds: float) -> list[Event]:
        if cut_off := self._cut_off():
            return cut_off
        done, waiting = ray.wait(list(self._futures), num_returns=1, timeout=seconds)
        if done and waiting:  # collect the other calls that have ended by now
            done += ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]
        return [self._event(future, self._futures.pop(future)) for future in done]

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
        self._futures.clear()
        self._pulse.close()

    def _cut_off(self) -> list[Event]:
        """Events for the workers on nodes that cannot be reached any more; these workers are dismissed."""
        found = [w for w, where in self._where.items() if self._pulse.lost(where["node"])]
        for worker in found:
            self.dismiss(worker)  # so that it does not go on working if its node comes back
        return [Gone(worker, "its node cannot be reached", lost=True) for worker in found]

    def _event(self, future: Any, worker: int) -> Event:
        try:
            said = ray.get(future)
        except RayTaskError as error:  # a failed candidate is a result, so this error came from building the worker
            cause = getattr(error, "cause", None)
            raise cause if isinstance(cause, BadInput) else _unbuildable(error) from error
        except RayActorError as error:
            self._actors.pop(worker)
            if error.actor_init_failed:
                raise _unbuildable(error) from error
            return Gone(worker, " ".join(str(error).split())[:200], self._lost(worker))
        if isinstance(said, bytes):
            return Answered(worker, said)
        self._where[worker] = said
        return Ready(worker)

    def _lost(self, worker: int) -> bool:
        """Whether a worker's node was lost with it. Ray knows it only after a while, so the node itself is asked."""
        where = self._where.pop(worker, None)
        return where is not None and not any(n["NodeID"] == where["node"] and is_alive(n) for n in ray.nodes())


@pool("ray")
def on_ray(plan: Plan, split: Split, tasks: Tasks) -> CrewPool:
    """A pool of actors on the cluster that this process has joined, or joins now. Every actor loads the tasks itself.

    Raises BadInput where no node could ever hold a worker, and where no worker can be built.
    """
    connect()
    return CrewPool(RayCrew(plan, split, worker_options(plan.config)), plan.config.pool)


def worker_options(config: Config) -> dict[str, Any]:
    """The options of a worker's actor on the cluster that this process has joined: its resources, and the environment
    variables that say how its threads wait.

    Raises BadInput where no node could ever hold a worker.
    """
    nodes = nodes_of_cluster()
    resources = resources_of(config, nodes)
    check_resources(resources, nodes)
    return {**resources, "runtime_env": {"env_vars": waiting()}}


def resources_of(config: Config, nodes: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The resources that one worker asks Ray for, as options of an actor.

    Args:
        nodes: the resources of each node of the cluster. A worker asks for one GPU by default if any node has one.
    """
    pool = config.pool
    cpus = pool.num_cpus if pool.num_cpus is not None else float(config.evaluation.threads)
    gpus = pool.num_gpus if pool.num_gpus is not None else float(any(n.get("GPU", 0.0) >= 1 for n in nodes))
    return {"num_cpus": cpus, "num_gpus": gpus, "resources": dict(pool.resources)}


def check_resources(wanted: Mapping[str, Any], nodes: Sequence[Mapping[str, float]]) -> None:
    """Check that some node is large enough for a worker. Without this check, the worker would wait for ever.

    Args:
        wanted: options of an actor.
        nodes: the resources of each node, busy or not.

    Raises BadInput, naming the key that asks for too much and the most that a node has.
    """
    own = {f"pool.resources.{name}": (name, count) for name, count in wanted["resources"].items()}
    asked = {"pool.num_cpus": ("CPU", wanted["num_cpus"]), "pool.num_gpus": ("GPU", wanted["num_gpus"]), **own}
    if any(all(n.get(name, 0.0) >= count - 1e-9 for name, count in asked.values()) for n in nodes):
        return
    most = {key: max((n.get(name, 0.0) for n in nodes), default=0.0) for key, (name, _) in asked.items()}
    key = next((k for k, (_, count) in asked.items() if count > most[k] + 1e-9), "pool.num_cpus")
    name, count = asked[key]
    together = "" if count > most[key] + 1e-9 else " and lacks the other resources that a worker needs"
    raise BadInput(
        f"{key}: a worker needs {count:g} {name}, and the best of {len(nodes)} nodes has {most[key]:g}{together}; ask "
        "for less, or add a node that has it."
    )


def nodes_of_cluster() -> list[dict[str, float]]:
    """The resources of each node that is alive, busy or not."""
    return [dict(n["Resources"]) for n in ray.nodes() if n["Alive"]]


def _unbuildable(error: Exception) -> BadInput:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return BadInput(f"pool: a worker could not be built: {lines[-1][:300] if lines else type(error).__name__}")
