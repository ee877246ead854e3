"""The folder of a run: the frozen configuration, the ledger, and what comes out. It belongs to one configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import yaml

from evolver.config import Config, ConfigText, differences
from evolver.errors import BadInput
from evolver.records import content_hash
from evolver.storage import Storage

IDENTITY = "identity.json"
Default = Callable[[str], Any]


def file_of_run(folder: Storage, name: str) -> str:
    """A file that every run's folder holds.

    Raises BadInput where the folder holds no run.
    """
    try:
        return folder.read(name).decode()
    except FileNotFoundError:
        raise BadInput(f"{folder.location}: there is no run; give the folder of one, such as results/demo.") from None


def compute_of(folder: Storage) -> str | None:
    """The dtype of a run's forward passes; None where the folder holds no run yet."""
    model = (_frozen(folder) or {}).get("model")
    return model.get("compute") if isinstance(model, dict) else None


def config_of_run(folder: Storage, candidates: int | None = None, items: int | None = None) -> ConfigText:
    """The configuration that a run was called with last, with another budget where one is given.

    Raises BadInput where the folder holds no run.
    """
    found = ConfigText(file_of_run(folder, "config.yaml"), f"{folder.location}/config.yaml")
    budget = {k: v for k, v in {"candidates": candidates, "items": items}.items() if v is not None}
    if not budget:
        return found
    config = found.mapping(Config.model_fields)
    config["budget"] = {**config["budget"], **budget}
    return replace(found, text=yaml.safe_dump(config, sort_keys=False))


class RunFolder:
    """``results/<run>/``. Nothing is written before ``create``.

    A run that was made before there was some key is one in which the key has its default.

    Args:
        identity: what makes two calls the same run.
        default: of a key of the configuration, dotted.

    Attributes:
        owner: the name of the run's identity as it was when the folder was made, under which its ledger is written.

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
                f"{self.location}: there is a file of that name; choose another run name or remove it."
            ) from None
        except OSError as error:
            raise BadInput(
                f"{self.location}: cannot be read ({error.strerror or error}); check the address and the rights."
            ) from error
        self.owner = content_hash(identity if frozen is None else frozen)
        if frozen is not None:
            self._compare(frozen, identity)
        elif names:
            raise BadInput(
                f"{self.location}: the folder holds files that are no run; choose another run name or empty it."
            )

    def create(self, configuration: str) -> None:
        """Make the folder, with the frozen configuration in it.

        Raises BadInput where it cannot be written to.
        """
        try:
            self.storage.write("config.yaml", configuration.encode())
            self._found()
        except OSError as error:
            raise BadInput(
                f"{self.location}: cannot be written ({error.strerror or error}); choose a folder that can."
            ) from error

    def _found(self) -> None:
        """Make the folder this run's, unless it is; of several that try at once, one succeeds."""
        try:
            self.storage.create(IDENTITY, json.dumps(self.identity, indent=1, sort_keys=True).encode())
        except FileExistsError:
            self._compare(_frozen(self.storage) or {}, self.identity)

    def _compare(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        # The items follow from seed, tasks and data: name them only where nothing else differs.
        found = (d for d in differences(old, new) if not (d[1] is None and d[2] == self._default(d[0])))
        changed = min(found, key=lambda d: d[0].startswith("items."), default=None)
        if changed:
            key, was, now = changed
            what = "other weights" if key.startswith(("experts.", "model.base")) else f"{was!r} → {now!r}"
            raise BadInput(
                f"{self.location}: the run was made with another configuration ({key}: {what}); "
                "give the changed configuration another run name, or restore the key."
            )


def _frozen(folder: Storage) -> Mapping[str, Any] | None:
    """What makes the run in a folder what it is; None where there is none.

    Raises BadInput where it cannot be read.
    """
    try:
        identity = json.loads(folder.read(IDENTITY))
        if not isinstance(identity, dict):
            raise ValueError("it holds no mapping")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise BadInput(
            f"{folder.location}/{IDENTITY}: cannot be read ({error}); restore it, or choose another run name."
        ) from error
    return identity
