"""Loggers: what passes the results of a run on to trackers of experiments. They change no result, and fail alone."""

from __future__ import annotations

import importlib
import pkgutil

from evolver.config import Config
from evolver.config.reading import check_section
from evolver.errors import BadInput, nearest
from evolver.loggers.base import LOGGERS, Logger, RunPlace, Tracked, installed
from evolver.loggers.trackers import Trackers, tracked
from evolver.storage import LocalStorage, Storage

__all__ = ["LOGGERS", "Logger", "Tracked", "Trackers", "build_loggers", "check_loggers", "tracked"]

for _found in pkgutil.iter_modules(__path__):  # they register themselves in LOGGERS
    importlib.import_module(f"{__name__}.{_found.name}")


def check_loggers(config: Config, file: str) -> None:
    """Check what a configuration says of loggers, whatever is installed here.

    Raises BadInput for a logger that there is none of, or one of its keys.
    """
    for name, settings in config.loggers.items():
        if name not in LOGGERS:
            raise BadInput(f"{file}: loggers.{name}: unknown logger; {nearest(name, LOGGERS)}")
        check_section(LOGGERS[name].settings, settings or {}, file, f"loggers.{name}.")


def build_loggers(config: Config, file: str, run: Storage) -> dict[str, Logger]:
    """The loggers of a configuration, by name; none has begun.

    Raises BadInput for what ``check`` refuses, a package that is missing or broken, and a folder that cannot be.
    """
    check_loggers(config, file)
    place = RunPlace(config.run, run.path if isinstance(run, LocalStorage) else None)
    built: dict[str, Logger] = {}
    for name, settings in config.loggers.items():
        kind = LOGGERS[name]
        if kind.package is not None and not installed(kind.package):
            raise BadInput(f"{file}: loggers.{name}: its package is missing; pip install 'evolver[{name}]'")
        try:
            kind.load()
        except ImportError as error:
            raise BadInput(
                f"{file}: loggers.{name}: its package cannot be imported ({' '.join(str(error).split())[:200]}); "
                f"install it again by pip install 'evolver[{name}]', or leave the logger out."
            ) from error
        try:
            built[name] = kind.build(kind.settings.model_validate(settings or {}), place)
        except BadInput as error:
            raise BadInput(f"{file}: loggers.{name}.{error}") from error
    return built
