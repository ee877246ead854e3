"""The folder of a run: the frozen configuration, the ledger, and what comes out. It belongs to one configuration."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evolver.config import differences
from evolver.errors import BadInput
from evolver.records import content_hash

IDENTITY = "identity.json"


class RunFolder:
    """``results/<run>/``. Nothing is written before ``create``.

    Raises BadInput where the folder holds a run of another configuration, naming the key that differs.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.owner = content_hash(identity)
        frozen = path / IDENTITY
        if path.exists() and not path.is_dir():
            raise BadInput(f"{path}: there is a file of that name; choose another run name or remove it.")
        if frozen.exists():
            self._compare(_read(frozen), identity)
        elif path.exists() and any(path.iterdir()):
            raise BadInput(f"{path}: the folder holds files that are no run; choose another run name or empty it.")

    def create(self, configuration: str) -> None:
        """Make the folder, with the frozen configuration in it.

        Raises BadInput where it cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "config.yaml", configuration)
            write_text(self.path / IDENTITY, json.dumps(self.identity, indent=1, sort_keys=True))
        except OSError as error:
            raise BadInput(
                f"{self.path}: cannot be written ({error.strerror or error}); choose a folder that can."
            ) from error

    def _compare(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        # The items follow from seed, tasks and data: name them only where nothing else differs.
        changed = min(differences(old, new), key=lambda d: d[0].startswith("items."), default=None)
        if changed:
            key, was, now = changed
            what = "other weights" if key.startswith(("experts.", "model.base")) else f"{was!r} → {now!r}"
            raise BadInput(
                f"{self.path}: the run was made with another configuration ({key}: {what}); "
                "give the changed configuration another run name, or restore the key."
            )


def _read(frozen: Path) -> Mapping[str, Any]:
    try:
        identity: dict[str, Any] = json.loads(frozen.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{frozen}: cannot be read ({error}); restore it, or choose another run name.") from error
    return identity


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``path`` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        old = temporary.with_name(temporary.name + ".old")
        if path.exists():
            os.replace(path, old)  # never a half-removed folder under the final name
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
