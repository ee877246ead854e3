"""The ledger: the ordered, durable record of everything that was proposed and scored. It is a run's only state.

A part is one Parquet file with a running number. It is either complete or not there, and a driver creates a part only
if it knows all parts before it. So if two drivers write one ledger, one of them finds its number taken, and stops
before it tells its search anything. There are three kinds of rows: ``asked``, ``finished``, and ``guessed`` for the
result of a candidate that no search had asked for yet. Sometimes, small parts are joined into a larger one, a *wide*
part. A damaged part is kept under ``damaged/``, and a file of another run is ignored; a warning names either.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evolver.errors import BadInput, cause_of, is_misplaced
from evolver.records import Candidate, Result, Split, dump_recipe, load_recipe
from evolver.storage import Storage, lease, read_all
from evolver.storage.lease import Lease

# Stage, number, recipe id, bar, limit, and how many items were known: the result depends on nothing else.
RowName = tuple[str, str, int, str, int]
LedgerQuestion = tuple[str, int, str, float | None, int | None, int]
PART = re.compile(r"part-(\d{8})(?:-(\d{8}))?\.parquet")
JOIN_FROM = 256
ITEMS_FILE = "items.parquet"
OWNER, VERSION = b"evolver.run", b"evolver.ledger"
# The version of the columns. Increase it when you add a column: earlier versions then refuse such a ledger.
SCHEMA_VERSION = 1
STAGES, EVENTS, STATUSES = ("baseline", "search", "report"), ("asked", "finished", "guessed"), ("ok", "failed")
DAMAGED = "damaged"

SCHEMA = pa.schema(
    [
        ("event", pa.string()),  # asked | finished | guessed
        ("time", pa.timestamp("us", tz="UTC")),
        ("stage", pa.string()),
        ("number", pa.int64()),
        ("recipe_id", pa.string()),
        ("recipe", pa.string()),
        ("label", pa.string()),
        ("proposer", pa.string()),
        ("parents", pa.list_(pa.string())),
        ("bar", pa.float64()),
        ("limit", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("score", pa.float64()),
        ("bound", pa.float64()),
        ("complete", pa.bool_()),
        ("reused", pa.bool_()),
        ("raced", pa.bool_()),
        ("given", pa.int64()),
        ("items", pa.list_(pa.float64())),
        ("tasks", pa.map_(pa.string(), pa.float64())),
        ("seconds", pa.map_(pa.string(), pa.float64())),
        ("counts", pa.map_(pa.string(), pa.float64())),
        ("worker", pa.string()),
        ("said", pa.list_(pa.string())),
    ]
)

# A table without these columns is not a ledger. If any other column is missing, an earlier version wrote the table, and
# the column has its default. To add a column, add it to SCHEMA only.
OLDEST = ("event", "time", "stage", "number", "recipe_id", "recipe")
DEFAULTS = {f.name: f.default for kind in (Candidate, Result) for f in fields(kind) if f.default is not MISSING}

# The fields of a result that a row holds unchanged, and those that are mappings.
PLAIN_FIELDS = ("status", "reason", "score", "bound", "complete", "reused", "raced", "given", "worker")
MAPS = ("tasks", "seconds", "counts")


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


class Ledger:
    """The ledger of one run, open for writing by one process.

    Args:
        storage: where the parts lie.
        owner: the identity of the run's configuration; parts of other owners are ignored.
        say: is called with a line if another driver's lease has to be waited for.

    Raises BadInput, naming the process, if another process has it open.
    """

    def __init__(self, storage: Storage, owner: str, say: Callable[[str], None] = lambda line: None) -> None:
        self.storage, self.owner = storage, owner
        self.warnings: list[str] = []
        self._finished: dict[tuple[str, int], Result] = {}
        self._by_recipe: dict[tuple[str, Split], list[Result]] = {}
        self._guessed: dict[LedgerQuestion, Result] = {}
        self._ranks: dict[str, int] = {}
        self._lease = Lease(storage, say)
        self._parts: list[tuple[int, int, str]] = []
        self._loose: dict[str, pa.Table] = {}  # those that are to be joined, by name
        self._next = 0  # above every number in the folder, so that no file is ever overwritten
        try:
            for row in self._read():
                if row["event"] == "finished":
                    self._index(result_of(row))
                elif row["event"] == "guessed":
                    self._guessed[_asked_in(row)] = result_of(row)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another process in."""
        self._lease.close()

    def answer(self, candidate: Candidate) -> Result | None:
        """The result of a candidate, if it is known without an evaluation.

        That is, in this order: what this very candidate scored before; an earlier result of the same recipe on the
        same items; and what this very candidate scored when it was only guessed, with the same items known.
        """
        own = self._finished.get((candidate.stage, candidate.number))
        if own is not None and own.recipe_id == candidate.recipe.id:
            return own
        for result in self._by_recipe.get((candidate.recipe.id, candidate.split), []):
            if result.answers(candidate):
                return replace(result, number=candidate.number, stage=candidate.stage, reused=True)
        return self._guessed.get(_question(candidate, len(self.with_known_items(candidate).known)))

    def with_known_items(self, candidate: Candidate) -> Candidate:
        """The candidate with the longest first part of its items that is known of its recipe."""
        found = self._by_recipe.get((candidate.recipe.id, candidate.split), [])
        return replace(candidate, known=max((r.items for r in found), key=len, default=()))

    def write_asked(self, candidate: Candidate) -> None:
        """Record that a candidate was sent to a worker.

        Raises BadInput where the ledger holds another recipe under its number: another search wrote it.
        """
        self._recorded(candidate)
        self._append([_row(candidate, None)])

    def write_result(self, candidate: Candidate, result: Result) -> Result:
        """Record a candidate's result, unless it is recorded; it is on disk when this returns, with its rank.

        Raises BadInput where the ledger holds another recipe under its number: another search wrote it.
        """
        if (recorded := self._recorded(candidate)) is not None:
            return recorded
        self._append([_row(candidate, result)])
        return self._index(result)

    def write_guess(self, candidate: Candidate, result: Result) -> None:
        """Record the result of a candidate that no search has asked for yet."""
        self._append([_row(candidate, result) | {"event": "guessed"}])
        self._guessed[_question(candidate, result.given)] = result

    def _recorded(self, candidate: Candidate) -> Result | None:
        result = self._finished.get((candidate.stage, candidate.number))
        if result is not None and result.recipe_id != candidate.recipe.id:
            raise BadInput(
                f"{self.storage.location}: candidate {candidate.number} of stage {candidate.stage} has the recipe "
                f"{result.recipe_id} in the ledger, but {candidate.recipe.id} now; another version of Evolver made "
                "this run, so start a run of another name."
            )
        return result

    def results(self, stage: str) -> list[Result]:
        """The results of a stage by number."""
        return [r for (s, _), r in sorted(self._finished.items()) if s == stage]

    def _index(self, result: Result) -> Result:
        rank = self._ranks.get(result.stage, 0)
        self._ranks[result.stage] = rank + 1
        result = replace(result, rank=rank)
        self._finished[result.stage, result.number] = result
        split: Split = "report" if result.stage == "report" else "dev"
        self._by_recipe.setdefault((result.recipe_id, split), []).append(result)
        return result

    def _append(self, rows: list[dict[str, Any]]) -> None:
        number, name = self._new_name()
        table = pa.Table.from_pylist(rows, schema=self._schema())
        self._create(name, _bytes(table, small=True))
        self._parts.append((number, number, name))
        self._loose[name] = table
        if len(self._loose) >= JOIN_FROM:
            self._join([p for p in self._parts if p[2] in self._loose])

    def _new_name(self) -> tuple[int, str]:
        number, self._next = self._next, self._next + 1
        return number, f"part-{number:08d}.parquet"

    def _schema(self) -> pa.Schema:
        return SCHEMA.with_metadata(self._metadata())

    def _metadata(self) -> dict[bytes, bytes]:
        return {OWNER: self.owner.encode(), VERSION: str(SCHEMA_VERSION).encode()}

    def _create(self, name: str, data: bytes) -> None:
        self._lease.check()
        try:
            self.storage.create(name, data)
        except FileExistsError:
            raise self._lease.lost() from None
        except OSError as error:
            raise BadInput(
                f"{self.storage.location}: the ledger cannot be written ({error.strerror or error}); nothing finished "
                "so far is lost: free disk space or correct the permissions, and run the same command again."
            ) from error

    def _join(self, parts: list[tuple[int, int, str]]) -> None:
        """Write many parts into one file. Readers prefer it, so a crash before the old ones are removed is harmless."""
        first, last = parts[0][0], parts[-1][1]
        wide = f"part-{first:08d}-{last:08d}.parquet"
        tables = [self._loose.pop(name) for _, _, name in parts]
        self._create(wide, _bytes(pa.concat_tables(tables).replace_schema_metadata(self._metadata())))
        for _, _, name in parts:
            self.storage.remove(name)
        self._parts = [*(p for p in self._parts if p not in parts), (first, last, wide)]

    def _read(self) -> Iterator[dict[str, Any]]:
        found = sorted(self._find(), key=lambda p: (p[0], -p[1]))
        self._next = max((end + 1 for _, end, _ in found), default=0)
        wide_end, held = -1, set[RowName]()  # the last number and the rows of the wide part that was read last
        for (start, end, name), data in zip(found, read_all(self.storage, [n for _, _, n in found]), strict=True):
            table = self._own_table(name, data)
            if table is None:
                continue
            rows = table.to_pylist(maps_as_pydicts="strict")
            if end <= wide_end:
                lost = [_name_of(row) not in held for row in rows]
                if not any(lost):
                    self.storage.remove(name)  # joined already; the crash came before it was removed
                    continue
                table = table.filter(pa.array(lost))
                rows = table.to_pylist(maps_as_pydicts="strict")
                start = end = self._next
                name = self._move_up(name, table)
            elif end > start:
                wide_end, held = end, {_name_of(row) for row in rows}
            self._parts.append((start, end, name))
            if start == end:
                self._loose[name] = table
            yield from rows

    def _own_table(self, name: str, data: bytes | OSError) -> pa.Table | None:
        """The whole rows of a part, if it is this run's and has any."""
        try:
            table = part_table(data, self._at(name), with_recipes=True)
        except DamagedPart as error:
            return self._set_aside(name, error)
        return table if self._is_ours(table, name) else None

    def _is_ours(self, table: pa.Table, name: str) -> bool:
        ours = (table.schema.metadata or {}).get(OWNER) == self.owner.encode()
        if not ours:
            self.warnings.append(f"{self._at(name)} belongs to another run and is ignored")
        return ours

    def _move_up(self, name: str, lost: pa.Table) -> str:
        """Write rows that are missing in the wide part of their range into a new part, and return its name."""
        _, own = self._new_name()
        self._create(own, _bytes(lost, small=True))
        self.storage.move(name, DAMAGED)
        self.warnings.append(
            f"{self._at(name)} holds results that are missing in the file of joined parts; they are in {own} now, and "
            f"the file was kept as {DAMAGED}/{name}"
        )
        return own

    def _find(self) -> Iterator[tuple[int, int, str]]:
        for name in self.storage.names():
            if PART.fullmatch(name):
                yield *_span(name), name
            elif name not in {"lock", lease.LEASE_FILE, DAMAGED}:
                self.warnings.append(f"{self._at(name)} does not belong to the ledger and is ignored")

    def _set_aside(self, name: str, error: DamagedPart) -> pa.Table | None:
        """Keep a damaged part under ``damaged/``. Its undamaged rows replace it, and are returned."""
        whole = error.whole
        if whole is not None and not self._is_ours(whole, name):
            return None
        if whole is None or not len(whole):
            self.storage.move(name, DAMAGED)
            whole = None
        else:
            self.storage.folder(DAMAGED).write(name, self.storage.read(name))
            self.storage.write(name, _bytes(whole))
        self.warnings.append(
            f"{self._at(name)} is damaged ({error.reason}); it was kept as {DAMAGED}/{name}, and the candidates that "
            "are lost with it are scored again"
        )
        return whole

    def _at(self, name: str) -> str:
        return f"{self.storage.location}/{name}"


def part_table(data: bytes | OSError, file: str, with_recipes: bool = False) -> pa.Table:
    """The rows of a part, given its bytes or why they could not be read, with all columns of this version: those that
    an earlier one did not have hold their defaults. Every row is a proposal or a result; ``with_recipes`` says that
    their recipes are looked at, too.

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
    if with_recipes and pc.all(whole).as_py():
        whole = pa.array([_is_recipe(text) for text in table["recipe"].to_pylist()], pa.bool_())
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


def _whole_rows(table: pa.Table) -> pa.ChunkedArray:
    """For each row, whether it holds all that a proposal or a result needs. Recipes are not read here."""

    def among(column: str, values: Sequence[str]) -> pa.ChunkedArray:
        return pc.is_in(table[column], pa.array(values))

    def both(*conditions: pa.ChunkedArray) -> pa.ChunkedArray:
        return functools.reduce(pc.and_, (pc.fill_null(c, False) for c in conditions))

    proposal = both(
        among("event", EVENTS), among("stage", STAGES), pc.greater_equal(table["number"], 0),
        *(pc.is_valid(table[name]) for name in ("time", "recipe_id", "label", "proposer", "parents")),
        pc.starts_with(table["recipe"], "[["), pc.ends_with(table["recipe"], "]]"),
    )  # fmt: skip
    scored = pc.or_(pc.invert(both(table["complete"])), both(pc.is_finite(table["score"])))
    result = both(
        among("status", STATUSES), scored, pc.greater_equal(table["given"], 0),
        *(pc.is_valid(table[name]) for name in ("items", "reason", "worker", "reused", "raced", *MAPS)),
        pc.or_(pc.equal(table["status"], "failed"), pc.greater(pc.list_value_length(table["items"]), 0)),
    )  # fmt: skip
    return pc.and_(proposal, pc.or_(both(pc.equal(table["event"], "asked")), result))


def read_table(storage: Storage) -> pa.Table:
    """All rows of a ledger, for reports. The run may be writing to it meanwhile."""
    tables = read_parts(storage)
    return pa.concat_tables([t for t in tables.values() if t is not None]) if tables else SCHEMA.empty_table()


def _is_recipe(text: str) -> bool:
    try:
        load_recipe(text)
    except ValueError:
        return False
    return True


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
            if (last := _span(name)[1]) > end:
                names.append(name)
                end = last
        new = [n for n in names if n not in known]
        with contextlib.suppress(FileNotFoundError):  # parts were joined meanwhile: look again
            data = zip(new, read_all(storage, new), strict=True)
            tables = {n: part_table(d, f"{storage.location}/{n}") for n, d in data}
            return {n: tables.get(n) for n in names}


def read_part(storage: Storage, name: str) -> pa.Table:
    """One part of a ledger.

    Raises FileNotFoundError where it is not there any more, as small ones are joined.
    """
    return part_table(read_all(storage, [name])[0], f"{storage.location}/{name}")


def write_items(run: Storage, items: Mapping[Split, Sequence[tuple[str, int, str]]]) -> None:
    """Write ``items.parquet`` into a run's folder: of every place of both splits the task, its index in the task's
    data, and the hash of its content. The ledger's answers stand in this order.
    """
    rows = [
        {"split": split, "place": place, "task": task, "index": index, "hash": content}
        for split, members in items.items()
        for place, (task, index, content) in enumerate(members)
    ]
    run.write(ITEMS_FILE, _bytes(pa.Table.from_pylist(rows)))


def answer_table(run: Storage) -> pa.Table:
    """Every answer of a run: one row for each candidate and item, with the item's hash."""
    items: dict[str, list[dict[str, Any]]] = {"dev": [], "report": []}
    for row in _items_of(run):
        items[row["split"]].append(row)
    finished = [r for r in read_table(run.folder("ledger")).to_pylist() if r["event"] == "finished" and not r["reused"]]
    rows = [
        {**{k: r[k] for k in ("stage", "number", "recipe_id")}, "task": i["task"], "hash": i["hash"], "answer": a}
        for r in finished
        for i, a in zip(items["report" if r["stage"] == "report" else "dev"], r["items"] or (), strict=False)
    ]
    return pa.Table.from_pylist(rows)


def _items_of(run: Storage) -> list[dict[str, Any]]:
    """The rows of ``items.parquet``.

    Raises BadInput where it cannot be read.
    """
    try:
        rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(run.read(ITEMS_FILE))).to_pylist()
        if not all({"split", "task", "hash"} <= row.keys() and row["split"] in ("dev", "report") for row in rows):
            raise ValueError("it has other columns or splits")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadInput(
            f"{run.location}/{ITEMS_FILE}: it cannot be read ({cause_of(error)}); run the configuration again, which "
            "writes this file again."
        ) from error
    return rows


def _bytes(table: pa.Table, small: bool = False) -> bytes:
    """The bytes of a Parquet file; a small one has no dictionaries and statistics, which only help to find rows."""
    file, more = io.BytesIO(), {"use_dictionary": False, "write_statistics": False} if small else {}
    pq.write_table(table, file, compression="zstd", write_page_checksum=True, **more)
    return file.getvalue()


def _span(name: str) -> tuple[int, int]:
    """The first and the last running number of a part."""
    match = PART.fullmatch(name)
    assert match is not None
    return int(match[1]), int(match[2] or match[1])


def _row(candidate: Candidate, result: Result | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "event": "finished" if result else "asked",
        "time": _now(),
        "stage": candidate.stage,
        "number": candidate.number,
        "recipe_id": candidate.recipe.id,
        "recipe": dump_recipe(candidate.recipe),
        "label": candidate.label,
        "proposer": candidate.proposer,
        "parents": list(candidate.parents),
        "bar": candidate.bar,
        "limit": candidate.limit,
    }
    if result:
        row |= {name: getattr(result, name) for name in PLAIN_FIELDS} | {"items": list(result.items)}
        row["said"] = list(result.said)
        row |= {name: list(getattr(result, name).items()) for name in MAPS}
    return row


def _name_of(row: Mapping[str, Any]) -> RowName:
    """The values that identify a row of a ledger."""
    return row["event"], row["stage"], row["number"], row["recipe_id"], len(row["items"] or ())


def _question(candidate: Candidate, known: int) -> LedgerQuestion:
    return candidate.stage, candidate.number, candidate.recipe.id, candidate.bar, candidate.limit, known


def _asked_in(row: Mapping[str, Any]) -> LedgerQuestion:
    return row["stage"], row["number"], row["recipe_id"], row["bar"], row["limit"], row["given"]


def candidate_of(row: Mapping[str, Any]) -> Candidate:
    """The candidate of a row; what a worker was told beside it (rival, known items) is not kept."""
    return Candidate(
        row["number"], load_recipe(row["recipe"]), row["proposer"], tuple(row["parents"]), row["bar"], row["stage"],
        row["label"], row["limit"],
    )  # fmt: skip


def result_of(row: Mapping[str, Any]) -> Result:
    """The result of a row that has one."""
    same = ("number", "recipe_id", "stage", *PLAIN_FIELDS, *MAPS)
    return Result(**{name: row[name] for name in same}, items=tuple(row["items"]), said=tuple(row["said"] or ()))


def _now() -> int:
    return time.time_ns() // 1000
