"""The protocol of a logger, what it is told of a run, and the registry of loggers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from evolver.config.section import Section

Plain = bool | int | float | str
LoggedRow = tuple[int, Mapping[str, float]]


@dataclass(frozen=True)
class Tracked:
    """A run, as its loggers are told of it before its first result.

    Args:
        id: the same in every call of the run, and no other run's.
        name: of the run.
        settings: the sections of its configuration that make it this run.
        changing: those that may differ from one call of it to the next.
        facts: what else is worth knowing, such as versions.
    """

    id: str
    name: str
    settings: Mapping[str, Any]
    changing: Mapping[str, Any]
    facts: Mapping[str, str]


class Logger(Protocol):
    """What passes a run on to one tracker.

    Its methods, but for ``load``, are called one at a time, in a thread of its own: they may block, and whatever they
    raise turns this logger off and nothing else. A run that goes on passes all of its results again, under the same
    steps; a logger starts over or leaves out what its tracker has, so that the tracker shows every step once.
    """

    @staticmethod
    def load() -> None:
        """Import the tracker's package, before the run has threads: two that import at once may find half a module.

        Only asked of a logger that is registered with a package.
        """
        ...

    def begin(self, run: Tracked) -> None:
        """Find the run in the tracker, or make it there."""
        ...

    def results(self, rows: Sequence[LoggedRow]) -> None:
        """Results of the search, as many as wait for it: of each its step, from 0 up, and its numbers."""
        ...

    def summary(self, values: Mapping[str, float]) -> None:
        """Numbers of the run as a whole; a later one of the same name takes the place of an earlier one."""
        ...

    def finish(self, verdict: str, files: Mapping[str, bytes]) -> None:
        """The run has come to its end, with these files by name."""
        ...

    def close(self) -> None:
        """Nothing more will come, in this call of the run; without ``finish`` before it, the run was stopped."""
        ...


@dataclass(frozen=True)
class RunPlace:
    """Where a run is called: its name, and its folder where that lies on this machine."""

    name: str
    folder: Path | None


@dataclass(frozen=True)
class LoggerKind:
    """A registered logger.

    Args:
        package: what it imports; the extra of Evolver that installs it bears the logger's name. None: nothing.
        load: see ``Logger``.
    """

    name: str
    settings: type[Section]
    build: Callable[[Any, RunPlace], Logger]
    package: str | None
    load: Callable[[], None]


LOGGERS: dict[str, LoggerKind] = {}
LoggerSettings = TypeVar("LoggerSettings", bound=Section)


def logger(name: str, settings: type[LoggerSettings], package: str | None = None) -> Callable[[Any], Any]:
    """Register a logger under ``name``; it is built as ``logger(settings, place)``, which may raise BadInput.

    Args:
        package: what it imports beside what Evolver itself needs. It is imported no earlier than by the logger's
            ``load``: that takes seconds, and only runs that use it should pay.
    """

    def register(build: Any) -> Any:
        LOGGERS[name] = LoggerKind(name, settings, build, package, _nothing if package is None else build.load)
        return build

    return register


def _nothing() -> None: ...


def installed(package: str) -> bool:
    """Whether a package can be imported. A folder of that name, as W&B makes one, is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def flat(nested: Mapping[str, Any]) -> dict[str, Plain]:
    """Nested settings under dotted keys; what is not set is left out, and a plain list becomes its JSON."""
    return dict(_flat(nested, ""))


def _flat(value: Any, key: str) -> Iterator[tuple[str, Plain]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{key}[{number}]")
    elif isinstance(value, Plain):
        yield key, value
    elif value is not None:
        yield key, json.dumps(value)
