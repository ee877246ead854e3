"""The folder of a run: its configuration, its ledger and its results. A folder belongs to one configuration."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import yaml

from evolver.config import Config
from evolver.config.changes import differences
from evolver.config.reading import ConfigText
from evolver.errors import BadInput, file_sentence
from evolver.ledger import part_names, read_parts
from evolver.records.canonical import content_hash
from evolver.runs.files import CONFIG_REMEDY, IDENTITY_FILE, RUN_FILE, mapping_of, no_run, text_of
from evolver.storage import Storage
from evolver.storage.lease import Lease

Default = Callable[[str], Any]


def compute_of(folder: Storage) -> str | None:
    """The dtype of a run's forward passes; None where the folder holds no run yet."""
    model = (_frozen(folder) or {}).get("model")
    return model.get("compute") if isinstance(model, dict) else None


def made_before(folder: Storage, section: str, key: str) -> bool:
    """Whether the folder holds scores of a run whose identity has a section, but not this key in it: the run is older
    than the key, or has chosen against it.
    """
    try:
        found = (_frozen(folder) or {}).get(section)
    except (OSError, BadInput):  # RunFolder says what is wrong
        return False
    return isinstance(found, dict) and key not in found and _has_results(folder)


def config_of_run(folder: Storage, **limits: float | None) -> ConfigText:
    """The configuration with which a run was started last, with other limits of its budget where some are given.

    Raises BadInput where the folder holds no run.
    """
    try:
        found = ConfigText(text_of(folder, RUN_FILE, CONFIG_REMEDY), f"{folder.location}/{RUN_FILE}")
    except (FileNotFoundError, NotADirectoryError):
        raise no_run(folder) from None
    budget = {key: limit for key, limit in limits.items() if limit is not None}
    if not budget:
        return found
    config = found.mapping(Config.model_fields)
    config["budget"] = {**found.parsed().budget.limits, **budget}
    return replace(found, text=yaml.safe_dump(config, sort_keys=False))


class RunFolder:
    """``results/<run>/``. Nothing is written before ``create``.

    If a run is older than a key of the configuration, the key counts as having its default. If nothing was scored in a
    folder, another configuration may take the folder over.

    Args:
        identity: what identifies the run; a start with another identity is refused.
        default: gives the default of a key of the configuration, such as ``search.F``.

    Attributes:
        owner: the name of the run's identity as it was when the folder was made, under which its ledger is written.
        takes_over: the folder is that of another configuration, which has scored nothing.

    Raises BadInput where the folder holds a run of another configuration, naming the key that differs, or cannot be
    read.
    """

    def __init__(self, storage: Storage, identity: Mapping[str, Any], default: Default = lambda key: None) -> None:
        self.storage, self.identity, self._default = storage, identity, default
        self.location = storage.location
        try:
            frozen, names = _frozen(storage), storage.names()
        except NotADirectoryError:
            raise BadInput(
                f"{self.location}: there is a file of that name; choose another run name, or remove the file."
            ) from None
        except OSError as error:
            raise BadInput(
                f"{self.location}: the folder cannot be read ({error.strerror or error}); check the address and the "
                "permissions."
            ) from error
        self.takes_over = frozen is not None and self._changed(frozen) is not None and not _has_results(storage)
        self.owner = content_hash(identity if frozen is None or self.takes_over else frozen)
        if frozen is not None and not self.takes_over:
            self._compare(frozen)
        elif frozen is None and names:
            raise BadInput(
                f"{self.location}: the folder holds files, but they are not those of a run; choose another run name, "
                "or empty the folder."
            )

    def create(self, configuration: str) -> None:
        """Make the folder, with the frozen configuration in it.

        Raises BadInput where it cannot be written to.
        """
        try:
            if self.takes_over:
                self._clear()
            self.storage.write(RUN_FILE, configuration.encode())
            self._found()
        except OSError as error:
            raise BadInput(file_sentence(error, self.location)) from error

    def _found(self) -> None:
        """Write the identity, unless it is there. If several processes try at the same time, one succeeds."""
        try:
            self.storage.create(IDENTITY_FILE, json.dumps(self.identity, indent=1, sort_keys=True).encode())
        except FileExistsError:
            self._compare(_frozen(self.storage) or {})

    def _clear(self) -> None:
        """Remove what another configuration left that scored nothing: its identity and its proposals.

        Raises BadInput if a process is running it.
        """
        ledger = self.storage.folder("ledger")
        with contextlib.closing(Lease(ledger)):
            for name in part_names(ledger):
                ledger.remove(name)
            self.storage.remove(IDENTITY_FILE)

    def _changed(self, old: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
        """The first key in which the run in the folder differs, and both values."""
        found = (d for d in differences(old, self.identity) if not (d[1] is None and d[2] == self._default(d[0])))
        # The items follow from seed, tasks and data: name them only where nothing else differs.
        return min(found, key=lambda d: d[0].startswith("items."), default=None)

    def _compare(self, old: Mapping[str, Any]) -> None:
        if changed := self._changed(old):
            key, was, now = changed
            what = "other weights" if key.startswith(("experts.", "model.base")) else f"{was!r} → {now!r}"
            raise BadInput(
                f"{self.location}: the run was made with another configuration ({key}: {what}); give the changed "
                "configuration another run name, or set the key to its old value again."
            )


def _has_results(folder: Storage) -> bool:
    """Whether a run has scored anything; True also if its ledger cannot be read."""
    try:
        parts = read_parts(folder.folder("ledger")).values()
    except (BadInput, OSError):
        return True
    return any(event != "asked" for part in parts if part is not None for event in part["event"].to_pylist())


def _frozen(folder: Storage) -> Mapping[str, Any] | None:
    """The identity of the run in a folder; None if there is no run.

    Raises BadInput where it cannot be read.
    """
    try:
        return mapping_of(folder, IDENTITY_FILE, "restore the file from a copy, or choose another run name")
    except FileNotFoundError:
        return None
