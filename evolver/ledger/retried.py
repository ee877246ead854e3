"""Failures that were taken back, so that their candidates are tried again, and what becomes of the rows after them."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

RETRIED, ORPHANED = "retried", "orphaned"


def has_retries(table: pa.Table) -> bool:
    """Whether failures were taken back in these rows."""
    return bool(pc.any(pc.equal(table["event"], RETRIED)).as_py())


def standing(parts: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """The parts of a ledger, in their order, as they count after failures were taken back.

    A row ``retried`` repeats the row of the first failure. The search goes on from there and may ask for other
    candidates than before, so no later row counts as it stands: a result becomes ``orphaned``, which answers the same
    question if the search asks it again; a failure, and a proposal that has no result then, becomes ``retried``.
    """
    if not any(has_retries(table) for table in parts.values()):
        return dict(parts)
    table = pa.concat_tables(list(parts.values()))
    names = ("event", "stage", "number", "recipe_id", "status")
    columns = {name: table[name].to_pylist() for name in names}
    keys = list(zip(columns["stage"], columns["number"], columns["recipe_id"], strict=True))
    events = columns["event"]
    for marker in [place for place, event in enumerate(events) if event == RETRIED]:
        _take_back(events, columns["status"], keys, marker)
    column = table.schema.get_field_index("event")
    table = table.set_column(column, table.schema.field(column), pa.array(events, pa.string()))
    out, start = {}, 0
    for name, part in parts.items():
        out[name] = table.slice(start, len(part))
        start += len(part)
    return out


def _take_back(events: list[str], statuses: list[str], keys: list[tuple[str, int, str]], marker: int) -> None:
    """Change the events of the rows that come before a row ``retried`` and from its failure on."""
    first = next((p for p in range(marker) if keys[p] == keys[marker] and events[p] == "finished"), marker)
    for place in range(marker):
        failed = statuses[place] == "failed"
        if events[place] == "guessed" and failed:
            events[place] = RETRIED
        elif events[place] == "finished" and place >= first:
            events[place] = RETRIED if failed else ORPHANED
        elif events[place] == "asked" and (place >= first or keys[place] == keys[marker]):
            events[place] = RETRIED
