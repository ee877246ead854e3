"""Ways in which the folder of a run comes to hold something else than what was written there."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

# Files of a finished run, but for its ledger and the exported model.
FILES = (
    "config.yaml", "identity.json", "about.json", "best.json", "recipe.json", "summary.json", "examples.json",
    "report.md", "report.html", "curve.png", "items.parquet",
)  # fmt: skip
Change = Callable[[Path], None]


def _content(data: bytes) -> Change:
    def change(file: Path) -> None:
        file.write_bytes(data)

    return change


def _half(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def _directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def _bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[min(200, len(data) // 2)] ^= 1
    file.write_bytes(data)


# What may be done to any file.
WAYS: dict[str, Change] = {
    "empty": _content(b""),
    "half": _half,
    "null": _content(b"null"),
    "list": _content(b"[1, 2]"),
    "text": _content(b'"x"'),
    "object": _content(b'{"a": 1}'),
    "not text": _content(b"\xff\xfe{{{:"),
    "noise": _content(b"x" * 500),
    "bit": _bit,
    "directory": _directory,
    "loop": _loop,
    "gone": lambda file: file.unlink(),
}


def edited(file: Path, seed: int) -> None:
    """A few bytes of a file are others, more, or missing."""
    draw, data = random.Random(seed), bytearray(file.read_bytes())
    for _ in range(draw.randint(1, 4)):
        at = draw.randint(0, max(0, len(data) - 1))
        length = draw.choice((1, 1, 2, 8, 100))
        match draw.randrange(4):
            case 0:
                data[at : at + length] = draw.randbytes(length)
            case 1:
                data[at:at] = draw.randbytes(length)
            case 2:
                del data[at : at + length]
            case 3:
                data[at : at + length] = data[:length]
    file.write_bytes(data)


def part_of(run: Path) -> Path:
    """The first part of a ledger with results of the search, and with nothing else."""
    for file in sorted((run / "ledger").glob("part-*.parquet")):
        rows = pq.ParquetFile(file).read(columns=["event", "stage"]).to_pylist()
        if rows and all(row == {"event": "finished", "stage": "search"} for row in rows):
            return file
    raise AssertionError(f"{run} holds no result of a search")


def _table(change: Callable[[pa.Table], pa.Table]) -> Change:
    def changed(file: Path) -> None:
        given = pq.ParquetFile(file).read()
        pq.write_table(change(given).replace_schema_metadata(given.schema.metadata), file)

    return changed


def _row(**values: object) -> Change:
    def change(given: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([{**row, **values} for row in given.to_pylist()], schema=given.schema)

    return _table(change)


def _nodes(of: Callable[[str], list[tuple[str, str]]]) -> Change:
    def change(given: pa.Table) -> pa.Table:
        rows = [{**row, "nodes": of(row["recipe_id"])} for row in given.to_pylist()]
        return pa.Table.from_pylist(rows, schema=given.schema)

    return _table(change)


def _narrow(given: pa.Table) -> pa.Table:
    at = given.column_names.index("number")
    return given.set_column(at, "number", given["number"].cast(pa.int32()))


# What may be done to a part of a ledger, so that it is still a table that says whose it is.
TABLES: dict[str, Change] = {
    "lacks score": _table(lambda t: t.drop_columns(["score"])),
    "lacks nodes": _table(lambda t: t.drop_columns(["nodes"])),
    "has more": _table(lambda t: t.append_column("more", pa.array([1] * len(t)))),
    "other order": _table(lambda t: t.select(t.column_names[::-1])),
    "other integers": _table(_narrow),
    "stage": _row(stage="zz"),
    "no number": _row(number=None),
    "negative number": _row(number=-1),
    "half a node": _nodes(lambda recipe: [(recipe, "{")]),
    "another recipe": _nodes(lambda recipe: [(recipe, '["merge","simple",["7"],"0",[]]')]),
    "another node": _nodes(lambda recipe: [("0" * 20, '["merge","simple",["7"],"0",[]]')]),
    "no nodes": _row(nodes=None),
    "no maps": _row(tasks=None, seconds=None, counts=None),
    "no items": _row(items=None),
    "no score": _row(score=None),
    "no status": _row(status="well"),
    "score that is no number": _row(score=float("nan")),
}


def join_parts(run: Path) -> None:
    """All parts of a ledger in one, as a ledger joins them itself after a while."""
    files = sorted((run / "ledger").glob("part-*.parquet"))
    tables = [pq.ParquetFile(file).read() for file in files]
    wide = pa.concat_tables(tables).replace_schema_metadata(tables[0].schema.metadata)
    for file in files:
        file.unlink()
    pq.write_table(wide, run / "ledger" / f"part-00000000-{len(files) - 1:08d}.parquet")


def spoil_result(part: Path) -> None:
    """One result of the search has no score any more."""
    given = pq.ParquetFile(part).read()
    rows = given.to_pylist()
    next(row for row in rows if (row["stage"], row["event"]) == ("search", "finished"))["score"] = None
    pq.write_table(pa.Table.from_pylist(rows, schema=given.schema), part)
