"""All loggers of a run as one, which hears results as the loop does."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from evolver.config import Config
from evolver.config.changes import FREE_KEYS
from evolver.loggers.base import Logger, Tracked
from evolver.loggers.courier import Courier
from evolver.records import Candidate, Result
from evolver.records.canonical import content_hash
from evolver.storage import Storage

# In the run's folder: the id under which trackers know it.
TRACKED_FILE = "loggers.json"
SUMMARY = "summary.json"
ARTIFACTS = ("report.md", "report.html", "curve.png", "recipe.json", SUMMARY)
# How long a run that has ended, or was stopped, waits for trackers that are behind.
END_SECONDS = 30.0
STOP_SECONDS = 10.0


class Trackers:
    """Tells every logger of a run what happens, and lets none of them end or slow it.

    A step is the rank of a result in the ledger: how many results of the search came before it. So steps never go
    back, whatever the number of workers, and in a later call of the run every result has the step that it had. Such a
    call replays results by the numbers of their candidates: one that comes before its turn is held back.

    Args:
        loggers: by name.
        say: where to warn of a logger that fails: once, whatever goes wrong with it.
    """

    def __init__(self, loggers: Mapping[str, Logger], say: Callable[[str], None]) -> None:
        self._couriers = [Courier(name, logger) for name, logger in loggers.items()]
        self._say = say
        self._warned: set[str] = set()
        self._held: dict[int, tuple[Candidate, Result]] = {}
        self._step, self._items, self._failed, self._best = 0, 0, 0, -math.inf
        self._finished = False

    def begin(self, run: Tracked) -> None:
        """The run starts, or goes on; nothing was passed on before."""
        self._send(lambda logger: logger.begin(run))

    def result(self, candidate: Candidate, result: Result) -> None:
        """Take in a result of any stage: of the search a step, of the baselines a number of the summary."""
        if not self._couriers:
            return
        if candidate.stage == "search":
            self._held[self._step if result.rank is None else result.rank] = candidate, result
            while self._step in self._held:
                self._pass_on(self._step)
                self._step += 1
        elif candidate.stage == "baseline" and result.score is not None:
            values = {f"baseline/{candidate.label}": result.score}
            self._send(lambda logger: logger.summary(values))
        self._warn()

    def finish(self, run: Storage) -> None:
        """The run is done, and its report is in its folder."""
        if not self._couriers:
            return
        for step in sorted(self._held):  # with a lowered budget not all that the ledger holds is asked for again
            self._pass_on(step)
        files = {name: run.read(name) for name in ARTIFACTS}
        summary = json.loads(files[SUMMARY])
        values = dict(_numbers(summary))
        self._send(lambda logger: logger.summary(values))
        self._send(lambda logger: logger.finish(summary["verdict"], files))
        self._finished = True

    def close(self) -> None:
        """Wait for the loggers, for a bounded time, and say which of them have not passed on all."""
        for courier in self._couriers:
            courier.end()
        seconds = END_SECONDS if self._finished else STOP_SECONDS
        until = time.monotonic() + seconds
        late = [c.name for c in self._couriers if not c.ended(until)]
        self._warn()
        for name in late:
            self._off(name, f"the tracker was still busy {seconds:g} s after the run")

    def _pass_on(self, step: int) -> None:
        values = self._values(*self._held.pop(step))
        for courier in self._couriers:
            courier.tell((step, values))

    def _values(self, candidate: Candidate, result: Result) -> dict[str, float]:
        self._items += result.cost
        self._failed += result.status == "failed"
        values: dict[str, float] = {
            "search/candidate": candidate.number, "search/items": self._items, "search/failed": self._failed,
        }  # fmt: skip
        if result.score is not None:  # tasks of a part of the items would not compare with those of all
            self._best = max(self._best, result.score)
            values |= {"search/score": result.score} | {f"task/{t}": v for t, v in result.tasks.items()}
        if self._best > -math.inf:
            values["search/best"] = self._best
        if not result.reused:
            values |= {f"seconds/{part}": s for part, s in result.seconds.items()}
        return values

    def _send(self, call: Callable[[Logger], None]) -> None:
        for courier in self._couriers:
            courier.send(call)

    def _warn(self) -> None:
        for courier in self._couriers:
            if courier.error:
                self._off(courier.name, courier.error)

    def _off(self, name: str, why: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            self._say(
                f"warning: loggers.{name}: off for the rest of this run ({why}); the next start of the run sends what "
                "is missing"
            )


def tracked(config: Config, search: Mapping[str, Any], run: Storage, facts: Mapping[str, str]) -> Tracked:
    """What loggers are told of a run.

    The id is drawn once for each folder. The identity of the configuration would not do: runs under other names, and
    one that is started over, have the same.

    Args:
        search: the settings of the search, with defaults filled in.
        run: its folder, into which the id is written.

    Raises OSError where that cannot be.
    """
    try:
        drawn = run.read(TRACKED_FILE).decode()
    except FileNotFoundError:
        drawn = json.dumps({"id": uuid.uuid4().hex})
        run.write(TRACKED_FILE, drawn.encode())
    # With the name in it, a copy of a folder under another name is a run of its own.
    identity = content_hash([drawn, config.run])
    settings = {**config.model_dump(mode="json", exclude=set(FREE_KEYS)), "search": dict(search)}
    changing = config.model_dump(mode="json", include={"budget", "pool"})
    return Tracked(identity, config.run, settings, changing, {**facts, "folder": run.location})


def _numbers(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a summary, under keys with slashes; ``budget`` is a setting."""
    for key, value in nested.items():
        if isinstance(value, Mapping) and key != "budget":
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value
