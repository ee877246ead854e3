"""The ledger: the ordered, durable record of everything that was proposed and scored. It is a run's only state.

A part is one Parquet file with a running number. It is either complete or not there, and a driver creates a part only
if it knows all parts before it. So if two drivers write one ledger, one of them finds its number taken, and stops
before it tells its search anything. There are these kinds of rows: ``asked``, ``finished``, ``guessed`` for the result
of a candidate that no search had asked for yet, ``retried``, which takes failures back, and, in a run that goes on from
another one, ``listed`` for the candidates and ``inherited`` for the results that it takes over. Sometimes, small parts
are joined into a larger one, a *wide* part. A damaged part is kept under ``damaged/``, and a file of another run is
ignored; a warning names either.

A row names its recipe by its id, and holds those of the recipe's nodes that no earlier row holds. So a node is on the
disk with, or before, the first row that needs it. A node that was lost with a damaged part is written again, in a row
``described``, when the search comes to a candidate whose recipe needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from evolver.errors import BadInput
from evolver.ledger.parts import (
    DAMAGED,
    OWNER,
    PART,
    SCHEMA_VERSION,
    VERSION,
    DamagedPart,
    part_bytes,
    part_table,
    read_table,
    span_of,
)  # fmt: skip
from evolver.ledger.retried import ORPHANED, RETRIED, standing
from evolver.ledger.rows import SCHEMA, LostRecipe, candidate_of, inherited_rows, nodes_of, now, result_of, row_of
from evolver.records import Candidate, Result, Split, split_of
from evolver.records.order import reordered
from evolver.storage import Storage, lease, read_all
from evolver.storage.lease import Lease

RowName = tuple[str, str, int, str, datetime]
# Stage, recipe id, bar, limit, how many items were known, and their order: the result depends on nothing else.
LedgerQuestion = tuple[str, str, float | None, int | None, int, str]
JOIN_FROM = 256


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
        self._lease = Lease(storage, say)
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        self._finished: dict[tuple[str, int], Result] = {}
        self._by_recipe: dict[tuple[str, Split], list[Result]] = {}
        self._guessed: dict[tuple[int, LedgerQuestion], Result] = {}
        self._orphaned: dict[LedgerQuestion, Result] = {}
        self._listed: dict[int, Candidate] = {}
        self._ranks: dict[str, int] = {}
        self._parts: list[tuple[int, int, str]] = []
        self._loose: dict[str, pa.Table] = {}  # those that are to be joined, by name
        self._next = 0  # above every number in the folder, so that no file is ever overwritten
        tables = standing(dict(self._read()))
        nodes, self._lost = nodes_of(tables.values()), set[str]()
        for table in tables.values():
            for row in table.to_pylist(maps_as_pydicts="strict"):
                try:
                    candidate = candidate_of(row, nodes)
                except (LostRecipe, ValueError):
                    self._lost.add(row["recipe_id"])
                    if row["event"] == "listed":
                        continue  # so that the run takes its candidates over again
                if row["event"] == "finished":
                    self._index(result_of(row))
                elif row["event"] == "guessed":
                    self._index_guess(row["number"], _question_in(row), result_of(row))
                elif row["event"] == ORPHANED:
                    self._orphaned[_question_in(row)] = result_of(row)
                elif row["event"] == "listed":
                    self._listed[row["number"]] = candidate
                elif row["event"] == "inherited":
                    self._know(result_of(row))
        self._held = set(nodes.built)  # the nodes that are on the disk, with everything below them

    def close(self) -> None:
        """Let another process in."""
        self._lease.close()

    def answer(self, candidate: Candidate) -> Result | None:
        """The result of a candidate, if it is known without an evaluation.

        That is, in this order: what this very candidate scored before; an earlier result of the same recipe on the
        same items; what this very candidate scored when it was only guessed, with the same items known; and what the
        same recipe scored, asked alike, before an earlier failure was taken back.

        If a damaged part took nodes of the candidate's recipe with it, they are written again.
        """
        if candidate.recipe.id in self._lost:
            self._append([row_of(candidate, None, self._held) | {"event": "described"}])
        own = self._finished.get((candidate.stage, candidate.number))
        if own is not None and own.recipe_id == candidate.recipe.id:
            return own
        for result in self._by_recipe.get((candidate.recipe.id, candidate.split), []):
            if result.answers(candidate):
                return replace(result, number=candidate.number, stage=candidate.stage, reused=True)
        question = _question(candidate, len(self.with_known_items(candidate).question.known))
        if (guess := self._guessed.get((candidate.number, question))) is not None:
            return guess
        orphan = self._orphaned.get(question)
        return None if orphan is None else replace(orphan, number=candidate.number)

    def with_known_items(self, candidate: Candidate) -> Candidate:
        """The candidate with the longest first part of its items, in their order, that is known of its recipe; with
        none where it asks for words or for a gradient.
        """
        if candidate.question.words or candidate.question.loss is not None:
            return candidate
        found = self._by_recipe.get((candidate.recipe.id, candidate.split), [])
        order = candidate.question.order
        same = [reordered(r.items, order) if r.complete else r.items for r in found if r.complete or r.order == order]
        return candidate.asking(known=max(same, key=len, default=()))

    @property
    def listed(self) -> Sequence[Candidate]:
        """The candidates of an earlier run that this run's search begins with, in order."""
        return [self._listed[number] for number in sorted(self._listed)]

    def inherit(self, listed: Sequence[Candidate], results: Sequence[tuple[Candidate, Result]]) -> None:
        """Take over the candidates and results of an earlier run, in one part, unless that was done before."""
        if len(self._listed) < len(listed):
            self._append(list(inherited_rows(listed, results, self._held)))
            self._load()

    def write_asked(self, candidate: Candidate) -> None:
        """Record that a candidate was sent to a worker.

        Raises BadInput where the ledger holds another recipe under its number: another search wrote it.
        """
        self._recorded(candidate)
        self._append([row_of(candidate, None, self._held)])

    def write_result(self, candidate: Candidate, result: Result) -> Result:
        """Record a candidate's result, unless it is recorded; it is on disk when this returns, with its rank.

        Raises BadInput where the ledger holds another recipe under its number: another search wrote it.
        """
        if (recorded := self._recorded(candidate)) is not None:
            return recorded
        self._append([row_of(candidate, result, self._held)])
        return self._index(result)

    def write_guess(self, candidate: Candidate, result: Result) -> None:
        """Record the result of a candidate that no search has asked for yet."""
        self._append([row_of(candidate, result, self._held) | {"event": "guessed"}])
        self._index_guess(candidate.number, _question(candidate, result.given), result)

    def retry_failed(self) -> int:
        """Take every failure back, so that a search asks for these candidates again, and return how many there were.

        The results before the first of them stay as they are. Those after it are kept for the questions that the search
        asks again.
        """
        failed = [result for result in self._finished.values() if result.status == "failed"]
        if failed:
            first, table = failed[0], read_table(self.storage)
            is_it = (pc.field("event") == "finished") & (pc.field("stage") == first.stage)
            row = table.filter(is_it & (pc.field("number") == first.number)).to_pylist()[-1]
            self._append([row | {"event": RETRIED, "time": now(), "nodes": []}])
            self._load()
        return len(failed)

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
        self._know(result)
        return result

    def _know(self, result: Result) -> None:
        self._by_recipe.setdefault((result.recipe_id, split_of(result.stage)), []).append(result)

    def _index_guess(self, number: int, question: LedgerQuestion, result: Result) -> None:
        if not result.transient:
            self._guessed[number, question] = result

    def _append(self, rows: list[dict[str, Any]]) -> None:
        number, name = self._new_name()
        table = pa.Table.from_pylist(rows, schema=self._schema())
        self._create(name, part_bytes(table, small=True))
        self._held |= {key for row in rows for key, _ in row["nodes"]}
        self._lost -= {row["recipe_id"] for row in rows}
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
        self._create(wide, part_bytes(pa.concat_tables(tables).replace_schema_metadata(self._metadata())))
        for _, _, name in parts:
            self.storage.remove(name)
        self._parts = [*(p for p in self._parts if p not in parts), (first, last, wide)]

    def _read(self) -> Iterator[tuple[str, pa.Table]]:
        """The parts of this run in their order, each with its name."""
        found = sorted(self._find(), key=lambda p: (p[0], -p[1]))
        self._next = max((end + 1 for _, end, _ in found), default=0)
        wide_end, held = -1, set[RowName]()  # the last number and the rows of the wide part that was read last
        for (start, end, name), data in zip(found, read_all(self.storage, [n for _, _, n in found]), strict=True):
            table = self._own_table(name, data)
            if table is None:
                continue
            if end <= wide_end:
                lost = [name not in held for name in _names_of(table)]
                if not any(lost):
                    self.storage.remove(name)  # joined already; the crash came before it was removed
                    continue
                table = table.filter(pa.array(lost))
                start = end = self._next
                name = self._move_up(name, table)
            elif end > start:
                wide_end, held = end, set(_names_of(table))
            self._parts.append((start, end, name))
            if start == end:
                self._loose[name] = table
            yield name, table

    def _own_table(self, name: str, data: bytes | OSError) -> pa.Table | None:
        """The whole rows of a part, if it is this run's and has any."""
        try:
            table = part_table(data, self._at(name))
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
        self._create(own, part_bytes(lost, small=True))
        self.storage.move(name, DAMAGED)
        self.warnings.append(
            f"{self._at(name)} holds results that are missing in the file of joined parts; they are in {own} now, and "
            f"the file was kept as {DAMAGED}/{name}"
        )
        return own

    def _find(self) -> Iterator[tuple[int, int, str]]:
        for name in self.storage.names():
            if PART.fullmatch(name):
                yield *span_of(name), name
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
            self.storage.write(name, part_bytes(whole))
        self.warnings.append(
            f"{self._at(name)} is damaged ({error.reason}); it was kept as {DAMAGED}/{name}, and the candidates that "
            "are lost with it are scored again"
        )
        return whole

    def _at(self, name: str) -> str:
        return f"{self.storage.location}/{name}"


def _names_of(table: pa.Table) -> list[RowName]:
    """The values that identify each row of a ledger."""
    return list(
        zip(*(table[name].to_pylist() for name in ("event", "stage", "number", "recipe_id", "time")), strict=True)
    )


def _question(candidate: Candidate, known: int) -> LedgerQuestion:
    asked = candidate.question
    return candidate.stage, candidate.recipe.id, asked.bar, asked.limit, known, asked.order


def _question_in(row: Mapping[str, Any]) -> LedgerQuestion:
    return row["stage"], row["recipe_id"], row["bar"], row["limit"], row["given"], row["order"]
