"""Estimates of each task on a part of the items, and searches by several objectives that go by them."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from scipy import stats
from test_irt import simulated
from test_search import BASE, EXPERTS, maker, simulate

from evolver.config import Budget
from evolver.config.evaluation import EstimateSettings, EvaluationSettings
from evolver.config.reading import check_section, config_at
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.evaluation.scores.difference import predictor_of
from evolver.evaluation.scores.estimates import Estimates
from evolver.evaluation.scores.irt import fit_items
from evolver.evaluation.scores.metrics import JUDGED
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Result
from evolver.records.objective import Objective, values_of
from evolver.records.order import item_order, reordered
from evolver.report.text import as_seen
from evolver.search import SEARCHES
from evolver.search.base import Setup
from evolver.search.estimating import Estimating
from evolver.search.front import front
from evolver.search.halving import Halving, HalvingSettings

KINDS = ("mean", "difference", "p-irt", "gp-irt", "mp-irt")
WEIGHTS = {"a": 1.0, "b": 3.0, "c": 2.0}
COUNT = 48
SCALE = Scale(tuple("abbc"[k % 4] for k in range(COUNT)), WEIGHTS, dict.fromkeys(WEIGHTS, JUDGED))
GROUPS = (Objective("ab", {"a": 0.25, "b": 0.75}), Objective("c", {"c": 1.0}))


def learnt(scale, rows, experts=2):
    """Estimates that know these answers to all items; the first of them are the experts'."""
    found = Estimates(scale, 4)
    found.experts = tuple(f"m{k:02}" for k in range(experts))
    for k, row in enumerate(rows):
        found.learn(Result(k, f"m{k:02}", "ok", scale.score(row), None, True, tuple(row)))
    return found


def by_difference(rows, places, given):
    """The equation of the estimator with one fit to the scored items outside of a fold, task by task."""
    tasks = np.array(SCALE.tasks)
    made, seen, folds = predictor_of(SCALE, np.array(rows)), tasks[places], np.empty(len(places), int)
    count = min(5, *(int((seen == t).sum()) for t in WEIGHTS))
    for t in WEIGHTS:
        folds[seen == t] = np.arange((seen == t).sum()) % count
    total = dict.fromkeys(WEIGHTS, 0.0)
    for fold in range(count):
        inside = {int(p): float(y) for p, y, f in zip(places, given, folds, strict=True) if f == fold}
        others = {int(p): float(y) for p, y, f in zip(places, given, folds, strict=True) if f != fold}
        predicted = made.predict(np.array([*others]), np.array([[*others.values()]]))[0]
        for t in WEIGHTS:
            own = [p for p in inside if tasks[p] == t]
            rest = [p for p in range(COUNT) if tasks[p] == t and p not in others]
            value = sum(y for p, y in others.items() if tasks[p] == t) + sum(predicted[p] for p in rest)
            value += len(rest) / len(own) * sum(inside[p] - predicted[p] for p in own)
            total[t] += value / (tasks == t).sum() * len(own) / (seen == t).sum()
    return total


def by_items(rows, given, kind):
    """p, or what a blend makes of it, in the place of the items without an answer, with abilities at the task alone."""
    order, found = np.array(item_order("other", COUNT)), {}
    for t in WEIGHTS:
        own = np.flatnonzero(np.array(SCALE.tasks) == t)
        table = np.array(rows)[:, own]
        fitted = fit_items(table.tolist(), len(own))
        along = [int(np.flatnonzero(own == place)[0]) for place in order if place in own]
        seen = [y for place, y in zip(order, given, strict=False) if place in own]
        model, n, size, share, prior = fitted.reordered(along), len(seen), len(own), 0.0, (0.0, 1.0)
        if kind == "mp-irt":
            known = [fitted.ability(row) for row in table[:2]]
            prior = (np.mean(known), np.hypot(*known) / 2)
        p = 1 / (1 + np.exp(model.difficulty - model.discrimination * model.ability(seen, *prior)))
        if kind == "gp-irt":
            abilities = [model.ability(row[:n]) for row in model.answers]
            said = [1 / (1 + np.exp(model.difficulty - model.discrimination * x)) for x in abilities]
            beta = np.mean([abs(y[n:].mean() - q[n:].mean()) for y, q in zip(model.answers, said, strict=True)])
            spread = np.mean([y.var() for y in model.answers]) / n * (1 - n / size)
            share = beta**2 / (beta**2 + spread)
        mean = np.mean(seen)
        found[t] = share * mean + (1 - share) * (n / size * mean + (1 - n / size) * p[n:].mean())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_of_each_task_is_that_of_its_equation(kind):
    _, rows = simulated(9, COUNT, 3)
    given = reordered(rows[8], "other")[:21]
    found = learnt(SCALE, rows[:8]).estimate_tasks(kind, given, "other")
    places = np.array(item_order("other", COUNT)[:21])
    if kind == "mean":
        seen = np.array(SCALE.tasks)[places]
        wanted = {t: np.mean(np.array(given)[seen == t]) for t in WEIGHTS}
    elif kind == "difference":
        wanted = by_difference(rows[:8], places, given)
    else:
        wanted = by_items(rows[:8], given, kind)
    assert found == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [3, 13, COUNT])
def test_the_estimate_of_the_score_is_the_weighted_mean_of_those_of_the_tasks(kind, count):
    """Of the first three items, none is of the task c: a mean leaves it out, and the others predict it."""
    _, rows = simulated(7, COUNT, 4)
    of, given = learnt(SCALE, rows[:6]), tuple(rows[6][:count])
    tasks = of.estimate_tasks(kind, given)
    assert set(tasks) == ({"a", "b"} if kind == "mean" and count == 3 else {"a", "b", "c"})
    total = sum(WEIGHTS[t] * v for t, v in tasks.items()) / sum(WEIGHTS[t] for t in tasks)
    if kind in ("mean", "difference") or count == COUNT:  # the others rest on other abilities
        assert of.estimate(kind, given) == pytest.approx(total, abs=2e-6)
    if count == COUNT:
        assert tasks == pytest.approx(SCALE.of_tasks(given), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_estimates_of_tasks_are_closer_where_the_first_items_are_the_easy_ones(kind):
    """The first third of every task is easy, which all other models show, and the plain means do not know."""
    rng, items = np.random.default_rng(5), 90
    of = Scale(tuple("abc"[k % 3] for k in range(items)), WEIGHTS, dict.fromkeys(WEIGHTS, JUDGED))
    hard = np.where(np.arange(items) < 30, -2.0, 1.5)
    rows = (rng.random((26, items)) < 1 / (1 + np.exp(hard - rng.normal(0, 1, (26, 1))))).astype(float).tolist()
    known, errors = learnt(of, rows[:16]), []
    for row in rows[16:]:
        truth, plain = of.of_tasks(row), known.estimate_tasks("mean", row[:30])
        found = known.estimate_tasks(kind, row[:30])
        errors.append([[abs(v[t] - truth[t]) for t in WEIGHTS] for v in (found, plain)])
    mine, theirs = np.mean(errors, axis=0)
    assert (mine < (0.9 if kind == "difference" else 0.6) * theirs).all()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_who_is_good_at_one_task_need_not_be_good_at_another(kind):
    """Abilities at two tasks that have nothing to do with each other: each estimate ranks models at its task."""
    rng, items = np.random.default_rng(6), 160
    of = Scale(tuple("ab"[k % 2] for k in range(items)), WEIGHTS, {"a": JUDGED, "b": JUDGED})
    able, hard = rng.normal(0, 1.5, (40, 2)), rng.normal(0, 1, items)
    rows = (rng.random((40, items)) < 1 / (1 + np.exp(hard - able[:, np.arange(items) % 2]))).astype(float).tolist()
    known, one = learnt(of, rows[:12]), fit_items(rows[:12], items)
    at_all = [one.ability(row[:40]) for row in rows[12:]]
    for task in "ab":
        truth = [of.of_tasks(row)[task] for row in rows[12:]]
        found = [known.estimate_tasks(kind, row[:40])[task] for row in rows[12:]]
        assert stats.spearmanr(found, truth).statistic > max(0.85, stats.spearmanr(at_all, truth).statistic + 0.2)


def answers(recipe):
    """To all items: how able a model is at each task, only the recipe decides."""
    draw = random.Random(recipe.id)
    able = {task: draw.random() for task in WEIGHTS}
    return tuple(float(draw.random() < able[task]) for task in SCALE.tasks)


def reply(candidate, _):
    """What a run would answer: the plain means of the items that were scored."""
    asked, whole = candidate.question, answers(candidate.recipe)
    items = whole if asked.limit is None else reordered(whole, asked.order)[: asked.limit]
    score = SCALE.score(whole) if asked.limit is None else None
    tasks = SCALE.reordered("" if asked.limit is None else asked.order).of_tasks(items)
    return Result(
        candidate.number, candidate.recipe.id, "ok", score, None, asked.limit is None, items, tasks, order=asked.order
    )  # fmt: skip


def set_up(**changes):
    known = learnt(SCALE, [answers(e) for e in EXPERTS[:4]])
    return Setup(EXPERTS[:4], BASE, 0, Budget(candidates=24), maker(4), known, False, tasks=tuple(WEIGHTS), **changes)


def several(name, setup):
    settings = {"nsga2": {"population": 6}, "nsga3": {"population": 6}, "map": {"samples": 12}, "cycleqd": {}}[name]
    typed = check_section(SEARCHES[name].settings, {"algorithm": name, **settings}, "f", "search.")
    return SEARCHES[name].build(setup, typed)


def heard(search):
    """The results that a search is told, by number."""
    told, tell = {}, search.tell

    def listening(result):
        told[result.number] = result
        tell(result)

    search.tell = listening
    return told


@pytest.mark.parametrize("kind", ["difference", "p-irt"])
@pytest.mark.parametrize("name", ["nsga2", "nsga3", "map", "cycleqd"])
def test_searches_by_several_objectives_hear_estimates_of_groups_of_tasks(name, kind):
    setup = set_up(objectives=GROUPS)
    search = Estimating(several(name, setup), setup, EstimateSettings(items=16, kind=kind), 2, 3)
    told = heard(search.inner)
    asked = {c.number: c for c in simulate(search, 3, 1, reply=reply)}
    estimates, differ = setup.estimator, 0
    for number, result in told.items():
        question = asked[2 * number].question
        if question.limit is None:
            continue
        first = reordered(answers(asked[2 * number].recipe), question.order)[:16]
        assert result.tasks == estimates.estimate_tasks(kind, first, question.order)
        differ += result.tasks != SCALE.reordered(question.order).of_tasks(first)
        ab, c = values_of(GROUPS, result.tasks)
        assert kind == "p-irt" or (4 * ab + 2 * c) / 6 == pytest.approx(result.score, abs=2e-6)
    assert differ > 12
    if name.startswith("nsga"):
        trials = [tuple(trial.values) for trial in search.inner.study.trials]
        assert trials == [pytest.approx(values_of(GROUPS, told[k].tasks)) for k in range(24)]


@pytest.mark.parametrize("kind", ["p-irt", "difference"])
def test_those_on_the_front_of_the_estimates_are_scored_in_full_beside_the_best(kind):
    setup = set_up(objectives=GROUPS)
    search = Estimating(several("nsga2", setup), setup, EstimateSettings(items=16, kind=kind), 1, 24)
    told = heard(search.inner)
    asked = simulate(search, 4, 2, reply=reply)
    whole = {c.recipe.id for c in asked if c.number % 2}
    best = max(told.values(), key=lambda r: (r.score, -r.number)).recipe_id
    values = [values_of(GROUPS, told[k].tasks) for k in range(24)]
    on = {told[int(k)].recipe_id for k in front(values)}
    assert whole == on | {best}
    assert len(on) > 1
    assert len(asked) <= search.total
    alone = Estimating(several("nsga2", setup), setup, EstimateSettings(items=16, kind=kind), 1)
    assert sum(c.number % 2 for c in simulate(alone, 4, 2, reply=reply)) == 1


def test_a_search_inside_of_halving_hears_estimates_of_tasks():
    setup = set_up(objectives=GROUPS)
    of = {"algorithm": "nsga2", "population": 6}
    settings = HalvingSettings(algorithm="halving", of=of, first=12, eta=2, batch=6, estimate="difference")
    search = Halving(setup, settings)
    told = heard(search.inner)
    simulate(search, 3, 1, reply=reply)
    part = [r for r in told.values() if not r.complete]
    assert len(part) > 10
    for result in part:
        total = sum(WEIGHTS[t] * v for t, v in result.tasks.items()) / 6
        assert result.score == pytest.approx(total, abs=2e-6)


def test_what_the_ledger_holds_of_other_items_is_not_heard():
    """A budget that was raised finds whole results; the search hears what it heard before."""

    def generous(candidate, failing):
        found, whole = reply(candidate, failing), answers(candidate.recipe)
        return Result(
            found.number, found.recipe_id, "ok", SCALE.score(whole), None, True, whole, SCALE.of_tasks(whole)
        )  # fmt: skip

    runs = []
    for answer in (reply, generous):
        setup = set_up(objectives=GROUPS)
        search = Estimating(several("nsga2", setup), setup, EstimateSettings(items=16), 2)
        told = heard(search.inner)
        simulate(search, 3, 1, reply=answer)
        runs.append([(told[k].recipe_id, told[k].score, told[k].tasks) for k in range(24)])
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("kind", "said"),
    [("mean", "saw the means"), ("difference", "without bias"), ("mp-irt", r"item-response estimates \(mp-irt\)")],
)
def test_a_report_names_the_estimate(kind, said):
    settings = EvaluationSettings(tasks=[{"task": "toy", "dev": 9, "report": 9}], estimate={"items": 8, "kind": kind})
    assert re.search(said, as_seen(settings))


def test_an_objective_without_an_item_is_refused(make_config, tmp_path):
    changes = {
        "search": {"algorithm": "nsga2"}, "evaluation.estimate": {"items": 8, "kind": "mean"},
        "evaluation.block_items": 1,
        "evaluation.tasks": [
            {"task": "toy", "dev": 96, "select": 2, "report": 2},
            {"task": "yesno", "metric": "mcc", "dev": 2, "select": 2, "report": 2},
        ],
    }  # fmt: skip
    said = r"evaluation\.estimate\.items: none of the first 8 dev items is of yesno, which the objective yesno needs"
    with pytest.raises(BadInput, match=said):
        prepare(config_at(make_config(tmp_path, changes)))
