"""Running ahead: the search sees the same, the workers are busy, and what was guessed wrong is told apart."""

import heapq
import os
import random
from functools import partial

import pytest
from test_search import ORDERED, build, experts_for

from evolver.ledger import Ledger, read_table, result_of
from evolver.loop import evolve
from evolver.records import Result
from evolver.runs.history import history_of
from evolver.search.ahead import Guessable, ahead
from evolver.storage import storage_at

pytestmark = pytest.mark.whole

SEQUENTIAL = [n for n in ORDERED if n.startswith("evolver sequential")]
ITEMS = 10


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """These runs die of exceptions, not of power cuts; hundreds of them are faster so."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def accepted(candidate, share):
    """Whether a candidate is better than its bar: a share of all is, and its recipe decides."""
    return random.Random(candidate.recipe.id).random() < share


def scored(candidate, share):
    """What a worker says: the bar and a little more, or stopped early below it; some candidates fail."""
    draw = random.Random(candidate.recipe.id + "score")
    if candidate.question.bar is None:
        score = draw.random()
    elif accepted(candidate, share):
        score = candidate.question.bar + 0.01 * draw.random()
    elif draw.random() < 0.1:
        return Result(candidate.number, candidate.recipe.id, "failed", reason="boom")
    else:
        known = len(candidate.question.known)
        items = (*candidate.question.known, *[0.0] * max(1, 5 - known))[:ITEMS]
        return Result(
            candidate.number, candidate.recipe.id, "ok", None, candidate.question.bar, False, items, given=known
        )
    return Result(candidate.number, candidate.recipe.id, "ok", score, score, True, (score,) * ITEMS)


class Simulated:
    """Workers that take their time by a clock of their own; ``die_after`` results the driver is killed."""

    def __init__(self, workers, share=0.1, seconds=lambda candidate: 1.0, die_after=None):
        self.workers, self.share, self.seconds, self.die_after = workers, share, seconds, die_after
        self.now, self._flying, self.scored, self.busy = 0.0, [], [], 0.0

    def free(self):
        return self.workers - len(self._flying)

    def submit(self, candidate):
        assert self.free() > 0
        took = self.seconds(candidate)
        self.busy += took
        heapq.heappush(self._flying, (self.now + took, len(self.scored), candidate))
        self.scored.append(candidate)

    def wait(self):
        if self.die_after == 0:
            raise KeyboardInterrupt
        if self.die_after is not None:
            self.die_after -= 1
        self.now, _, candidate = heapq.heappop(self._flying)
        return [scored(candidate, self.share)]

    def close(self):
        pass


def uneven(candidate):
    return random.Random(candidate.recipe.id + "seconds").lognormvariate(0, 0.5)


def run(folder, settings, pool, guessing=True, arrival=False, **budget):
    """Results in the order in which they were told, and the ledger."""
    budget, told = budget or {"candidates": 40}, []
    search = build(settings, experts=experts_for(settings), arrival=arrival, **budget)
    ledger = Ledger(storage_at(folder), "me")
    try:
        guesses = partial(ahead, search) if guessing and isinstance(search, Guessable) else None
        evolve(search, pool, ledger, lambda c, r: told.append((c, r)), guesses)
    finally:
        ledger.close()
    return told, ledger


def history(folder, told):
    rows = read_table(storage_at(folder)).to_pylist(maps_as_pydicts="strict")
    return history_of(None, told, [result_of(r) for r in rows if r["event"] == "guessed"])


def by_number(told):
    return sorted(told, key=lambda pair: pair[0].number)


def finished(folder):
    rows = [r for r in read_table(storage_at(folder)).to_pylist() if r["event"] == "finished"]
    return [tuple(str(r[k]) for k in ("number", "recipe_id", "score", "items", "reused", "bar", "given")) for r in rows]


@pytest.mark.parametrize("name", ORDERED)
@pytest.mark.parametrize("workers", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_the_search_sees_the_same(tmp_path, name, workers):
    plain, _ = run(tmp_path / "plain", ORDERED[name], Simulated(1), guessing=False)
    pool = Simulated(workers, seconds=uneven)
    told, _ = run(tmp_path / "ahead", ORDERED[name], pool)
    assert by_number(told) == by_number(plain)
    assert sorted(finished(tmp_path / "ahead")) == sorted(finished(tmp_path / "plain"))


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_an_end_by_scored_items_is_the_same_end(tmp_path, name):
    plain, _ = run(tmp_path / "plain", ORDERED[name], Simulated(1), guessing=False, items=150)
    told, _ = run(tmp_path / "ahead", ORDERED[name], Simulated(8, seconds=uneven), items=150)
    assert by_number(told) == by_number(plain)


@pytest.mark.parametrize("merger", [{}, {"merger": {"method": "simple"}}], ids=["alone", "merged"])
def test_eight_workers_are_worth_four_and_more(tmp_path, merger):
    """Sequential by nature, 400 candidates, of which a tenth is accepted."""
    settings = {"algorithm": "evolver", "generations": 100} | merger
    took = {}
    for workers in (1, 8):
        pool = Simulated(workers)
        told, _ = run(tmp_path / str(workers), settings, pool, candidates=400)
        took[workers] = pool.now
    assert took[1] / took[8] >= 4
    wasted = history(tmp_path / "8", told).wasted
    assert 0 < len(wasted) <= len(pool.scored) - len([r for _, r in told if not r.reused])


def test_killed_again_and_again(tmp_path):
    """The outcome is the undisturbed run's, and no result that was recorded is scored a second time."""
    settings = ORDERED["evolver sequential merger evolver"]
    plain, _ = run(tmp_path / "plain", settings, Simulated(1), guessing=False)
    seen, kills = [], 0
    while True:
        pool = Simulated(6, seconds=uneven, die_after=1 + kills % 5)
        recorded = read_table(storage_at(tmp_path / "killed")).to_pylist() if (tmp_path / "killed").exists() else []
        known = {(r["number"], r["recipe_id"]) for r in recorded if r["event"] in ("finished", "guessed")}
        try:
            told, _ = run(tmp_path / "killed", settings, pool)
            break
        except KeyboardInterrupt:
            kills += 1
        finally:
            seen += [c for c in pool.scored if (c.number, c.recipe.id) in known]
    assert kills > 5
    assert by_number(told) == by_number(plain)
    assert seen == []


def test_what_was_guessed_wrong_is_told_apart(tmp_path):
    settings = ORDERED["evolver sequential evolver"]
    told, _ = run(tmp_path, settings, Simulated(8, share=0.4))
    asked = {(c.number, c.recipe.id) for c, _ in told}
    rows = [r for r in read_table(storage_at(tmp_path)).to_pylist() if r["event"] == "guessed"]
    wrong = {(r["number"], r["recipe_id"]) for r in rows} - asked
    assert wrong
    assert {(r.number, r.recipe_id) for r in history(tmp_path, told).wasted} == wrong


def test_nothing_is_guessed_where_nothing_can_be_assumed(tmp_path):
    told, _ = run(tmp_path, ORDERED["tpe"], Simulated(8))
    assert all(r["event"] != "guessed" for r in read_table(storage_at(tmp_path)).to_pylist())
    assert history(tmp_path, told).wasted == ()


@pytest.mark.parametrize("name", ["tpe 4", "evolver steady evolver", "evolver steady merger evolver"])
def test_results_by_arrival_go_on_exactly(tmp_path, name):
    """Killed and called again, it asks for what it had asked for: a ledger of another search would be refused."""
    settings, kills = ORDERED[name] | ({"generations": 20} if name.startswith("evolver") else {}), 0
    while True:
        pool = Simulated(3, seconds=uneven, die_after=1 + kills % 5)
        try:
            told, _ = run(tmp_path, settings, pool, guessing=False, arrival=True)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 5
    arrived = [r.number for _, r in sorted(told, key=lambda pair: pair[1].rank)]
    assert arrived != sorted(arrived) == list(range(40))
    again, _ = run(tmp_path, settings, Simulated(1, die_after=0), guessing=False, arrival=True)
    assert by_number(again) == by_number(told)


@pytest.mark.parametrize("name", ["tpe", "cmaes", "nsga2"])
def test_what_stands_on_a_study_cannot_be_guessed(name):
    """A copy would share the study: what is asked of the copy would change what the original asks for."""
    assert not isinstance(build(ORDERED[name]), Guessable)


@pytest.mark.parametrize(
    "name", [n for n in ORDERED if isinstance(build(ORDERED[n], experts=experts_for(ORDERED[n])), Guessable)]
)
def test_a_twin_leaves_the_original_as_it_is(name):
    one, other = (build(ORDERED[name], experts=experts_for(ORDERED[name]), candidates=30) for _ in range(2))
    while not one.done:
        twin = one.twin()
        for candidate in twin.ask(3):
            twin.tell(scored(candidate, 0.5))
        asked = one.ask(2)
        assert asked == other.ask(2)
        for candidate in asked:
            for search in (one, other):
                search.tell(scored(candidate, 0.5))
    assert other.done
