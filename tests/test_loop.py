"""The loop: recorded before told, nothing scored twice, and a run that died goes on as if it had not."""

import itertools
import os
from dataclasses import replace

import pytest

from evolver.errors import BadInput
from evolver.ledger import Ledger, nodes_of, read_table
from evolver.loop import evolve
from evolver.records import Candidate, Question, Result
from evolver.records.recipe import Cross, Expert
from evolver.storage import storage_at

A, B = Expert("a", "aa"), Expert("b", "bb")
SEEDS = (0, 1, 2, 1, 3, 0, 4, 4)  # recipes of the search below: some of them come twice


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """These runs die of exceptions, not of power cuts; hundreds of them are faster so."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def recipe(seed):
    return Cross(A, (B,), "evolver", 0.5, 0.5, seed)


class Script:
    """A search that proposes recipes by their seeds, each after the results of all but the last few before it."""

    def __init__(self, seeds=SEEDS, in_flight=1, bars=None):
        self.candidates = [
            Candidate(k, recipe(s), "script", question=Question(bar=(bars or {}).get(k))) for k, s in enumerate(seeds)
        ]
        self.in_flight, self.next, self.told = in_flight, 0, []
        self.total = len(self.candidates)

    @property
    def done(self):
        return len(self.told) == self.total

    def ask(self, n):
        out = []
        while len(out) < n and self.next < self.total and self.next - len(self.told) < self.in_flight:
            out.append(self.candidates[self.next])
            self.next += 1
        return out

    def tell(self, result):
        self.told.append(result)


class FakePool:
    """Scores at once, hands the results back last first, and counts what it scored."""

    def __init__(self, workers=1, bound=None):
        self.workers, self.bound = workers, bound
        self.waiting, self.scored = [], []

    def free(self):
        return self.workers - len(self.waiting)

    def submit(self, candidate):
        assert self.free() > 0
        self.waiting.append(candidate)
        self.scored.append(candidate.number)

    def wait(self):
        candidate = self.waiting.pop()
        score = 1.0 / (1 + candidate.recipe.seed)
        if candidate.question.bar is not None and score <= candidate.question.bar:
            return [Result(candidate.number, candidate.recipe.id, "ok", None, score, False, (score,))]
        return [Result(candidate.number, candidate.recipe.id, "ok", score, score, True, (score, score))]

    def close(self):
        pass


class Spy:
    """A ledger, search, pool and watcher that write down what is done to them, and die at a given step."""

    def __init__(self, ledger, search, pool, die_at=None):
        self.ledger, self.search, self.pool = ledger, search, pool
        self.steps, self.die_at = [], die_at

    def step(self, name, number=None):
        if len(self.steps) == self.die_at:
            raise KeyboardInterrupt(f"step {len(self.steps)}: {name}")
        self.steps.append((name, number))

    def write_asked(self, candidate):
        self.step("before asked", candidate.number)
        self.ledger.write_asked(candidate)
        self.step("asked", candidate.number)

    def write_result(self, candidate, result):
        self.step("before finished", candidate.number)
        recorded = self.ledger.write_result(candidate, result)
        self.step("finished", candidate.number)
        return recorded

    def tell(self, result):
        self.step("told", result.number)
        self.search.tell(result)

    def submit(self, candidate):
        self.step("submitted", candidate.number)
        self.pool.submit(candidate)

    def wait(self):
        self.step("before wait")
        results = self.pool.wait()
        self.step("waited")
        return results

    def watch(self, candidate, result):
        self.step("watched", candidate.number)

    def run(self):
        parts = [_Of(self, self.search), _Of(self, self.pool), _Of(self, self.ledger)]
        evolve(*parts, self.watch)


class _Of:
    """One of the parts, with the steps that its spy watches."""

    def __init__(self, spy, part):
        self._spy, self._part = spy, part

    def __getattr__(self, name):
        own = hasattr(self._part, name)
        return getattr(self._spy if own and name in SPIED else self._part, name)


SPIED = {"write_asked", "write_result", "tell", "submit", "wait"}


def run(folder, workers=1, die_at=None, **script):
    """One call of the run in ``folder``: (spy, search, pool), the ledger closed."""
    ledger, search, pool = Ledger(storage_at(folder), "me"), Script(**script), FakePool(workers)
    spy = Spy(ledger, search, pool, die_at)
    try:
        spy.run()
    finally:
        ledger.close()
    return spy, search, pool


def contents(folder):
    """What was finished, without the times."""
    table = read_table(storage_at(folder))
    nodes = nodes_of([table])
    rows = [r | {"recipe": nodes.recipe(r["recipe_id"])} for r in table.to_pylist() if r["event"] == "finished"]
    keys = ("number", "recipe_id", "recipe", "score", "bound", "complete", "reused", "items", "status", "bar", "stage")
    return sorted(tuple(str(r[k]) for k in keys) for r in rows)


def test_a_result_is_recorded_before_it_is_told(tmp_path):
    spy, _, _ = run(tmp_path)
    assert len([s for s in spy.steps if s[0] == "told"]) == len(SEEDS)
    for number in range(len(SEEDS)):
        assert spy.steps.index(("finished", number)) < spy.steps.index(("told", number))
        assert spy.steps.index(("told", number)) < spy.steps.index(("watched", number))


def test_a_candidate_is_recorded_before_it_is_sent(tmp_path):
    spy, _, pool = run(tmp_path, workers=4, in_flight=4)
    for number in pool.scored:
        assert spy.steps.index(("asked", number)) < spy.steps.index(("submitted", number))


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_a_recipe_is_scored_once(tmp_path, workers):
    """Seeds 0, 1, 2, 1, 3, 0, 4, 4: five different ones. The others get the first one's score at no cost."""
    _, search, pool = run(tmp_path, workers=workers, in_flight=workers)
    assert sorted(pool.scored) == [0, 1, 2, 4, 6]
    told = sorted(search.told, key=lambda r: r.number)
    assert [r.number for r in told] == list(range(8))
    assert [r.score for r in told] == [1 / (1 + s) for s in SEEDS]
    assert [r.reused for r in told] == [False, False, False, True, False, True, False, True]
    assert sum(r.cost for r in told) == 10


def test_workers_change_nothing_in_the_record(tmp_path):
    for workers in (1, 8):
        run(tmp_path / str(workers), workers=workers, in_flight=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "8")


def test_a_finished_run_is_answered_from_the_ledger(tmp_path):
    _, first, _ = run(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    spy, search, pool = run(tmp_path)
    assert pool.scored == []
    assert search.told == first.told
    assert [s for s in spy.steps if s[0] == "watched"] == [("watched", k) for k in range(8)]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.whole
@pytest.mark.parametrize("workers", [1, 3])
def test_death_at_any_step_and_another_call(tmp_path, workers):
    """For each step of the run: die there, run again. The record is the same, and only what flew is scored again."""
    script = {"workers": workers, "in_flight": workers, "seeds": (0, 1, 0, 2, 1)}
    whole, _, pool = run(tmp_path / "whole", **script)
    wanted = contents(tmp_path / "whole")
    assert len(pool.scored) == 3
    assert len(whole.steps) > 30
    for die_at in range(len(whole.steps)):
        folder = tmp_path / f"{die_at}"
        ledger, first = Ledger(storage_at(folder), "me"), FakePool(workers)
        with pytest.raises(KeyboardInterrupt):
            Spy(ledger, Script(script["seeds"], workers), first, die_at).run()
        ledger.close()
        kept = {
            r["number"]
            for r in read_table(storage_at(folder)).to_pylist()
            if r["event"] == "finished" and not r["reused"]
        }
        _, search, second = run(folder, **script)
        assert search.done
        assert contents(folder) == wanted
        assert not kept & set(second.scored)  # nothing that was finished is scored again
        assert len(set(first.scored) - kept) <= workers
        assert set(first.scored) | set(second.scored) == set(pool.scored)


def test_death_again_and_again(tmp_path):
    """Killed in every call a few steps after it went on, the run still ends, and ends the same."""
    run(tmp_path / "whole")
    for calls in itertools.count(1):
        try:
            run(tmp_path / "torn", die_at=2 * calls + 5)
            break
        except KeyboardInterrupt:
            continue
    assert calls > 3
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def test_a_partial_result_is_reused_where_it_answers_only(tmp_path):
    """Seed 3 scores 0.25. Under a bar of 0.5 it stops early; that answers bars from 0.25 on and nothing else."""
    bars = {0: 0.5, 1: 0.3, 2: 0.2, 3: 0.9, 4: None}
    _, search, pool = run(tmp_path, seeds=(3, 3, 3, 3, 3), bars=bars)
    assert pool.scored == [0, 2]
    assert [r.score for r in search.told] == [None, None, 0.25, None, 0.25]
    assert [r.reused for r in search.told] == [False, True, False, True, True]


def test_followers_of_a_flight_that_does_not_answer_are_scored(tmp_path):
    """As above, with all five in the air at once."""
    bars = {0: 0.5, 1: 0.3, 2: 0.2, 3: 0.9, 4: None}
    _, search, pool = run(tmp_path, seeds=(3, 3, 3, 3, 3), bars=bars, workers=5, in_flight=5)
    assert pool.scored == [0, 2]
    assert sorted(r.number for r in search.told) == list(range(5))


def test_a_failure_is_a_result(tmp_path):
    class Failing(FakePool):
        def wait(self):
            return [replace(r, status="failed", score=None, bound=None, complete=False, items=(), reason="boom")
                    for r in super().wait()]  # fmt: skip

    ledger, search, pool = Ledger(storage_at(tmp_path), "me"), Script(), Failing()
    evolve(search, pool, ledger, lambda c, r: None)
    ledger.close()
    assert [r.status for r in search.told] == ["failed"] * 8
    assert len(pool.scored) == 5
    _, again, pool = run(tmp_path)
    assert pool.scored == []
    assert again.told == search.told


def test_a_ledger_of_another_search_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(BadInput, match="candidate 0 of stage search"):
        run(tmp_path, seeds=(9, 9))


def test_several_results_at_once(tmp_path):
    class Batch(FakePool):
        def wait(self):
            return [r for _ in range(len(self.waiting)) for r in super(Batch, self).wait()]

    ledger, search, pool = Ledger(storage_at(tmp_path), "me"), Script(in_flight=4), Batch(4)
    evolve(search, pool, ledger, lambda c, r: None)
    ledger.close()
    assert sorted(r.number for r in search.told) == list(range(8))
    assert sorted(pool.scored) == [0, 1, 2, 4, 6]
