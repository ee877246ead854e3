"""A run in columns says what its history says, read at once or bit by bit."""

from __future__ import annotations

import contextlib
import itertools
import shutil

import numpy as np
import pytest
import toys

from evolver import ledger
from evolver.dashboard.overview import Overview
from evolver.dashboard.views import utilisation
from evolver.errors import BadInput
from evolver.records import Candidate, Result
from evolver.records.recipe import Expert
from evolver.runs.history import read_history
from evolver.storage import storage_at

CHANGES = {"search.generations": 9, "budget.candidates": 15, "evaluation.early_stopping": True}


@pytest.fixture(scope="module")
def run(make_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("overview")
    return toys.run_here(make_config(folder, CHANGES), folder)


def assert_same(overview, history):
    for stage, pairs in history.stages.items():
        rows = overview.rows(stage)
        assert rows.numbers("number").tolist() == [c.number for c, _ in pairs]
        assert rows.numbers("cost").tolist() == [r.cost for _, r in pairs]
        assert [None if np.isnan(s) else s for s in rows.numbers("score").tolist()] == [r.score for _, r in pairs]
        assert rows.numbers("total").tolist() == [r.seconds["total"] for _, r in pairs]
        assert rows.texts("worker") == [r.worker for _, r in pairs]
        for place, pair in enumerate(pairs):
            assert overview.pair(stage, place) == pair
    best = history.best
    assert (overview.rows("search").best is None) == (best is None)
    if best:
        assert overview.pair("search", overview.rows("search").best) == best


@pytest.mark.whole
def test_it_says_what_the_history_says(run):
    overview, history = Overview(storage_at(run)), read_history(storage_at(run))
    assert_same(overview, history)
    assert {r.complete for _, r in history.stages["search"]} == {True, False}  # else this shows less than it seems
    assert (overview.flying, overview.guessed) == (0, len(history.guessed))
    assert overview.candidate(7) == history.stages["search"][7]
    with pytest.raises(BadInput, match="there is no candidate 99"):
        overview.candidate(99)


def test_read_on_part_by_part_it_is_the_same(run, tmp_path):
    parts = sorted((run / "ledger").glob("part-*"))
    there = tmp_path / "toy"
    (there / "ledger").mkdir(parents=True)
    for name in ("config.yaml", "about.json"):
        shutil.copy(run / name, there)
    overview = Overview(storage_at(there))
    assert overview.last == 0.0
    for chunk in itertools.batched(parts, 5) if hasattr(itertools, "batched") else [parts[:9], parts[9:]]:
        for part in chunk:
            shutil.copy(part, there / "ledger")
        overview.refresh()
        assert_same(overview, read_history(storage_at(there)))
    assert overview.last > 0


def test_parts_that_are_joined_while_somebody_looks(run, tmp_path, monkeypatch):
    monkeypatch.setattr("evolver.ledger.ledger.JOIN_FROM", 6)
    shutil.copytree(run, tmp_path / "toy")
    shutil.rmtree(tmp_path / "toy" / "ledger")
    storage = storage_at(tmp_path / "toy")
    candidates = [Candidate(k, Expert(f"m{k}", str(k)), "tpe") for k in range(5)]
    with contextlib.closing(ledger.Ledger(storage.folder("ledger"), "owner")) as writing:
        for c in candidates[:4]:
            writing.write_asked(c)
        overview = Overview(storage)
        assert overview.flying == 4
        results = [Result(c.number, c.recipe.id, "ok", 0.5, complete=True, items=(1.0, 0.0)) for c in candidates]
        writing.write_result(candidates[0], results[0])
        overview.refresh()
        writing.write_result(candidates[1], results[1])  # the sixth row: they become one part
        assert len(storage.folder("ledger").names()) < 6
        assert overview.pair("search", 0)[1] == results[0]  # from where it is now
        overview.refresh()
        assert (len(overview.rows("search")), overview.flying) == (2, 2)


def test_the_share_of_busy_workers_adds_up_to_what_they_worked(run):
    search = Overview(storage_at(run)).rows("search")
    found = utilisation(search)
    span = (found["at"][-1] - found["at"][0]) / (len(found["at"]) - 1)
    worked = search.numbers("total")[search.numbers("reused") == 0].sum()
    assert sum(found["share"]) * span == pytest.approx(worked, rel=0.02)
