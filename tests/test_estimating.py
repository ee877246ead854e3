"""Searches on a part of the dev items: what they hear, who is scored in full, and that nothing changes how it ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_halving import COUNT, ONE, Pool, answers, complete, run
from test_search import BASE, EXPERTS, maker, simulate
from toys import rows, run_here

from evolver.config import Budget
from evolver.config.evaluation import EstimateSettings
from evolver.config.reading import check_section, config_at
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.evaluation.scores.difference import estimate
from evolver.evaluation.scores.estimates import Estimates
from evolver.records import Result
from evolver.records.order import item_order
from evolver.search import SEARCHES
from evolver.search.base import Setup
from evolver.search.estimating import Estimating

TPE = {"algorithm": "tpe", "startup": 4}
GENERATIONS = {"algorithm": "evolver", "mode": "generational"}


def estimated(of=TPE, candidates=12, kind="difference", items=8, count=3, subset=None):
    estimates = Estimates(ONE, 4)
    for expert in EXPERTS[:4]:
        estimates.learn(complete(expert, answers(expert)))
    setup = Setup(EXPERTS[:4], BASE, 0, Budget(candidates=candidates), maker(4), estimates, False, subset=subset)
    typed = check_section(SEARCHES[of["algorithm"]].settings, of, "f", "search.")
    inner = SEARCHES[of["algorithm"]].build(setup, typed)
    return Estimating(inner, setup, EstimateSettings(items=items, kind=kind), count)


@pytest.mark.parametrize("kind", ["mean", "difference"])
def test_the_search_hears_estimates_and_the_best_of_them_are_scored_in_full(tmp_path, kind):
    search = estimated(kind=kind)
    seen = run(tmp_path, search, Pool())
    parts = [(c, r) for c, r in seen if c.number % 2 == 0]
    told = [trial.value for trial in search.inner.study.trials]
    assert [c.number for c, _ in parts] == [2 * k for k in range(12)]
    known = np.array([answers(e) for e in sorted(EXPERTS[:4], key=lambda e: e.id)])
    for (candidate, result), heard in zip(parts, told, strict=True):
        assert candidate.question.limit == len(result.items) == 8
        assert candidate.question.order == ("" if kind == "mean" else f"0:estimate:{candidate.number // 2}")
        places = item_order(candidate.question.order, COUNT)[:8]
        wanted = np.mean(result.items)
        if kind == "difference":
            wanted = estimate(ONE, known, places, np.array([result.items])).value[0]
        assert heard == pytest.approx(wanted, abs=1e-6)
    whole = [(c, r) for c, r in seen if c.number % 2]
    assert {c.recipe.id for c, _ in whole} == {parts[k][0].recipe.id for k in np.argsort(told, kind="stable")[::-1][:3]}
    assert all(r.complete and r.given == 8 and r.items == answers(c.recipe) for c, r in whole)
    assert search.total == 15


def test_a_generation_meets_the_same_items_and_the_next_one_others():
    asked = simulate(estimated(GENERATIONS, candidates=13), 4, 1)
    orders = [c.question.order for c in asked if c.number % 2 == 0]
    assert [len(set(orders[k : k + 4])) for k in (4, 8)] == [1, 1]
    assert len(set(orders[4:])) == 3
    fixed = simulate(estimated(GENERATIONS, candidates=13, subset="fixed"), 4, 1)
    assert {c.question.order for c in fixed} == {""}
    assert all(c.question.bar is None and c.question.rival == () for c in asked)


def test_baselines_that_it_asks_for_cost_nothing():
    asked = simulate(estimated(GENERATIONS, candidates=9), 4, 1)
    assert [c.question.limit for c in asked if c.recipe in EXPERTS] == [None] * 4


@pytest.mark.whole
@pytest.mark.parametrize("of", [TPE, GENERATIONS])
def test_workers_kills_and_budgets_change_nothing(tmp_path, of):
    whole = run(tmp_path / "1", estimated(of), Pool(1))
    for workers in (2, 8):
        assert named(run(tmp_path / f"{workers}", estimated(of), Pool(workers))) == named(whole)
    seen = None
    for _ in range(20):
        try:
            seen = run(tmp_path / "torn", estimated(of), Pool(3, die_after=2))
            break
        except KeyboardInterrupt:
            continue
    assert named(seen) == named(whole)
    run(tmp_path / "raised", estimated(of, candidates=7), Pool(1))
    raised = run(tmp_path / "raised", estimated(of), Pool(1))
    assert [(c.number, c.recipe.id) for c, _ in raised] == [(c.number, c.recipe.id) for c, _ in whole]


def named(seen):
    return [(c.number, c.recipe.id, c.question.limit, replace(r, worker="", rank=None)) for c, r in seen]


def test_all_that_fail_are_never_scored_in_full():
    def reply(candidate, _):
        return Result(candidate.number, candidate.recipe.id, "failed", reason="boom")

    search = estimated()
    assert len(simulate(search, 3, 1, reply=reply)) == 12
    assert search.done


@pytest.mark.whole
def test_a_whole_run_on_a_part_of_the_items(make_config, tmp_path):
    changes = {
        "search": TPE, "evaluation.estimate": {"items": 8}, "finalists": {"count": 2},
        "evaluation.tasks": [{"task": "toy", "dev": 24, "select": 12, "report": 12}],
    }  # fmt: skip
    folder = run_here(make_config(tmp_path, changes), tmp_path / "results")
    found = [r for r in rows(folder).values() if r["stage"] == "search"]
    parts = [len(r["items"]) for r in found if r["number"] % 2 == 0]
    assert parts == [8] * 9
    assert sum(r["number"] % 2 for r in found) == 2
    finals = [r for r in rows(folder).values() if r["stage"] == "select" and r["label"].startswith("candidate")]
    assert len(finals) == 2
    report = (folder / "report.md").read_text()
    assert "Each candidate was scored on 8 of the dev items, and the search saw estimates without bias" in report
    assert "Of 7 more candidates, estimates decided that they do not come to the finals." in report


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation.estimate": {"items": 40}}, r"evaluation\.estimate\.items: 40 items, rounded up to blocks of 8"),
        ({"evaluation.racing": 0.1}, r"evaluation\.estimate: .*evaluation\.racing needs them before"),
        ({"search": {"algorithm": "halving", "of": TPE}}, r"evaluation\.estimate: .*search\.algorithm: halving needs"),
        ({"budget.target": 0.5}, r"evaluation\.estimate: .*budget\.target needs them"),
        ({"constraints": [{"task": "toy", "drop": 2}]}, r"evaluation\.estimate: .*constraints needs them"),
        (
            {"evaluation.tasks": [{"task": "yesno", "metric": "mcc", "dev": 20, "report": 9}]},
            r"evaluation\.estimate\.kind: difference needs items with scores of their own",
        ),
    ],
)
def test_what_cannot_be_estimated_is_refused(make_config, tmp_path, changes, said):
    file = make_config(tmp_path, {"evaluation.estimate": {"items": 8}, **changes})
    with pytest.raises(BadInput, match=said):
        prepare(config_at(file))
