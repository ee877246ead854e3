"""Where ``evolver study`` writes to: an SQLite file, a journal file of Optuna's, or a PostgreSQL database."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from evolver.errors import BadInput
from evolver.storage import check_target, new_file

JOURNALS = (".journal", ".log")
# How long a database may take to answer; a URL that says ?connect_timeout=SECONDS decides itself.
_PATIENCE = 10


def study_target(given: str) -> AbstractContextManager[BaseStorage]:
    """Where studies are written to, once it is entered.

    Args:
        given: a new file (a journal if it ends with .journal or .log, else SQLite), or postgresql://USER@HOST/DATABASE.

    Raises BadInput now for a file that exists already, for a URL of another kind, where the driver is missing and where
    the database does not answer; once it is entered, where it cannot be written.
    """
    if "://" in given:
        return _in_database(given, _connected(_postgresql(given)))
    check_target(Path(given), "file")
    return _in_file(Path(given))


def shown_with(given: str) -> str:
    """What ``optuna-dashboard`` is called with to show the studies, without a password."""
    if "://" in given:
        return make_url(given).render_as_string(hide_password=True)
    return given if given.endswith(JOURNALS) else f"sqlite:///{given}"


@contextmanager
def _in_file(file: Path) -> Iterator[BaseStorage]:
    with new_file(file) as whole, tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as scratch:
        written = Path(scratch) / "study"
        try:
            if file.suffix in JOURNALS:
                yield JournalStorage(JournalFileBackend(str(written)))
            else:
                yield RDBStorage(f"sqlite:///{written}")
        except (SQLAlchemyError, StorageInternalError) as error:
            raise BadInput(
                f"{file}: it cannot be written ({_reason(error)}); free disk space or correct the permissions, and run "
                "the command again."
            ) from error
        os.replace(written, whole)


@contextmanager
def _in_database(given: str, storage: RDBStorage) -> Iterator[BaseStorage]:
    shown = shown_with(given)
    try:
        yield storage
    except (SQLAlchemyError, StorageInternalError) as error:
        raise BadInput(f"{shown}: the studies cannot be written ({_reason(error)}); see to the database.") from error
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _postgresql(given: str) -> URL:
    """The URL with the driver in it.

    Raises BadInput for a URL of another kind of database, and where the driver is not installed.
    """
    try:
        url = make_url(given)
    except ArgumentError as error:
        raise BadInput(
            f"{given[:200]}: this is no URL of a database; write postgresql://USER:PASSWORD@HOST:PORT/DATABASE."
        ) from error
    if url.drivername not in ("postgresql", "postgresql+psycopg"):
        raise BadInput(
            f"{url.render_as_string(hide_password=True)}: studies are written to PostgreSQL (postgresql://…), or to a "
            "file; a name that ends with .journal makes a journal, and any other name an SQLite file."
        )
    try:
        importlib.import_module("psycopg")
    except ImportError as error:
        raise BadInput(
            "evolver study: PostgreSQL needs the package psycopg, which is not installed; run pip install "
            "'evolver[postgresql]'."
        ) from error
    return url.set(drivername="postgresql+psycopg")


def _connected(url: URL) -> RDBStorage:
    """Raises BadInput where the database does not answer, or refuses."""
    seconds = {} if "connect_timeout" in url.query else {"connect_timeout": _PATIENCE}
    try:
        return RDBStorage(url.render_as_string(hide_password=False), engine_kwargs={"connect_args": seconds})
    except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:
        raise BadInput(
            f"{url.set(drivername='postgresql').render_as_string(hide_password=True)}: the database does not answer as "
            f"it should ({_reason(error)}); see that it runs, and that host, port, user and database are right."
        ) from error


def _reason(error: BaseException) -> str:
    said = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or error
    return " ".join(str(said).split())[:300]
