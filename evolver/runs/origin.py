"""Where a run comes from that goes on from another one, and how often the report items of such a family were used."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from evolver.errors import BadInput
from evolver.ledger import read_table
from evolver.records.canonical import content_hash
from evolver.runs.files import IDENTITY_FILE, mapping_of
from evolver.storage import Storage, storage_at
from evolver.storage.paths import last_part

ORIGIN_FILE, USES = "origin.json", "uses"
REMEDY = "restore the file from a copy, or call the command again that made this run, under another run name"


@dataclass(frozen=True)
class Origin:
    """The run that another one goes on from.

    Attributes:
        kind: the command that made the new run: retarget or fork.
        run: location of the earlier run.
        root: location of the first run of the family, in whose folder the uses of report items are recorded.
        candidates: how many candidates were taken over.
    """

    kind: str
    run: str
    root: str
    candidates: int

    @property
    def name(self) -> str:
        """The name of the earlier run."""
        return last_part(self.run)


def write_origin(folder: Storage, origin: Origin) -> None:
    """Write it into a run's folder."""
    folder.write(ORIGIN_FILE, json.dumps(asdict(origin)).encode())


def read_origin(folder: Storage) -> Origin | None:
    """The inverse of ``write_origin``; None for a run that goes on from no other one.

    Raises BadInput where it cannot be read.
    """
    try:
        found = mapping_of(folder, ORIGIN_FILE, REMEDY)
        return Origin(str(found["kind"]), str(found["run"]), str(found["root"]), int(found["candidates"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (KeyError, ValueError, TypeError) as error:
        raise BadInput(
            f"{folder.location}/{ORIGIN_FILE}: a value in it is missing or not readable ({error!r}); {REMEDY}."
        ) from error


def taken_over(folder: Storage) -> dict[str, Any] | None:
    """What the identity of a run says of the run that it goes on from: its name as an owner, and how many candidates
    were taken over. None where it goes on from no other one, or where there is no run.
    """
    with contextlib.suppress(OSError, BadInput):  # RunFolder says what is wrong
        found = mapping_of(folder, IDENTITY_FILE, "").get("origin")
        return found if isinstance(found, dict) else None
    return None


@dataclass(frozen=True)
class Use:
    """One use of report items: a run has drawn its conclusions from them.

    Attributes:
        run: name of the run.
        owner: the name of its identity.
        draw: which of the sets of report items that the family has drawn, from 0.
    """

    run: str
    owner: str
    draw: int


def uses_of(folder: Storage) -> list[Use]:
    """The uses that are recorded in a run's folder, the earliest first.

    Raises BadInput where one of them cannot be read.
    """
    place = folder.folder(USES)
    try:
        names = [name for name in place.names() if name.endswith(".json")]
    except NotADirectoryError:
        names = []
    found = []
    for name in names:
        form = mapping_of(place, name, REMEDY)
        if not (isinstance(form.get("run"), str) and isinstance(form.get("draw"), int)):
            raise BadInput(f"{place.location}/{name}: it does not say which run has used which items; {REMEDY}.")
        found.append(Use(form["run"], str(form.get("owner")), form["draw"]))
    return found


def record_use(folder: Storage, use: Use) -> None:
    """Record a use in a run's folder, unless the same run is recorded there: a run that is continued counts once."""
    number = 1
    while not any((u.owner, u.draw) == (use.owner, use.draw) for u in uses_of(folder)):
        with contextlib.suppress(FileExistsError):  # another run was faster: look again
            folder.folder(USES).create(f"{number:04d}.json", json.dumps(asdict(use)).encode())
        number += 1


def report_items_used(folder: Storage, use: Use, origin: Origin | None) -> None:
    """Record that a run is about to be scored on its report items.

    The record is kept in the folder of the first run of the family, and copied into the run's own. A run without a
    family needs none. Where the first run is not there any more, the copy alone counts.
    """
    if origin is None:
        if uses_of(folder):
            record_use(folder, use)
        return
    with contextlib.suppress(OSError):
        root = storage_at(origin.root)
        if root.names():
            record_own_report(root)
            record_use(root, use)
            copy_uses(root, folder)
            return
    record_use(folder, use)


def record_own_report(root: Storage) -> None:
    """Record the first run's own use, where it was scored on its report items before anybody recorded uses."""
    identity = mapping_of(root, IDENTITY_FILE, REMEDY)
    use = Use(last_part(root.location), content_hash(identity), draw_of(identity))
    if any(u.owner == use.owner for u in uses_of(root)):
        return
    events = read_table(root.folder("ledger")).select(["event", "stage"]).to_pylist()
    if {"event": "finished", "stage": "report"} in events:
        record_use(root, use)


def copy_uses(root: Storage, folder: Storage) -> None:
    """Copy the records of the first run into the folder of another one of its family."""
    for use in uses_of(root):
        record_use(folder, use)


def draw_of(identity: Any) -> int:
    """Which set of report items a run with this identity has drawn."""
    found = identity.get("evaluation", {}).get("report_draw", 0)
    return found if isinstance(found, int) else 0
