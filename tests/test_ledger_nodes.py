"""The nodes of recipes in the ledger: each is there once, before it is needed, and comes back where it was lost."""

import os
import random
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_graph import random_recipe
from test_telling import lineage, scored

from evolver.ledger import Ledger, LostRecipe, candidate_of, nodes_of, read_table
from evolver.ledger import ledger as module
from evolver.records import Candidate
from evolver.records.graph import NodeTable, texts_of
from evolver.storage import local, storage_at

COUNT = 8


def opened(folder):
    return Ledger(storage_at(folder), "me")


def fill(ledger, candidates):
    """As a run does that begins, or goes on after it was killed."""
    for candidate in candidates:
        answer = ledger.answer(candidate)
        if answer is None:
            ledger.write_asked(candidate)
        ledger.write_result(candidate, answer or scored(candidate))


def readable(folder):
    """The candidates that can be read from a ledger, by number, and the numbers of those whose recipe is lost."""
    table = read_table(storage_at(folder))
    nodes, found, lost = nodes_of([table]), {}, set()
    for row in table.to_pylist():
        if row["event"] == "finished":
            try:
                found[row["number"]] = candidate_of(row, nodes)
            except LostRecipe:
                lost.add(row["number"])
    return found, lost


def written(folder):
    """The ids of the nodes in a ledger, in the order in which they were written."""
    return [key for nodes in read_table(storage_at(folder))["nodes"].to_pylist() for key, _ in nodes]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing is forced to the disk; who pulls the plug is tested elsewhere."""
    monkeypatch.setattr(local, "_sync", lambda folder: None)
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def filled(tmp_path):
    """The folder of a ledger with a lineage in it, and its candidates by number."""
    candidates = list(lineage(COUNT))
    ledger = opened(tmp_path / "ledger")
    fill(ledger, candidates)
    ledger.close()
    return tmp_path / "ledger", {c.number: c for c in candidates}


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12), join=st.integers(3, 20))
def test_every_recipe_is_read_back_and_no_node_is_written_twice(tmp_path_factory, seed, count, join):
    folder, draw = tmp_path_factory.mktemp("run"), random.Random(seed)
    candidates = [Candidate(k, random_recipe(draw.randrange(4), draw.randint(1, 20)), "test") for k in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "JOIN_FROM", join)
        for part in (candidates[: count // 2], candidates):  # opened twice
            ledger = opened(folder)
            fill(ledger, part)
            ledger.close()
    found, lost = readable(folder)
    assert (found, lost) == ({c.number: c for c in candidates}, set())
    keys = written(folder)
    assert len(keys) == len(set(keys))
    assert set(keys) == set().union(*(texts_of(c.recipe) for c in candidates))


def test_a_node_is_on_the_disk_before_or_with_the_row_that_needs_it(filled, tmp_path):
    """Whenever the driver is killed, the parts up to then are enough for all of their rows; it then goes on."""
    folder, candidates = filled
    names = sorted(p.name for p in folder.glob("part-*"))
    for count in range(0, len(names) + 1, 3):
        cut = tmp_path / "cut" / str(count)
        cut.mkdir(parents=True)
        for name in names[:count]:
            shutil.copy(folder / name, cut / name)
        found, lost = readable(cut)
        assert (len(found), lost) == (count // 2, set())
        ledger = opened(cut)
        fill(ledger, candidates.values())
        ledger.close()
        assert readable(cut) == (candidates, set())
        assert len(written(cut)) == len(set(written(cut)))


@pytest.mark.parametrize("way", ["gone", "cut short", "garbage"])
@pytest.mark.parametrize("place", [0, 1, 6, 2 * COUNT - 2])
def test_nodes_that_were_lost_with_a_part_are_written_again(filled, way, place):
    folder, candidates = filled
    part = sorted(folder.glob("part-*"))[place]
    if way == "gone":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:1000] if way == "cut short" else b"garbage")
    results = opened(folder)
    assert len(results.results("search")) == COUNT - place % 2  # no score is lost with the nodes
    assert bool(results.warnings) == (way != "gone")
    results.close()
    found, lost = readable(folder)
    assert found.items() <= candidates.items()
    assert bool(lost) == (place % 2 == 0)  # parts of proposals hold the nodes
    again = opened(folder)
    fill(again, candidates.values())
    again.close()
    assert readable(folder) == (candidates, set())
    events = read_table(storage_at(folder))["event"].to_pylist()
    assert events.count("finished") == COUNT
    assert events.count("asked") == COUNT + (1 if place % 2 else -1)
    assert ("described" in events) == (place % 2 == 0)
    last = opened(folder)
    assert not last.warnings
    size = len(read_table(storage_at(folder)))
    fill(last, candidates.values())
    last.close()
    assert len(read_table(storage_at(folder))) == size


def test_a_wide_part_that_is_lost_takes_no_result_of_later_parts_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "JOIN_FROM", COUNT)
    candidates = list(lineage(COUNT))
    ledger = opened(tmp_path)
    fill(ledger, candidates[: COUNT // 2])
    monkeypatch.setattr(module, "JOIN_FROM", 1000)
    fill(ledger, candidates)
    ledger.close()
    (wide,) = tmp_path.glob("part-????????-*")
    wide.write_bytes(b"garbage")
    ledger = opened(tmp_path)
    assert [r.number for r in ledger.results("search")] == list(range(COUNT // 2, COUNT))
    fill(ledger, candidates)
    ledger.close()
    assert readable(tmp_path) == ({c.number: c for c in candidates}, set())
    assert read_table(storage_at(tmp_path))["event"].to_pylist().count("finished") == COUNT


def test_what_is_read_for_pages_is_what_was_written(filled):
    folder, candidates = filled
    nodes = NodeTable()
    for part in sorted(folder.glob("part-*")):  # one by one, as a page reads on
        nodes.update(nodes_of([pq.ParquetFile(part).read()]))
    assert {k: nodes.recipe(c.recipe.id) for k, c in candidates.items()} == {k: c.recipe for k, c in candidates.items()}


def test_candidates_that_were_taken_over_are_taken_over_again_where_nodes_were_lost(tmp_path):
    listed = list(lineage(6))
    ledger = opened(tmp_path)
    ledger.inherit(listed, [(c, scored(c)) for c in listed])
    assert ledger.listed == listed
    ledger.close()
    (part,) = tmp_path.glob("part-*")
    given = pq.ParquetFile(part).read()
    keys = [key for nodes in given["nodes"].to_pylist() for key, _ in nodes]
    assert len(keys) == len(set(keys))
    rows = given.to_pylist()
    rows[1]["nodes"] = []
    pq.write_table(given.from_pylist(rows, schema=given.schema), part)
    again = opened(tmp_path)
    assert 0 < len(again.listed) < len(listed)
    again.inherit(listed, [(c, scored(c)) for c in listed])
    assert again.listed == listed
    assert all(again.answer(c) == replace(scored(c), reused=True) for c in listed)
    again.close()
