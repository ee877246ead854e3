"""A pool of Ray actors: back-pressure, results in any order, dead actors replaced, bounded retries."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from cluster.actors import PopulationWorker
from evolver.config import Config
from evolver.errors import BadInput
from evolver.messages import pack_candidate, unpack_result
from evolver.records import Candidate, Result, Split
from evolver.worker import Plan

# How often a wait looks at the clock for evaluations that take too long.
TICK_SECONDS = 1.0
PATIENCE_SECONDS = 600.0


@dataclass
class _Flight:
    """A candidate on its way: which actor has it, since when, and how often it was tried."""

    candidate: Candidate
    actor: int
    since: float
    tries: int


class RayPool:
    """Evaluates on ``pool.num_workers`` actors.

    Raises BadInput where the cluster can never offer what the configuration asks for, or where a worker cannot be
    built.
    """

    def __init__(self, plan: Plan, split: Split) -> None:
        self.plan, self.split, self.settings = plan, split, plan.config.pool
        self.resources = _resources(plan.config)
        check_resources(self.resources, self.settings.num_workers, ray.cluster_resources())
        self.bytes_sent = self.bytes_received = self.messages = 0
        self._started = 0
        self._actors: dict[int, Any] = {}
        self._idle: list[int] = []
        self._flights: dict[Any, _Flight] = {}
        self._lost: list[Result] = []

    def free(self) -> int:
        return self.settings.num_workers - len(self._flights)

    def submit(self, candidate: Candidate) -> None:
        self._send(candidate, tries=1)

    def wait(self) -> list[Result]:
        while not self._lost:
            done, _ = ray.wait(list(self._flights), num_returns=1, timeout=TICK_SECONDS)
            for future in done:
                self._land(future, self._flights.pop(future))
            self._stop_late()
        out, self._lost = self._lost, []
        return out

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()

    def _send(self, candidate: Candidate, tries: int) -> None:
        if not self._idle:
            # At the first candidate all of them, side by side; later the replacement of a dead one.
            self._start(self.settings.num_workers - len(self._actors))
        number = self._idle.pop()
        message = pack_candidate(candidate)
        self.bytes_sent += len(message)
        future = self._actors[number].evaluate.remote(message)
        self._flights[future] = _Flight(candidate, number, time.monotonic(), tries)

    def _land(self, future: Any, flight: _Flight) -> None:
        try:
            message = ray.get(future)
        except RayActorError as error:
            self._retire(flight.actor)
            self._retry(flight, f"its worker died ({' '.join(str(error).split())[:200]})")
            return
        self._idle.append(flight.actor)
        self.bytes_received += len(message)
        self.messages += 1
        self._lost.append(unpack_result(message))

    def _retry(self, flight: _Flight, reason: str) -> None:
        if flight.tries <= self.settings.retries:
            self._send(flight.candidate, flight.tries + 1)
        else:
            self._lost.append(_failed(flight.candidate, f"{reason}; tried {flight.tries} times"))

    def _stop_late(self) -> None:
        limit = self.settings.timeout_s
        if limit is None:
            return
        for future, flight in list(self._flights.items()):
            if time.monotonic() - flight.since > limit:
                del self._flights[future]
                self._retire(flight.actor)
                self._lost.append(_failed(flight.candidate, f"timed out after {limit:g} s"))

    def _retire(self, number: int) -> None:
        ray.kill(self._actors.pop(number))

    def _start(self, count: int) -> None:
        numbers = range(self._started, self._started + count)
        self._started += count
        options = PopulationWorker.options(**self.resources)  # type: ignore[attr-defined]
        actors = {n: options.remote(self.plan, self.split, f"ray-{n}") for n in numbers}
        try:
            ray.get([a.ready.remote() for a in actors.values()], timeout=PATIENCE_SECONDS)
        except RayTaskError as error:
            raise _cause(error) from error
        except RayActorError as error:
            raise BadInput(f"pool: a worker could not be built: {_last_line(error)}") from error
        except GetTimeoutError as error:
            raise BadInput(
                f"pool: no worker was ready within {PATIENCE_SECONDS:.0f} s; is the cluster busy with other jobs?"
            ) from error
        self._actors.update(actors)
        self._idle.extend(reversed(numbers))


def check_resources(wanted: dict[str, float], workers: int, offered: dict[str, float]) -> None:
    """Refuse what the cluster could never satisfy.

    Raises BadInput that says what it offers.
    """
    for key, name in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        if wanted[key] * workers > offered.get(name, 0.0) + 1e-9:
            raise BadInput(
                f"pool.{key}: {workers} workers of {wanted[key]:g} {name}s are asked for and the cluster has "
                f"{offered.get(name, 0.0):g}; ask for less, or add nodes."
            )


def _resources(config: Config) -> dict[str, float]:
    cpus = config.pool.num_cpus if config.pool.num_cpus is not None else float(config.evaluation.threads)
    return {"num_cpus": cpus, "num_gpus": config.pool.num_gpus}


def _failed(candidate: Candidate, reason: str) -> Result:
    return Result(candidate.number, candidate.recipe.id, "failed", reason=reason, stage=candidate.stage)


def _cause(error: RayError) -> Exception:
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BadInput) else BadInput(f"pool: a worker could not be built: {_last_line(error)}")


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
