"""The ledger: nothing that was written is lost or read twice, whatever lies in the folder."""

import contextlib
import errno
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from evolver.errors import BadInput
from evolver.ledger import DamagedPart, Ledger, candidate_of, nodes_of, read_table, result_of
from evolver.ledger import ledger as module
from evolver.ledger.parts import SCHEMA_VERSION
from evolver.ledger.rows import OLDEST
from evolver.records import Candidate, Question, Result
from evolver.records.recipe import Cross, Expert
from evolver.storage import local, storage_at

A, B = Expert("a", "aa"), Expert("b", "bb")


def recipe(k):
    return Cross(A, (B,), "evolver", 0.5, 0.5, k)


def candidate(k, stage="search", bar=None):
    return Candidate(k, recipe(k), "evolver", (A.id, B.id), Question(bar=bar), stage, f"label {k}")


def result(k, stage="search"):
    tasks, seconds = {"arc": 0.25, "piqa": 0.75}, {"total": 1.5, "forward": 1.0}
    return Result(
        k, recipe(k).id, "ok", 0.1 * k, 0.1 * k, True, (0.0, 1.0, 0.1 * k), tasks, seconds, worker="w", stage=stage
    )


@pytest.fixture
def reopen(tmp_path):
    """Opens the ledger of this test, closing the one that was open."""
    opened = []

    def again(owner="me"):
        close()
        opened.append(Ledger(storage_at(tmp_path / "ledger"), owner))
        return opened[-1]

    def close():
        for one in opened:
            one.close()

    yield again
    close()


def fill(ledger, numbers):
    for k in numbers:
        ledger.write_asked(candidate(k))
        ledger.write_result(candidate(k), result(k))


def parts(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("part-"))


def test_every_field_of_a_result_comes_back(reopen):
    results = [
        result(0),
        Result(1, recipe(1).id, "ok", None, 0.625, False, (1.0, 0.0), {"arc": 0.5}, {"total": 0.1}, worker="ray-3"),
        Result(2, recipe(2).id, "ok", None, float("inf"), False, (1.0,)),
        Result(3, recipe(3).id, "failed", reason="it “broke”\nbadly", worker="w"),
        Result(4, recipe(4).id, "ok", 0.1 + 0.2, 0.1 + 0.2, True, (0.1, 1 / 3), reused=True),
    ]
    ledger = reopen()
    for r in results:
        ledger.write_asked(candidate(r.number, bar=0.5))
        ledger.write_result(candidate(r.number, bar=0.5), r)
    assert ledger.results("search") == results
    again = reopen()
    assert again.results("search") == results
    assert again.warnings == []
    assert isinstance(again.results("search")[0].items, tuple)


def test_the_rows_hold_the_whole_proposal(reopen):
    ledger = reopen()
    ledger.write_asked(candidate(7, bar=0.5))
    ledger.write_result(candidate(7, bar=0.5), result(7))
    table = read_table(ledger.storage)
    rows, nodes = table.to_pylist(), nodes_of([table])
    assert [r["event"] for r in rows] == ["asked", "finished"]
    assert [[key for key, _ in r["nodes"]] for r in rows] == [[A.id, B.id, recipe(7).id], []]
    for row in rows:
        assert row["number"] == 7
        assert row["recipe_id"] == recipe(7).id
        assert candidate_of(row, nodes) == candidate(7, bar=0.5)
        assert row["parents"] == [A.id, B.id]
        assert (row["bar"], row["stage"], row["label"], row["proposer"]) == (0.5, "search", "label 7", "evolver")
    assert rows[0]["score"] is None
    assert rows[0]["time"] <= rows[1]["time"]


def test_a_candidate_that_was_asked_only_is_not_recorded(reopen):
    reopen().write_asked(candidate(0))
    again = reopen()
    assert again.answer(candidate(0)) is None


def test_stages_have_numbers_of_their_own(reopen):
    ledger = reopen()
    ledger.write_result(candidate(0, "baseline"), result(0, "baseline"))
    ledger.write_result(Candidate(0, recipe(1), "evolver"), Result(0, recipe(1).id, "ok", 0.5, 0.5, True, (0.5,)))
    again = reopen()
    assert again.answer(candidate(0, "baseline")).score == 0.0
    assert again.results("search")[0].score == 0.5
    assert len(again.results("baseline")) == 1


def test_a_known_recipe_is_one_of_the_same_items(reopen):
    ledger = reopen()
    ledger.write_result(candidate(0, "baseline"), result(0, "baseline"))
    known = replace(result(0, "baseline"), number=9, stage="search", reused=True)
    assert ledger.answer(Candidate(9, recipe(0), "evolver")) == known
    assert ledger.answer(Candidate(9, recipe(0), "report", stage="report")) is None
    assert reopen().answer(Candidate(9, recipe(0), "evolver")) == known


def test_a_partial_result_answers_where_it_decides(reopen):
    ledger = reopen()
    partial = Result(0, recipe(0).id, "ok", None, 0.5, False, (0.0, 1.0))
    ledger.write_result(candidate(0, bar=0.5), partial)
    for one in (ledger, reopen()):
        assert one.answer(candidate(1)) is None
        assert one.answer(Candidate(1, recipe(0), "x", question=Question(bar=0.5))) == replace(
            partial, number=1, reused=True
        )
        assert one.answer(Candidate(1, recipe(0), "x", question=Question(bar=0.4))) is None
        assert one.answer(Candidate(1, recipe(0), "x")) is None


def test_another_recipe_under_the_same_number_is_refused(reopen):
    ledger = reopen()
    fill(ledger, [0])
    with pytest.raises(BadInput, match=r"candidate 0 of stage search has the recipe \w+ in the ledger"):
        ledger.write_asked(Candidate(0, recipe(5), "evolver"))
    with pytest.raises(BadInput, match=r"candidate 0 of stage search has the recipe \w+ in the ledger"):
        ledger.write_result(Candidate(0, recipe(5), "evolver"), result(5))
    assert ledger.answer(Candidate(0, recipe(5), "evolver")) is None


def test_a_second_opener_is_refused_with_the_pid_of_the_first(reopen, tmp_path):
    ledger = reopen()
    with pytest.raises(BadInput, match=rf"in use by .*{os.getpid()}.*; wait for it, or stop it first"):
        Ledger(storage_at(tmp_path / "ledger"), "me")
    fill(ledger, [0])  # the refused one did no harm
    assert len(reopen().results("search")) == 1


@pytest.mark.parametrize("keep", [0, 10, 1500, -4])
def test_a_damaged_part_is_set_aside(reopen, keep):
    ledger = reopen()
    fill(ledger, range(3))
    victim = ledger.storage.path / parts(ledger.storage.path)[3]  # candidate 1 finished
    victim.write_bytes(victim.read_bytes()[:keep])
    again = reopen()
    assert [r.number for r in again.results("search")] == [0, 2]
    assert len(again.warnings) == 1
    assert victim.name in again.warnings[0]
    assert "damaged" in again.warnings[0]
    assert (again.storage.path / "damaged" / victim.name).exists()
    again.write_result(candidate(1), result(1))
    last = reopen()
    assert [r.number for r in last.results("search")] == [0, 1, 2]
    assert last.warnings == []


def test_a_flipped_bit_is_never_read_as_a_score(reopen):
    """Wherever it is: the part comes back as it was, or not at all and with a warning."""
    ledger = reopen()
    fill(ledger, [0])
    victim = ledger.storage.path / parts(ledger.storage.path)[1]
    whole = victim.read_bytes()
    for place in range(4, len(whole), 197):
        victim.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        again = reopen()
        if again.warnings:
            assert again.results("search") == []
        else:
            assert again.results("search") == [result(0)]
    victim.write_bytes(whole)
    assert reopen().results("search") == [result(0)]


def test_garbage_under_the_name_of_a_part_is_set_aside(reopen, tmp_path):
    fill(reopen(), [0])
    (tmp_path / "ledger" / "part-00000009.parquet").write_bytes(b"garbage")
    again = reopen()
    assert again.results("search") == [result(0)]
    assert "part-00000009" in again.warnings[0]
    fill(again, [1])
    assert "part-00000010.parquet" in parts(again.storage.path)  # no number is ever used twice


def foreign_part(tmp_path, name, folder):
    other = Ledger(storage_at(tmp_path / "other"), "somebody else")
    other.write_result(candidate(5), result(5))
    other.close()
    os.replace(tmp_path / "other" / "part-00000000.parquet", folder / name)


def test_a_part_of_another_run_is_left_alone(reopen, tmp_path):
    ledger = reopen()
    fill(ledger, [0])
    foreign_part(tmp_path, "part-00000007.parquet", ledger.storage.path)
    again = reopen()
    assert [r.number for r in again.results("search")] == [0]
    assert "another run" in again.warnings[0]
    assert (again.storage.path / "part-00000007.parquet").exists()
    fill(again, [1])
    assert "part-00000008.parquet" in parts(again.storage.path)


def test_a_part_of_another_run_is_left_alone_when_parts_are_joined_around_it(reopen, tmp_path, monkeypatch):
    ledger = reopen()
    fill(ledger, [0])
    foreign_part(tmp_path, "part-00000003.parquet", ledger.storage.path)
    monkeypatch.setattr(module, "JOIN_FROM", 4)
    fill(reopen(), [1])
    again = reopen()
    assert "part-00000000-00000005.parquet" in parts(again.storage.path)
    assert [r.number for r in again.results("search")] == [0, 1]
    assert (again.storage.path / "part-00000003.parquet").exists()


def test_other_files_are_left_alone_and_half_written_ones_removed(reopen, tmp_path):
    ledger = reopen()
    fill(ledger, [0])
    (ledger.storage.path / "notes.txt").write_text("mine")
    (ledger.storage.path / ".part-00000002.parquet.tmp").write_bytes(b"half")
    again = reopen()
    assert again.results("search") == [result(0)]
    assert "notes.txt" in again.warnings[0]
    assert (ledger.storage.path / "notes.txt").read_text() == "mine"
    assert not (ledger.storage.path / ".part-00000002.parquet.tmp").exists()


def test_small_parts_are_joined_and_hold_the_same(reopen, monkeypatch):
    monkeypatch.setattr(module, "JOIN_FROM", 6)
    ledger = reopen()
    fill(ledger, range(7))  # 14 rows: two joined parts of 6, two loose ones
    assert parts(ledger.storage.path) == [
        "part-00000000-00000005.parquet", "part-00000006-00000011.parquet",
        "part-00000012.parquet", "part-00000013.parquet",
    ]  # fmt: skip
    assert read_table(ledger.storage).num_rows == 14
    again = reopen()
    assert again.results("search") == [result(k) for k in range(7)]
    assert again.warnings == []
    fill(again, range(7, 10))
    assert reopen().results("search") == [result(k) for k in range(10)]
    rows = read_table(again.storage).to_pylist()
    assert [r["number"] for r in rows] == [k for k in range(10) for _ in "af"]


def test_a_crash_between_joining_and_removing_loses_and_doubles_nothing(reopen, monkeypatch):
    ledger = reopen()
    fill(ledger, range(3))
    loose = {n: (ledger.storage.path / n).read_bytes() for n in parts(ledger.storage.path)}
    monkeypatch.setattr(module, "JOIN_FROM", 7)
    ledger.write_asked(candidate(3))  # joins
    assert parts(ledger.storage.path) == ["part-00000000-00000006.parquet"]
    for name, data in loose.items():
        (ledger.storage.path / name).write_bytes(data)
    assert read_table(ledger.storage).num_rows == 7
    again = reopen()
    assert again.results("search") == [result(k) for k in range(3)]
    assert parts(again.storage.path) == ["part-00000000-00000006.parquet"]


def test_a_damaged_joined_part_gives_way_to_the_loose_ones(reopen, monkeypatch):
    ledger = reopen()
    fill(ledger, range(3))
    (ledger.storage.path / "part-00000000-00000005.parquet").write_bytes(b"cut short")
    again = reopen()
    assert again.results("search") == [result(k) for k in range(3)]
    assert len(again.warnings) == 1


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["link", "fsync"])
def test_a_full_disk_loses_nothing_that_was_finished(reopen, monkeypatch, step):
    ledger = reopen()
    fill(ledger, range(2))
    with monkeypatch.context() as patch:
        patch.setattr(os, step, full_disk)
        with pytest.raises(BadInput, match=r"No space left.*nothing finished so far is lost: free disk space"):
            ledger.write_result(candidate(2), result(2))
    assert ledger.answer(candidate(2)) is None
    assert not list(ledger.storage.path.glob(".part*"))
    again = reopen()
    assert again.results("search") == [result(0), result(1)]
    assert again.warnings == []
    fill(again, [2])
    assert len(reopen().results("search")) == 3


def test_a_full_disk_while_joining_loses_nothing(reopen, monkeypatch):
    ledger = reopen()
    fill(ledger, range(2))
    monkeypatch.setattr(module, "JOIN_FROM", 5)
    link = os.link
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda a, b: full_disk() if b.name.count("-") == 2 else link(a, b))
        with pytest.raises(BadInput, match="No space left"):
            ledger.write_result(candidate(2), result(2))
    assert reopen().results("search") == [result(k) for k in range(3)]


def test_a_result_is_on_disk_when_finished_returns(reopen):
    ledger = reopen()
    for k in range(3):
        ledger.write_result(candidate(k), result(k))
        newest = ledger.storage.path / parts(ledger.storage.path)[-1]
        assert pq.read_table(newest)["number"].to_pylist() == [k]


def test_reading_an_empty_ledger(reopen):
    assert read_table(reopen().storage).num_rows == 0


def test_reading_while_a_run_writes(reopen, monkeypatch):
    """Whatever the writer is at, a reader sees a beginning of the record: no gap, nothing twice."""
    monkeypatch.setattr(module, "JOIN_FROM", 4)
    monkeypatch.setattr(local, "_sync", lambda folder: None)
    ledger = reopen()
    writer = threading.Thread(target=fill, args=(ledger, range(60)))
    writer.start()
    counts = []
    while writer.is_alive() or not counts:
        rows = read_table(ledger.storage).to_pylist()
        assert [(r["number"], r["event"]) for r in rows] == [
            (k // 2, ("asked", "finished")[k % 2]) for k in range(len(rows))
        ]
        counts.append(len(rows))
    writer.join()
    assert counts == sorted(counts)
    assert read_table(ledger.storage).num_rows == 120


OLD = Path(__file__).parent / "old" / "ledger"  # written by the code of 2026-11-28


@pytest.fixture
def old(tmp_path):
    shutil.copytree(OLD, tmp_path / "old")
    return storage_at(tmp_path / "old")


def test_an_old_ledger_opens_and_goes_on(old):
    before = read_table(old).to_pylist()
    with contextlib.closing(Ledger(old, "the owner of 2026-11")) as ledger:
        assert ledger.warnings == []
        assert [(r.number, r.score, r.tasks) for r in ledger.results("search")] == [
            (0, 0.5, {"t": 0.5}), (1, 0.625, {"t": 0.625}), (2, 0.75, {"t": 0.75}), (4, None, {}),
        ]  # fmt: skip
        ledger.write_result(candidate(9), result(9))
    after = read_table(old).to_pylist()
    assert after[:-1] == before != []
    assert after[-1]["number"] == 9
    with contextlib.closing(Ledger(old, "the owner of 2026-11")) as ledger:
        assert ledger.warnings == []
        assert ledger.answer(candidate(9)) == result(9)


def without(storage, *columns):
    """As a version wrote it that did not know these columns yet."""
    for name in storage.names():
        table = pq.read_table(f"{storage.location}/{name}")
        pq.write_table(table.drop_columns(list(columns)), f"{storage.location}/{name}")


def test_a_column_that_is_missing_holds_its_default(old):
    before = read_table(old).to_pylist(maps_as_pydicts="strict")
    columns = {"raced": False, "given": 0, "counts": {}, "limit": None, "label": "", "parents": [], "reused": False}
    without(old, *columns)
    with contextlib.closing(Ledger(old, "the owner of 2026-11")) as ledger:
        assert ledger.warnings == []
        assert len(ledger.results("search")) == 4
        ledger.write_result(candidate(9), result(9))
    after = read_table(old).to_pylist(maps_as_pydicts="strict")[:-1]
    assert after == [row | columns for row in before]
    assert all(result_of(row).counts == {} for row in after if row["event"] == "finished")


@pytest.mark.parametrize("column", OLDEST)
def test_a_table_without_what_every_ledger_has_is_none(old, column):
    without(old, "recipe" if column == "nodes" else column)  # a version of before there were nodes wrote it
    with pytest.raises(DamagedPart, match=rf"part-[\d-]+\.parquet: it is damaged \(it has no column {column}\)"):
        read_table(old)
    parts = [n for n in old.names() if n.startswith("part")]
    with contextlib.closing(Ledger(old, "the owner of 2026-11")) as mended:
        assert [w for w in mended.warnings if "scored again" in w]
    assert old.folder("damaged").names() == parts
    assert not len(read_table(old))


def of_version(old, version):
    """One part gets a column that nobody knows, from a version of that number."""
    name = next(iter(old.names()))
    table = pq.read_table(f"{old.location}/{name}")
    named = {**table.schema.metadata, b"evolver.ledger": version}
    wider = table.append_column("energy", [table["score"]]).replace_schema_metadata(named)
    pq.write_table(wider, f"{old.location}/{name}")
    return name


def test_a_ledger_of_a_newer_version_is_left_to_it(old):
    of_version(old, str(SCHEMA_VERSION + 1).encode())
    before = old.names()
    for reading in (lambda: Ledger(old, "the owner of 2026-11"), lambda: read_table(old)):
        with pytest.raises(BadInput, match=r"a newer version of Evolver wrote it; continue the run with that version"):
            reading()
    assert [n for n in old.names() if n != "lock"] == before


def test_a_column_that_no_version_knows_is_damage(old):
    name = of_version(old, b"1")
    with pytest.raises(DamagedPart, match="energy"):
        read_table(old)
    with contextlib.closing(Ledger(old, "the owner of 2026-11")):
        assert old.folder("damaged").names() == [name]


def test_no_whole_result_goes_because_a_wide_part_lies_over_it(reopen, tmp_path, monkeypatch):
    """A part is removed where the one over it holds its rows; other rows get a part that every reader finds."""
    monkeypatch.setattr(module, "JOIN_FROM", 6)
    first, folder = reopen(), tmp_path / "ledger"
    fill(first, range(4))
    wide = next(folder.glob("part-????????-*.parquet"))
    inside, own = folder / "part-00000002.parquet", result(9)
    fill(reopen(), [9])
    max(folder.glob("part-????????.parquet")).rename(inside)  # the result, which was written last
    again = reopen()
    assert again.answer(candidate(9)) is not None
    assert any(inside.name in w and "are missing in the file of joined parts" in w for w in again.warnings)
    assert wide.exists()
    assert not inside.exists()
    finished = [row["number"] for row in read_table(again.storage).to_pylist() if row["event"] == "finished"]
    assert sorted(finished) == [0, 1, 2, 3, own.number]
    assert not reopen().warnings


def test_a_part_without_any_whole_row_is_none_of_the_parts_that_are_joined(reopen, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "JOIN_FROM", 6)
    fill(reopen(), [0])
    part = max((tmp_path / "ledger").glob("part-*.parquet"))
    given = pq.read_table(part)
    rows = [{**row, "status": "well"} for row in given.to_pylist()]
    pq.write_table(given.from_pylist(rows, schema=given.schema), part)
    again = reopen()
    assert len([w for w in again.warnings if part.name in w]) == 1
    fill(again, range(1, 5))
    assert sorted(r.number for r in again.results("search")) == [1, 2, 3, 4]
    assert (tmp_path / "ledger" / "damaged" / part.name).exists()
