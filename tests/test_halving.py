"""Successive halving: nested rungs, who goes on, what the search inside hears, and that no item is paid twice."""

import os
import random
from dataclasses import replace

import numpy as np
import pytest
from test_search import BASE, EXPERTS, HALVING, build, ids, maker, simulate

from evolver.config import Budget
from evolver.config.reading import check_section
from evolver.errors import BadInput
from evolver.evaluation.scores.difference import estimate
from evolver.evaluation.scores.estimates import Estimates, first_unjudged
from evolver.evaluation.scores.irt import fit_items
from evolver.evaluation.scores.metrics import CLASS, ENDLESS, JUDGED
from evolver.evaluation.scores.scoring import Scale
from evolver.ledger import Ledger, read_table
from evolver.loop import evolve
from evolver.records import Candidate, Result
from evolver.records.order import item_order, reordered
from evolver.records.recipe import Expert
from evolver.search import SEARCHES
from evolver.search.base import Setup
from evolver.search.halving import Bracket, rungs
from evolver.storage import storage_at

COUNT = 40
ONE = Scale(("t",) * COUNT, {"t": 1.0}, {"t": JUDGED})
TPE = {"algorithm": "tpe", "startup": 4}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """These runs die of exceptions, not of power cuts."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def answers(recipe):
    """To all items, of a model of some ability that only the recipe decides."""
    draw = random.Random(recipe.id)
    ability = draw.random()
    return tuple(float(draw.random() < ability) for _ in range(COUNT))


def halving(estimates=None, experts=4, racing=False, **changes):
    """A halving search over items as above; changes go to its settings, ``candidates`` and ``items`` to its budget."""
    budget = {k: changes.pop(k) for k in ("candidates", "items") if k in changes} or {"candidates": 20}
    subset = changes.pop("subset", None)
    settings = {"algorithm": "halving", "of": TPE, "first": 8, "eta": 2, "batch": 4, **changes}
    typed = check_section(SEARCHES["halving"].settings, settings, "f", "search.")
    setup = Setup(
        EXPERTS[:experts],
        BASE,
        0,
        Budget(**budget),
        maker(experts),
        estimates or Estimates(ONE, 4),
        True,
        racing,
        subset=subset,
    )
    return SEARCHES["halving"].build(setup, typed)


class Pool:
    """Scores what is asked and not known, in blocks of 4; hands results back last first; dies when told to."""

    def __init__(self, workers=1, die_after=None):
        self.workers, self.die_after = workers, die_after
        self.waiting, self.scored = [], 0

    def free(self):
        return self.workers - len(self.waiting)

    def submit(self, candidate):
        self.waiting.append(candidate)

    def wait(self):
        if self.die_after is not None:
            self.die_after -= 1
            if self.die_after < 0:
                raise KeyboardInterrupt
        return [self.evaluate(self.waiting.pop())]

    def evaluate(self, candidate):
        stop = COUNT if candidate.question.limit is None else min(COUNT, -(-candidate.question.limit // 4) * 4)
        whole, order = answers(candidate.recipe), candidate.question.order
        items = whole if stop == COUNT else reordered(whole, order)[:stop]
        known = candidate.question.known
        assert reordered(whole, order)[: len(known)] == known
        self.scored += len(items) - len(candidate.question.known)
        score = ONE.score(items) if stop == COUNT else None
        return Result(
            candidate.number, candidate.recipe.id, "ok", score, ONE.bound(items), stop == COUNT, items,
            given=len(candidate.question.known), order=order,
        )  # fmt: skip

    def close(self):
        pass


def run(folder, search, pool):
    """The pairs of candidate and result that a run sees, by number."""
    seen, ledger = [], Ledger(storage_at(folder), "me")
    try:
        evolve(search, pool, ledger, lambda c, r: seen.append((c, r)))
    finally:
        ledger.close()
    return sorted(seen, key=lambda pair: pair[0].number)


def best(seen):
    return max((r.score, -c.number, c.recipe.id) for c, r in seen if r.complete and c.question.limit is None)


# --- The rungs.


def dev(count, block=1):
    return Estimates(Scale(("t",) * count, {"t": 1.0}, {"t": JUDGED}), block)


def test_rungs_are_nested_parts_in_whole_blocks_and_end_with_all():
    assert rungs(30, 3, dev(1000)) == (30, 90, 270, 810, None)
    assert rungs(30, 3, dev(1000, 64)) == (64, 192, 576, None)
    assert rungs(30, 3, dev(90)) == (30, None)
    assert rungs(1, 2, dev(2)) == (1, None)
    with pytest.raises(
        BadInput,
        match=r"search\.first: 30 items, rounded up to blocks of 64 .* are all of the 40 dev items; write",
    ):
        rungs(30, 3, dev(40, 64))


def climb(bracket, table):
    """Everything that a bracket asks, as {place: limits}, where each place answers as in the table."""
    asked = {place: [] for place in range(len(table))}
    while not bracket.done:
        for place in bracket.take(99):
            limit = bracket.limits[bracket.rung]
            items = tuple(table[place][:limit])
            asked[place].append(limit)
            bracket.tell(place, Result(0, "r", "ok", 0.5, 0.5, len(items) == len(table[place]), items))
    return asked


def bracket(count, limits, eta):
    candidates = [Candidate(k, Expert(f"{k}", f"{k}"), "x") for k in range(count)]
    return Bracket(candidates, limits, eta, lambda result: sum(result.items) / len(result.items))


def test_the_best_go_on_by_hand():
    """Six candidates, rungs of 1, 2 and 4 items, half go on: 6, 3, 1. Place 5 is the best of all, and not at first."""
    table = [[1, 0, 0, 0], [0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1], [0, 1, 1, 1]]
    assert climb(bracket(6, (1, 2, None), 2), table) == {0: [1, 2], 1: [1], 2: [1, 2, None], 3: [1], 4: [1, 2], 5: [1]}


def test_one_that_is_alone_is_scored_at_once():
    assert climb(bracket(3, (1, 2, 3, None), 3), [[0] * 4, [1] * 4, [0] * 4]) == {0: [1], 1: [1, None], 2: [1]}
    assert climb(bracket(1, (1, 2, 3, None), 3), [[0] * 4]) == {0: [None]}


def test_those_compared_are_compared_on_the_same_items():
    """Place 0 is known in full. Its first item counts and it loses; its other items would have won."""
    of = bracket(2, (1, None), 2)
    assert of.take(9) == [0, 1]
    of.tell(0, Result(0, "r", "ok", 0.75, 0.75, True, (0.0, 1.0, 1.0, 1.0), reused=True))
    of.tell(1, Result(1, "s", "ok", None, 1.0, False, (0.5,)))
    assert of.take(9) == [1]
    assert of.costs == [0, 1]
    assert (of.results[0].items, of.results[0].complete, of.results[0].score) == ((0.0,), False, None)


def test_those_that_fail_do_not_go_on():
    of = bracket(4, (1, 2, None), 2)
    failed = Result(0, "r", "failed", reason="boom")
    for place in of.take(9):
        of.tell(place, replace(failed, status="ok", items=(0.0,)) if place == 3 else failed)
    assert of.take(9) == [3]
    of.tell(3, failed)
    assert of.done


def test_the_last_rung_is_all_items_and_one_of_each_batch_reaches_it(tmp_path):
    """Batches of 4 and rungs of 8, 16, 32 and all 40: 4, 2, then one alone at once."""
    seen = run(tmp_path, halving(), Pool())
    assert len({c.recipe.id for c, _ in seen}) == 20
    assert [c.question.limit for c, _ in seen] == [8, 8, 8, 8, 16, 16, None] * 5
    for number in range(0, len(seen), 7):
        batch = seen[number : number + 7]
        order = sorted(batch[:4], key=lambda pair: (-sum(answers(pair[0].recipe)[:8]), pair[0].number))
        assert {c.recipe.id for c, _ in batch[4:6]} == {c.recipe.id for c, _ in order[:2]}
        order = sorted(batch[4:6], key=lambda pair: (-sum(answers(pair[0].recipe)[:16]), pair[0].number))
        assert batch[6][0].recipe.id == order[0][0].recipe.id
    assert not any(c.question.bar for c, _ in seen)


# --- What it costs.


def test_no_item_is_paid_twice(tmp_path):
    """A batch costs 4 · 8 + 2 · 8 + 24 = 72 items: what the longest evaluation of each candidate has."""
    search, pool = halving(), Pool(4)
    seen = run(tmp_path, search, pool)
    longest = {}
    for c, r in seen:
        longest[c.recipe.id] = max(longest.get(c.recipe.id, 0), len(r.items))
    assert pool.scored == sum(longest.values()) == sum(r.cost for _, r in seen) == 5 * 72
    assert search.inner._progress.items == pool.scored


def test_the_budget_of_items_ends_it_after_the_batch_that_spends_it(tmp_path):
    for budget, batches in ((1, 1), (72, 1), (73, 2), (144, 2), (145, 3)):
        pool = Pool(3)
        run(tmp_path / f"{budget}", halving(items=budget), pool)
        assert pool.scored == 72 * batches


@pytest.mark.parametrize("of", ["tpe", "cmaes", "evolver"])
def test_the_budget_of_candidates_is_that_of_the_search_inside(of):
    inside = {"algorithm": of, "mode": "generational"} if of == "evolver" else {"algorithm": of}
    for count in (1, 6, 13):
        asked = simulate(build(HALVING | {"of": inside}, candidates=count), 4, 1)
        assert len({c.recipe.id for c in asked}) == count


@pytest.mark.whole
def test_a_raised_budget_goes_on(tmp_path):
    """The last batch of the first run was cut short: of 2 candidates, one was scored in full that now may not be."""
    for first in (5, 6, 7):
        run(tmp_path / f"{first}", halving(candidates=first), Pool())
        raised, once = (run(tmp_path / f"{name}", halving(), Pool()) for name in (first, f"once {first}"))
        assert [(c.number, c.recipe.id, c.question.limit) for c, _ in raised] == [
            (c.number, c.recipe.id, c.question.limit) for c, _ in once
        ]
        assert best(raised) == best(once)


# --- What the search inside hears.


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["mean", "p-irt", "gp-irt", "difference"])
def test_the_search_inside_hears_scores_and_estimates(tmp_path, kind):
    """Of every candidate once: what the first of its items say, by models that were known before its batch began."""
    estimates = Estimates(ONE, 4)
    for expert in EXPERTS:
        estimates.learn(complete(expert, answers(expert)))
    search = halving(estimates, estimate=kind)
    seen = run(tmp_path, search, Pool())
    models = [answers(e) for e in EXPERTS]
    known = dict(zip([e.id for e in EXPERTS], models, strict=True))
    told = [t.value for t in search.inner.study.trials]
    assert len(told) == 20
    for batch in range(5):
        model = fit_items([row for _, row in sorted(known.items())], COUNT)
        part = seen[7 * batch : 7 * batch + 7]
        last = {c.recipe.id: r for c, r in part}
        for place, (c, _) in enumerate(part[:4]):
            result = last[c.recipe.id]
            if kind == "difference":
                rows = np.array([row for _, row in sorted(known.items())])
                places = item_order(f"0:batch:{batch + 1}", COUNT)[: len(result.items)]
                wanted = estimate(ONE, rows, places, np.array([result.items])).value[0]
            else:
                wanted = np.mean(result.items) if kind == "mean" else model.estimate(result.items, ONE, kind)
            assert told[4 * batch + place] == pytest.approx(result.score if result.complete else wanted, abs=1e-6)
        known |= {i: r.items for i, r in last.items() if r.complete}
    ledger = [r for r in read_table(storage_at(tmp_path)).to_pylist() if r["event"] == "finished"]
    assert all((r["score"] is not None) == r["complete"] == (len(r["items"]) == COUNT) for r in ledger)


def test_what_is_known_from_elsewhere_costs_nothing_and_is_told_as_it_is(tmp_path):
    """The experts, which the baselines scored in full."""
    estimates, ledger = Estimates(ONE, 4), Ledger(storage_at(tmp_path), "me")
    for number, expert in enumerate(EXPERTS):
        candidate = Candidate(number, expert, "baseline", stage="baseline")
        result = replace(Pool().evaluate(candidate), stage="baseline")
        ledger.write_result(candidate, result)
        estimates.learn(result)
    ledger.close()
    search = halving(estimates, of={"algorithm": "evolver", "mode": "generational"}, candidates=8)
    seen = run(tmp_path, search, Pool(2))
    start = [(c, r) for c, r in seen if c.recipe in EXPERTS]
    assert {c.recipe for c, _ in start} == set(EXPERTS[:4])
    assert all(c.question.limit is None and r.reused and r.complete for c, r in start)
    assert search.inner._progress.items == 72
    before = {e.id: np.mean(answers(e)) for e in EXPERTS}
    for expert, member, (_, score) in zip(EXPERTS, search.inner.population, search.inner.standings, strict=False):
        assert score >= before[expert.id] if member == expert else score > before[expert.id]


def test_failures_are_told_as_such():
    def reply(candidate, _):
        return Result(candidate.number, candidate.recipe.id, "failed", reason="boom")

    search = halving()
    assert len(simulate(search, 3, 1, reply=reply)) == 20
    assert all(t.value is None for t in search.inner.study.trials)


@pytest.mark.parametrize("racing", [True, False])
def test_nothing_is_stopped_early_inside(racing):
    of = {"algorithm": "evolver", "mode": "generational"}
    asked = simulate(halving(of=of, racing=racing), 4, 1)
    assert len(asked) > 20
    assert all(c.question.bar is None and c.question.rival == () for c in asked)


# --- The same whatever happens.


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["mean", "gp-irt", "difference"])
def test_workers_change_nothing(tmp_path, kind):
    runs = [run(tmp_path / f"{n}", halving(estimate=kind), Pool(n)) for n in (1, 3, 8)]
    alone = [(*ids([c]), c.question.limit, replace(r, worker="")) for c, r in runs[0]]
    for other in runs[1:]:
        assert [(*ids([c]), c.question.limit, replace(r, worker="")) for c, r in other] == alone


@pytest.mark.whole
@pytest.mark.parametrize("of", [TPE, {"algorithm": "evolver", "mode": "generational"}])
def test_killed_again_and_again_it_ends_the_same(tmp_path, of):
    changes = {"of": of, "estimate": "p-irt", "candidates": 12}
    whole, pool = run(tmp_path / "whole", halving(**changes), Pool(3)), Pool(3)
    run(tmp_path / "whole", halving(**changes), pool)
    assert pool.scored == 0
    seen = None
    for _ in range(20):
        try:
            seen = run(tmp_path / "torn", halving(**changes), Pool(3, die_after=2))
            break
        except KeyboardInterrupt:
            continue
    assert seen is not None
    assert [(c.number, c.recipe.id, r.items) for c, r in seen] == [(c.number, c.recipe.id, r.items) for c, r in whole]
    assert best(seen) == best(whole)


def test_a_rung_is_in_the_air_at_once():
    search = halving()
    first = search.ask(99)
    assert [c.question.limit for c in first] == [8] * 4
    assert search.ask(99) == []
    for candidate in first:
        search.tell(Pool().evaluate(candidate))
    assert [c.question.limit for c in search.ask(99)] == [16] * 2
    with pytest.raises(ValueError, match="the search does not wait for a result"):
        halving().tell(Result(0, "r", "ok"))


# --- Estimates.


def complete(recipe, items):
    return Result(0, recipe.id, "ok", sum(items) / len(items), None, True, tuple(items))


def test_a_mean_weighs_the_tasks_that_were_met():
    """a: weight 3, items 1, 0; b: weight 1, item 1. Of a alone: 0.5; of both: (3 · 0.5 + 1) / 4."""
    of = Estimates(Scale(("a", "a", "b", "b"), {"a": 3.0, "b": 1.0}, {"a": JUDGED, "b": JUDGED}), 1)
    assert of.items == 4
    assert of.estimate("mean", [1.0, 0.0]) == 0.5
    assert of.estimate("mean", [1.0, 0.0, 1.0]) == 0.625
    assert of.estimate("p-irt", [1.0, 0.0, 1.0]) == 0.625  # nobody is known yet


def test_the_order_of_what_was_learnt_does_not_show():
    found = set()
    for seed in range(3):
        of = Estimates(ONE, 1)
        for expert in random.Random(seed).sample(EXPERTS, len(EXPERTS)):
            of.learn(complete(expert, answers(expert)))
        of.learn(Result(0, "part", "ok", None, 1.0, False, (1.0,) * 9))
        of.learn(Result(0, "none", "failed"))
        found.add(of.estimate("p-irt", answers(BASE)[:9]))
    assert len(found) == 1
    assert found == {round(fit_items([answers(e) for e in EXPERTS], COUNT).estimate(answers(BASE)[:9], ONE), 6)}


def test_estimates_of_items_that_are_not_judged_alone_are_refused():
    for metric in (ENDLESS, CLASS["mcc"]):
        of = Estimates(Scale(("t",) * COUNT, {"t": 1.0}, {"t": metric}, (0.0,) * COUNT), 1)
        assert first_unjudged(of.scale) == "t"
        halving(of)
        with pytest.raises(BadInput, match=r"search\.estimate: p-irt needs items .* and t has none; write mean"):
            halving(of, estimate="p-irt")
    assert first_unjudged(ONE) is None


# --- What cannot be halved.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"of": {"algorithm": "evolver"}}, r"^search\.of\.mode: sequential .* write generational\.$"),
        (
            {"of": TPE | {"in_flight": 4}},
            r"^search\.of\.in_flight: inside halving, 4 candidates are evaluated at the same time; leave in_flight out",
        ),
        (
            {"of": HALVING | {"of": TPE}},
            r"^search\.of\.algorithm: 'halving' cannot be the inner search of halving; known",
        ),
        ({"of": {}}, r"^search\.of\.algorithm: None cannot be the inner search of halving"),
        ({"of": {"algorithm": "tpe", "statrup": 3}}, r"^search\.of: statrup: unknown key; did you mean 'startup'"),
        ({"of": {"algorithm": "evolver", "mode": "generational", "strategy": "rand/2"}}, r"^search\.of\.strategy"),
        (
            {"first": 40},
            r"^search\.first: 40 items, .* are all of the 40 dev items; write a smaller first or block_items, or",
        ),
        ({"batch": 1}, r"search\.batch"),
        ({"estimate": "median"}, r"search\.estimate"),
    ],
)
def test_what_cannot_work_is_refused(changes, says):
    with pytest.raises(BadInput, match=says):
        halving(**changes)


@pytest.mark.parametrize(("subset", "estimate", "orders"), [
    (None, "mean", 1), ("fixed", "difference", 1), ("rotate", "mean", 5), (None, "difference", 5),
    ("rotate", "gp-irt", 5),
])  # fmt: skip
def test_every_batch_has_an_order_of_its_own_where_the_subset_rotates(subset, estimate, orders):
    search = halving(estimate=estimate, subset=subset)
    asked = simulate(search, 4, 1, reply=lambda candidate, _: Pool().evaluate(candidate))
    numbers = 4 * len(search.limits)
    each = [{c.question.order for c in asked if c.number // numbers == batch} for batch in range(5)]
    assert all(len(found) == 1 for found in each)
    assert len(set.union(*each)) == orders
    assert (set.union(*each) == {""}) == (orders == 1)


def test_a_complete_result_of_another_order_is_cut_in_the_order_of_the_batch():
    """The ledger may know a model in full that a rung asks for a part of."""
    whole = answers(BASE)
    result = Result(0, BASE.id, "ok", ONE.score(whole), 0.0, True, whole, order="earlier")
    made = Bracket([Candidate(0, BASE, "x"), Candidate(1, BASE, "x")], (8, None), 2, lambda r: 0.0, "mine")
    made.take(2)
    made.tell(0, result)
    assert made.results[0].items == reordered(whole, "mine")[:8]
    assert (made.results[0].order, made.results[0].complete) == ("mine", False)


def test_parts_of_another_order_are_no_answer(tmp_path):
    """What was scored along one order is no first part of another one, unless all of it was."""
    ledger, whole = Ledger(storage_at(tmp_path), "me"), answers(BASE)
    part = Result(0, BASE.id, "ok", None, 1.0, False, reordered(whole, "one")[:8], order="one")
    ledger.write_result(Candidate(0, BASE, "x").asking(limit=8, order="one"), part)
    again = Candidate(1, BASE, "x")
    assert ledger.answer(again.asking(limit=8, order="one")).items == part.items
    assert ledger.answer(again.asking(limit=8, order="two")) is None
    assert ledger.with_known_items(again.asking(order="two")).question.known == ()
    assert ledger.with_known_items(again.asking(order="one")).question.known == part.items
    ledger.close()
    ledger = Ledger(storage_at(tmp_path), "me")
    assert ledger.answer(again.asking(limit=8, order="two")) is None
    assert ledger.answer(again.asking(limit=8, order="one")).order == "one"
    ledger.close()
