"""A part of the ledger: one Parquet file, which is checked row by row when it is read."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evolver.errors import BadInput, cause_of, is_misplaced
from evolver.ledger.retried import standing
from evolver.ledger.rows import DEFAULTS, EVENTS, MAPS, OLDEST, PROPOSALS, SCHEMA, STATUSES
from evolver.records import STAGES
from evolver.records.graph import is_node, texts_of
from evolver.records.recipe import load_recipe
from evolver.storage import Storage, read_all

PART = re.compile(r"part-(\d{8})(?:-(\d{8}))?\.parquet")
OWNER, VERSION = b"evolver.run", b"evolver.ledger"
# The version of the columns. Increase it when you add a column: earlier versions then refuse such a ledger.
SCHEMA_VERSION = 6
# The first version in which rows hold nodes of recipes; before, every row held its recipe whole.
NODES_SINCE = 6
DAMAGED = "damaged"


class DamagedPart(BadInput):
    """A part of a ledger is damaged.

    Attributes:
        reason: what is wrong with it, in a few words.
        whole: those of its rows that are whole; None where it cannot be read at all.
    """

    reason: str = ""
    whole: pa.Table | None = None


def damaged(file: str, reason: str, whole: pa.Table | None = None) -> DamagedPart:
    """The error for a damaged part, which says what to do."""
    error = DamagedPart(
        f"{file}: it is damaged ({reason}); run the configuration again, which keeps this file under {DAMAGED}/ and "
        "scores again what is lost with it."
    )
    error.reason, error.whole = reason, whole
    return error


def part_table(data: bytes | OSError, file: str) -> pa.Table:
    """The rows of a part, given its bytes or why they could not be read, with all columns of this version: those that
    an earlier one did not have hold their defaults. Every row is a proposal or a result, and its nodes are those that
    their ids say.

    Raises DamagedPart where it holds something else, BadInput where it cannot be read now, or a newer version wrote
    it, and FileNotFoundError where it is gone.
    """
    if isinstance(data, OSError):
        if isinstance(data, FileNotFoundError):
            raise data
        if is_misplaced(data):
            raise damaged(file, cause_of(data))
        raise BadInput(
            f"{file}: it cannot be read now ({cause_of(data)}); nothing is lost: correct the permissions or repair "
            "the disk, and run the command again."
        ) from data
    try:
        # For small files, starting threads or the reader for whole data sets takes longer than reading.
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(file, " ".join(str(error).split())[:200]) from error
    table = with_all_columns(table, file)
    whole = _whole_rows(table)
    if pc.all(whole).as_py():
        rows = zip(table["recipe_id"].to_pylist(), table["nodes"].to_pylist(), strict=True)
        whole = pa.array([_are_nodes(recipe, nodes) for recipe, nodes in rows], pa.bool_())
    if not pc.all(whole).as_py():
        lost = len(table) - pc.sum(whole).as_py()
        raise damaged(file, f"{lost} of its {len(table)} rows are neither proposals nor results", table.filter(whole))
    return table


def with_all_columns(table: pa.Table, file: str) -> pa.Table:
    """A table of this or an earlier version with the columns of this one: those that it lacks hold their defaults.

    Raises BadInput where a newer version wrote it, and DamagedPart where nobody did.
    """
    version = (table.schema.metadata or {}).get(VERSION, b"0")
    if not version.isdigit() or int(version) > SCHEMA_VERSION:
        raise BadInput(f"{file}: a newer version of Evolver wrote it; continue the run with that version.")
    table = _with_nodes(table) if int(version) < NODES_SINCE else table
    new = [name for name in table.column_names if name not in SCHEMA.names]
    if new:
        raise damaged(file, f"it has columns that no ledger has: {', '.join(new)[:100]}")
    if table.column_names != [name for name in SCHEMA.names if name in table.column_names]:
        raise damaged(file, "its columns are in an order in which no version writes them")
    for field in SCHEMA:
        if field.name in table.column_names:
            if table.schema.field(field.name).type != field.type:
                raise damaged(file, f"its column {field.name} is not of type {field.type}")
        elif field.name in OLDEST:
            raise damaged(file, f"it has no column {field.name}")
        else:
            default = [] if pa.types.is_nested(field.type) else DEFAULTS.get(field.name)
            table = table.append_column(field, pa.array([default] * len(table), field.type))
    return table.select(SCHEMA.names)


def _with_nodes(table: pa.Table) -> pa.Table:
    """A table of a version that wrote every recipe whole into its row; here each node stands in the first row only."""
    if "recipe" not in table.column_names:
        return table
    ids = table["recipe_id"].to_pylist() if "recipe_id" in table.column_names else [None] * len(table)
    held: set[str] = set()
    found: list[list[tuple[str, str]] | None] = []
    for recipe_id, text in zip(ids, table["recipe"].to_pylist(), strict=True):
        try:
            nodes = texts_of(load_recipe(text), held)
        except ValueError:
            found.append(None)
            continue
        is_whole = recipe_id in held or (bool(nodes) and [*nodes][-1] == recipe_id)
        held |= nodes.keys() if is_whole else set()
        found.append(list(nodes.items()) if is_whole else None)
    return table.set_column(table.column_names.index("recipe"), "nodes", pa.array(found, SCHEMA.field("nodes").type))


def _whole_rows(table: pa.Table) -> pa.ChunkedArray:
    """For each row, whether it holds all that a proposal or a result needs. Nodes are not looked into here."""

    def among(column: str, values: Sequence[str]) -> pa.ChunkedArray:
        return pc.is_in(table[column], pa.array(values))

    def both(*conditions: pa.ChunkedArray) -> pa.ChunkedArray:
        return functools.reduce(pc.and_, (pc.fill_null(c, False) for c in conditions))

    proposal = both(
        among("event", EVENTS), among("stage", STAGES), pc.greater_equal(table["number"], 0),
        *(pc.is_valid(table[name]) for name in ("time", "recipe_id", "nodes", "label", "proposer", "parents")),
    )  # fmt: skip
    counted = pc.fill_null(pc.list_value_length(table["item_counts"]), 0)
    scored = pc.or_(pc.invert(both(table["complete"])), both(pc.is_finite(table["score"])))
    result = both(
        among("status", STATUSES), scored, pc.greater_equal(table["given"], 0),
        *(pc.is_valid(table[name]) for name in ("items", "reason", "worker", "reused", "raced", "transient", *MAPS)),
        pc.or_(pc.equal(table["status"], "failed"), pc.greater(pc.list_value_length(table["items"]), 0)),
        pc.or_(pc.equal(counted, 0), pc.equal(counted, pc.list_value_length(table["items"]))),
    )  # fmt: skip
    return pc.and_(proposal, pc.or_(both(among("event", PROPOSALS)), result))


def read_table(storage: Storage) -> pa.Table:
    """All rows of a ledger as they count now, for reports; a run may be writing meanwhile."""
    tables = standing(read_all_parts(storage))
    return pa.concat_tables(list(tables.values())) if tables else SCHEMA.empty_table()


def _are_nodes(recipe_id: str, nodes: Sequence[tuple[str, str | None]]) -> bool:
    """Whether the nodes of a row are what their ids say. A row that holds any holds that of its own recipe last."""
    return all(is_node(key, text or "") for key, text in nodes) and (not nodes or nodes[-1][0] == recipe_id)


def part_names(storage: Storage) -> list[str]:
    """The names of a ledger's parts, in their order; of a wide part and those that were joined in it, all.

    Raises BadInput if the folder of the ledger cannot be listed.
    """
    try:
        parts = sorted((int(m[1]), -int(m[2] or m[1]), n) for n in storage.names() if (m := PART.fullmatch(n)))
    except OSError as error:
        remedy = (
            "restore it from a copy, or move it away"
            if is_misplaced(error)
            else ("correct the permissions and run the command again")
        )
        raise BadInput(f"{storage.location}: the ledger cannot be read ({cause_of(error)}); {remedy}.") from error
    return [name for _, _, name in parts]


def read_parts(storage: Storage, known: Collection[str] = ()) -> dict[str, pa.Table | None]:
    """The parts of a ledger in their order, by name; None for those that are known and were not read again."""
    while True:
        names, end = [], -1
        for name in part_names(storage):
            if (last := span_of(name)[1]) > end:
                names.append(name)
                end = last
        new = [n for n in names if n not in known]
        with contextlib.suppress(FileNotFoundError):  # parts were joined meanwhile: look again
            data = zip(new, read_all(storage, new), strict=True)
            tables = {n: part_table(d, f"{storage.location}/{n}") for n, d in data}
            return {n: tables.get(n) for n in names}


def read_all_parts(storage: Storage) -> dict[str, pa.Table]:
    """All parts of a ledger in their order, by name."""
    return {name: table for name, table in read_parts(storage).items() if table is not None}


def read_part(storage: Storage, name: str) -> pa.Table:
    """One part of a ledger.

    Raises FileNotFoundError where it is not there any more, as small ones are joined.
    """
    return part_table(read_all(storage, [name])[0], f"{storage.location}/{name}")


def part_bytes(table: pa.Table, small: bool = False) -> bytes:
    """The bytes of a Parquet file; a small one has no dictionaries and statistics, which only help to find rows."""
    file, more = io.BytesIO(), {"use_dictionary": False, "write_statistics": False} if small else {}
    pq.write_table(table, file, compression="zstd", write_page_checksum=True, **more)
    return file.getvalue()


def span_of(name: str) -> tuple[int, int]:
    """The first and the last running number of a part."""
    match = PART.fullmatch(name)
    assert match is not None
    return int(match[1]), int(match[2] or match[1])
