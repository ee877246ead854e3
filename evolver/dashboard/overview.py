"""A run as the pages show it: the columns of its ledger, updated as it grows.

Recipes are built, and answers read, one by one when they are shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from evolver import ledger
from evolver.errors import BadInput
from evolver.records import STAGES, Candidate, Result, Stage
from evolver.records.graph import NodeTable
from evolver.runs.about import read_about
from evolver.storage import Storage

# The columns that are kept of each row. The answers, which make up most of its bytes, are not kept.
KEPT_COLUMNS = (
    "time", "number", "recipe_id", "label", "proposer", "limit", "status", "reason", "score", "complete", "reused",
    "worker",
)  # fmt: skip
SECONDS = ("total", "materialise", "forward")
PAIRS = 200  # candidates that are kept in full

Column = NDArray[np.float64]
Places = NDArray[np.int64]


class Rows:
    """The results of one stage by number, the last one of each, in columns.

    Attributes:
        table: one row for each. Beside what the ledger has there are ``size`` (answers), ``cost`` (new ones among
            them), ``total``, ``materialise`` and ``forward`` (seconds), ``task NAME`` for each task, and ``part``.
    """

    def __init__(self, table: pa.Table) -> None:
        numbers = table["number"].to_numpy()
        order = np.argsort(numbers, kind="stable")
        last = np.append(numbers[order][1:] != numbers[order][:-1], True)[: len(order)]
        self.table = table.take(pa.array(order[last]))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def numbers(self, column: str) -> Column:
        """A column as float64, NaN where there is nothing."""
        found: Column = self.table[column].cast(pa.float64()).to_numpy()
        return found

    def texts(self, column: str) -> list[str]:
        """A column of text."""
        return [text or "" for text in self.table[column].to_pylist()]

    def flags(self, column: str) -> NDArray[np.bool_]:
        """A column of true and false, false where there is nothing."""
        found: NDArray[np.bool_] = pc.fill_null(self.table[column], False).to_numpy(zero_copy_only=False)
        return found

    @property
    def accepted(self) -> Column:
        """The scores of those that keep the run's constraints, NaN for the others."""
        return np.where(self.numbers("violation") > 0, np.nan, self.numbers("score"))

    @cached_property
    def whole(self) -> Places:
        """Where candidates stand that were asked for all items and were scored on them, and that keep the run's
        constraints, if some do.
        """
        asked_in_full = pc.is_null(self.table["limit"]).to_numpy(zero_copy_only=False)
        whole = np.flatnonzero(asked_in_full & self.flags("complete") & ~np.isnan(self.numbers("score")))
        feasible = whole[self.numbers("violation")[whole] == 0]
        return feasible if len(feasible) else whole

    @cached_property
    def best(self) -> int | None:
        """Where the best candidate stands, the earliest of equals; None before there is one. It has the highest score
        of all items or, if none keeps the run's constraints, breaks them least.
        """
        if not len(self.whole):
            return None
        violation, score = (self.numbers(name)[self.whole] for name in ("violation", "score"))
        return int(self.whole[np.lexsort((np.arange(len(score)), np.where(violation == 0, -score, 0.0), violation))[0]])


@dataclass(frozen=True)
class Part:
    """What is kept of a part of the ledger: results by stage, numbers of candidates that were sent out by stage, how
    many results of guesses there are, and when the last row was written (seconds since 1970).
    """

    finished: Mapping[Stage, pa.Table]
    asked: Mapping[Stage, Column]
    guessed: int
    last: float


class Overview:
    """A run that pages read again and again.

    Raises BadInput if the folder is not that of a run.
    """

    def __init__(self, folder: Storage) -> None:
        self.folder = folder
        self._ledger = folder.folder("ledger")
        self._parts: dict[str, Part] = {}
        self._nodes = NodeTable()
        self._rows: dict[Stage, Rows] = {}
        self._pairs: dict[tuple[str, str, int], tuple[Candidate, Result]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read what has been written since."""
        self.about = read_about(self.folder)
        found = ledger.read_parts(self._ledger, self._parts)
        if found.keys() != self._parts.keys():
            if any(ledger.has_retries(t) for t in found.values() if t is not None):
                # Rows that were read before a failure was taken back count otherwise now.
                found = {**ledger.standing(ledger.read_all_parts(self._ledger))}
            tasks = list(self.about.scales["dev"].weights)
            self._parts = {n: self._parts[n] if t is None else part_of(t, n, tasks) for n, t in found.items()}
            self._nodes.update(ledger.nodes_of(t for t in found.values() if t is not None))
            self._rows = {}

    def rows(self, stage: Stage) -> Rows:
        """The results of a stage."""
        if stage not in self._rows:
            tables = [part.finished[stage] for part in self._parts.values() if stage in part.finished]
            nothing = columns(ledger.SCHEMA.empty_table(), "", self.about.scales["dev"].weights)
            self._rows[stage] = Rows(pa.concat_tables(tables) if tables else nothing)
        return self._rows[stage]

    @property
    def flying(self) -> int:
        """Candidates that were sent out and have no result yet."""
        waiting = 0
        for stage in STAGES:
            asked = [part.asked[stage] for part in self._parts.values() if stage in part.asked]
            if asked:
                waiting += len(np.setdiff1d(np.concatenate(asked), self.rows(stage).numbers("number")))
        return waiting

    @property
    def guessed(self) -> int:
        """Results of candidates that were scored ahead of being asked for."""
        return sum(part.guessed for part in self._parts.values())

    @property
    def last(self) -> float:
        """When the last result was written, in seconds since 1970 by its driver's clock; 0.0 before there is one."""
        return max((part.last for part in self._parts.values()), default=0.0)

    def pair(self, stage: Stage, place: int) -> tuple[Candidate, Result]:
        """The candidate and the result in a row of a stage, whole."""
        row = self.rows(stage).table.slice(place, 1).to_pylist()[0]
        key = row["part"], stage, row["number"]
        if key not in self._pairs:
            if len(self._pairs) >= PAIRS:
                self._pairs.clear()
            self._pairs[key] = self._read(*key)
        return self._pairs[key]

    def candidate(self, number: int) -> tuple[Candidate, Result]:
        """A candidate of the search by its number.

        Raises BadInput where there is none.
        """
        places = np.flatnonzero(self.rows("search").numbers("number") == number)
        if not len(places):
            raise BadInput(f"{self.folder.location}: there is no candidate {number}.")
        return self.pair("search", int(places[0]))

    def _read(self, name: str, stage: str, number: int) -> tuple[Candidate, Result]:
        try:
            part = ledger.read_part(self._ledger, name)
        except FileNotFoundError:  # it was joined with others meanwhile
            part = ledger.read_table(self._ledger)
        is_it = (pc.field("event") == "finished") & (pc.field("stage") == stage) & (pc.field("number") == number)
        found = part.filter(is_it).to_pylist(maps_as_pydicts="strict")[-1]
        return ledger.candidate_of(found, self._nodes), ledger.result_of(found)


def part_of(table: pa.Table, name: str, tasks: Iterable[str]) -> Part:
    """What is kept of a part of a ledger."""
    done, sent = (table.filter(pc.equal(table["event"], event)) for event in ("finished", "asked"))
    finished, asked = _by_stage(done), _by_stage(sent)
    latest = pc.max(done["time"]).as_py()
    return Part(
        {stage: columns(rows, name, tasks) for stage, rows in finished.items()},
        {stage: rows["number"].to_numpy() for stage, rows in asked.items()},
        len(table.filter(pc.equal(table["event"], "guessed"))),
        latest.timestamp() if latest else 0.0,
    )


def _violation(found: Iterable[tuple[str, float]] | None) -> float:
    """By how much a candidate breaks the constraints of its run together."""
    return math.fsum(value for _, value in found or () if value > 0)


def _by_stage(table: pa.Table) -> dict[Stage, pa.Table]:
    found = {stage: table.filter(pc.equal(table["stage"], stage)) for stage in STAGES}
    return {stage: rows for stage, rows in found.items() if len(rows)}


def columns(table: pa.Table, part: str, tasks: Iterable[str]) -> pa.Table:
    """Results without their answers and recipes, with what pages count."""
    size = pc.fill_null(pc.list_value_length(table["items"]), 0).cast(pa.float64())
    given = pc.fill_null(table["given"], 0).cast(pa.float64())
    fresh = pc.invert(pc.fill_null(table["reused"], False))
    kept = {name: table[name] for name in KEPT_COLUMNS}
    kept |= {"size": size, "cost": pc.multiply(pc.subtract(size, given), fresh.cast(pa.float64()))}
    kept["violation"] = pa.array([_violation(found) for found in table["violations"].to_pylist()], pa.float64())
    kept |= {name: pc.map_lookup(table["seconds"], name, "first") for name in SECONDS}
    kept |= {f"task {name}": pc.map_lookup(table["tasks"], name, "first") for name in tasks}
    return pa.table({**kept, "part": pa.array([part] * len(table)).dictionary_encode()}).unify_dictionaries()
