"""Constraints: when they are kept, how searches rank by them, and what a run does with them."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import random
from dataclasses import replace

import numpy as np
import optuna
import pytest
import scipy
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_budgets import Dying, Killed
from test_search import EVOLVER, ORDERED, answer, every_search, ids, score, simulate
from toys import run_here
from transformers import AutoModelForCausalLM, AutoTokenizer

from evolver.config import Config
from evolver.config.constraints import Constraint
from evolver.config.reading import ConfigText, config_at
from evolver.dashboard import views
from evolver.dashboard.overview import Overview
from evolver.dashboard.status import statuses
from evolver.driver.prepare import prepare, run_folder
from evolver.errors import BadInput
from evolver.evaluation.scores.comparison import RESAMPLES
from evolver.evaluation.scores.course import Evaluation
from evolver.evaluation.scores.feasibility import Guards, compared_with, guards, unprovable
from evolver.evaluation.scores.metrics import Metric, mcc, mean
from evolver.evaluation.scores.scoring import Scale
from evolver.loggers.terminal import describe_result
from evolver.records import Candidate, Result
from evolver.records.leaders import leaders
from evolver.records.recipe import Expert
from evolver.runs.history import read_history
from evolver.storage import storage_at
from evolver.workers.pools.local import LocalPool
from evolver.workers.shared import SharedPool

JUDGED = Metric("acc", mean, judged=True)
NATS = Metric("loss", mean, best=None, judged=True)
MCC = Metric("mcc", mcc)


def scale(metric, count=20, right=()):
    return Scale(("a", "b") * count, {"a": 1.0, "b": 1.0}, {"a": metric, "b": metric}, right)


def guard(items, metric=JUDGED, right=(), **constraint):
    found = Constraint(**{"task": "b", **constraint})
    return Guards([found], scale(metric, len(items) // 2, right), {0: items})


# Configurations


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        ({"task": "toys", "drop": 1}, "constraints[0].task: there is no task 'toys'; did you mean 'toy'?"),
        ({"task": "toy", "against": "d"}, "constraints[0].against: there is no model 'd'"),
        ({"drop": 2}, "about one thing, and this one is about none; give task, kl or norm"),
        ({"task": "toy", "norm": 1}, "about task and norm; give task, kl or norm"),
        ({"norm": 1, "drop": 2}, "drop does nothing in a constraint on norm"),
        ({"kl": ["a text"]}, "needs a limit; add at_most"),
        ({"kl": [], "at_most": 1}, "kl: there is no text"),
        ({"task": "toy", "confidence": 1.0}, "confidence"),
        ({"task": "toy", "drop": -1}, "drop"),
        ({"kl": [" "], "at_most": 1}, "constraints[0].kl: there is no text in it"),
        ({"kl": "nowhere.txt", "at_most": 1}, "nowhere.txt"),
    ],
)
def test_constraints_that_cannot_be_used_are_refused_in_a_sentence(make_config, tmp_path, constraint, said):
    file = make_config(tmp_path, {"constraints": [constraint]})
    ended = toys.evolver("validate", file)
    assert said in toys.refusal(ended.code, ended.err)


def settings(models, tasks, **changes):
    return ConfigText(json.dumps(toys.settings(models, tasks, changes)), "f").parsed()


def test_a_divergence_needs_a_language_model_in_this_process(models, tasks):
    kl = [{"kl": ["a text"], "at_most": 0.1}]
    with pytest.raises(BadInput, match="of kind classifier does not predict the next token"):
        settings(models, tasks, constraints=kl, **{"model.kind": "classifier"})
    with pytest.raises(BadInput, match="the backend vllm tells no probabilities"):
        settings(models, tasks, constraints=kl, **{"evaluation.backend": "vllm"})


def test_a_constraint_in_words():
    assert Constraint(task="a", drop=2).said == "a: at most 2 points below the base"
    assert Constraint(task="a", against="best expert").said == "a: at most 0 points below the best expert"
    assert Constraint(task="a", against="x", drop=0.5).said == "a: at most 0.5 points below x"
    assert "0.05 nats" in Constraint(kl="f", at_most=0.05).said
    assert "1.5 times" in Constraint(norm=1.5).said


# When a constraint on a task is kept


def test_the_bound_by_hand():
    """20 items of task b, of which the model loses 3 and wins 1. With one more that it loses, 21 items have a mean of
    -3/21 and a mean square of 5/21.
    """
    theirs = [1.0] * 40
    theirs[1] = 0.0
    ours = [1.0] * 40
    ours[3] = ours[5] = ours[7] = 0.0
    ours[0] = ours[2] = 0.0  # items of the other task do not matter
    found = guard(theirs, confidence=0.9).difference(0, ours)
    assert found.mean == pytest.approx(-2 / 20)
    spread = 5 / 21 - (3 / 21) ** 2
    assert found.low == pytest.approx(-3 / 21 - 1.2815515655 * math.sqrt(spread / 21))


def test_equal_answers_do_not_prove_that_nothing_is_lost():
    same = [1.0, 0.0] * 20
    low = guard(same, drop=0).difference(0, same).low
    assert low == pytest.approx(-1 / 21 - 1.2815515655 * math.sqrt((1 / 21 - 1 / 21**2) / 21))
    assert low > -0.11  # an exact bound of the rate of losses, of which there is none on 20 items, is 0.109
    few = guard(same[:8], drop=0).difference(0, same[:8]).low
    assert few < low


def test_the_drop_is_in_points_of_the_metric_as_reports_show_it():
    items = [1.0] * 40
    assert guard(items, drop=2).allowed(0) == 0.02
    assert guard(items, NATS, drop=2).allowed(0) == 2.0
    whole = guard(items, drop=30)
    assert whole.violation(0, items) == pytest.approx(-0.3 - whole.difference(0, items).low)
    assert whole.violation(0, items) < 0 < whole.violation(0, [1.0, 0.0] * 20)


def test_metrics_without_bounds_take_students_bound():
    draw = np.random.default_rng(0)
    ours, theirs = draw.normal(size=40), draw.normal(size=40)
    each = (ours - theirs)[1::2]
    low = scipy.stats.ttest_1samp(each, 0, alternative="greater").confidence_interval(0.95).low
    found = guard(theirs.tolist(), NATS, confidence=0.95).difference(0, ours.tolist())
    assert found.low == pytest.approx(low)
    assert guard([1.0, 1.0], NATS).difference(0, [1.0, 1.0]).low == -math.inf  # one item shows nothing


def test_metrics_of_all_answers_together_are_resampled():
    draw = np.random.default_rng(1)
    right = draw.integers(0, 2, 120).astype(float)
    ours = np.where(draw.random(120) < 0.8, right, 1 - right)
    theirs = np.where(draw.random(120) < 0.6, right, 1 - right)
    found = guard(theirs.tolist(), MCC, tuple(right), confidence=0.9).difference(0, ours.tolist())
    rows = draw.integers(0, 60, (RESAMPLES, 60))
    a, b, r = (x[1::2] for x in (ours, theirs, right))
    plain = np.asarray([np.corrcoef(a[k], r[k])[0, 1] - np.corrcoef(b[k], r[k])[0, 1] for k in rows])
    assert found.mean == pytest.approx(np.corrcoef(a, r)[0, 1] - np.corrcoef(b, r)[0, 1])
    assert found.low == pytest.approx(np.quantile(plain, 0.1), abs=0.02)


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95])
@pytest.mark.parametrize(("loses", "wins"), [(0.02, 0.0), (0.1, 0.05), (0.3, 0.1), (0.01, 0.01)])
@pytest.mark.parametrize("count", [30, 100, 400])
def test_a_model_at_the_limit_is_accepted_at_the_stated_rate(count, loses, wins, confidence):
    """The model's true drop is just what the constraint allows; it may pass in one of ten draws of the items."""
    draw, passed, times = np.random.default_rng(count), 0, 2000
    found = guard([1.0] * 2 * count, drop=100 * (loses - wins), confidence=confidence)
    for _ in range(times):
        each = draw.choice([-1.0, 0.0, 1.0], size=count, p=[loses, 1 - loses - wins, wins])
        items = np.ones(2 * count)
        items[1::2] += each
        passed += found.violation(0, items.tolist()) <= 0
    wrong = 1 - confidence
    assert passed / times <= wrong + 3 * math.sqrt(wrong * (1 - wrong) / times) + 0.01


def test_a_drop_that_so_few_items_cannot_show_is_warned_of():
    constraints = [Constraint(task="a", drop=2), Constraint(task="b", drop=12), Constraint(norm=1)]
    (said,) = unprovable(constraints, scale(JUDGED, 20))
    assert "constraints[0]: on 20 dev items of a, not even equal answers" in said
    assert list(unprovable(constraints, scale(JUDGED, 200))) == []


def result(number=0, value=0.5, violations=None, complete=True, **more):
    given = {"score": value, "complete": complete, "items": (1.0,) * 40, "tasks": {"a": value, "b": value}}
    return Result(number, f"{number:02}", "ok", **{**given, **more}, violations=violations or {})


def test_references():
    results = {"base": result(), "x": result(tasks={"b": 0.6}), "y": result(tasks={"b": 0.7})}
    results["z"] = result(value=None, tasks={"b": 0.9}, complete=False)
    experts = ["x", "y", "z"]
    assert compared_with(Constraint(task="b"), results, experts) == "base"
    assert compared_with(Constraint(task="b", against="x"), results, experts) == "x"
    assert compared_with(Constraint(task="b", against="best expert"), results, experts) == "y"
    failed = {"base": Result(0, "00", "failed", reason="boom")}
    with pytest.raises(BadInput, match=r"constraints\[0\].against: base could not be scored on the dev items \(boom\)"):
        guards([Constraint(task="b")], scale(JUDGED), failed, experts, 0)


def test_only_whole_results_are_judged():
    found = guard([1.0] * 40, drop=2)
    part = result(value=None, complete=False)
    assert found.judged(part) is part
    judged = found.judged(result(violations={"1": 0.5}))
    assert judged.violations == {"0": found.violation(0, judged.items), "1": 0.5}
    assert Guards([], scale(JUDGED), {}).judged(result()) == result()


# Ranks


def verdicts():
    amounts = st.one_of(st.just(-1.0), st.floats(-1, 1))
    return st.builds(lambda value, by: result(value=value, violations={"0": by}), st.floats(0, 1), amounts)


@given(verdicts(), verdicts())
def test_debs_rules(one, other):
    better = one.standing > other.standing
    if one.feasible and other.feasible:
        assert better == (one.score > other.score)
    elif one.feasible != other.feasible:
        assert better == one.feasible
    else:
        assert better == (one.violation < other.violation)


def test_what_has_no_score_is_behind_everything():
    last = result(value=None, complete=False).standing
    assert last < result(violations={"0": 1e9}).standing
    assert last == Result(0, "00", "failed").standing


def test_leaders_keep_the_constraints_unless_none_does():
    def pair(number, value, by):
        return Candidate(number, Expert(str(number), f"{number:02}"), "x"), result(number, value, {"0": by})

    searched = [pair(0, 0.9, 0.2), pair(1, 0.5, 0.0), pair(2, 0.8, 0.1), pair(3, 0.6, -1.0)]
    assert [c.number for c, _ in leaders(searched, 9)] == [3, 1]
    assert [c.number for c, _ in leaders([searched[0], searched[2]], 9)] == [2, 0]


# Searches


def by(candidate):
    """By how much a candidate breaks the constraints: decided by its recipe, about half of them keep all."""
    draw = random.Random(candidate.recipe.id)
    return {"0": draw.uniform(-1, 1), "1": draw.choice([-1.0, -1.0, 0.3])}


def judged(candidate, failing=False):
    told = answer(candidate, failing)
    return replace(told, violations=by(candidate)) if told.complete else told


EVERY_ORDERED = pytest.mark.parametrize("settings", ORDERED.values(), ids=ORDERED.keys())


@pytest.mark.whole
@EVERY_ORDERED
def test_workers_and_timing_change_nothing_under_constraints(settings):
    alone = ids(simulate(every_search(settings), reply=judged))
    for workers, order in ((2, 1), (8, 2)):
        assert ids(simulate(every_search(settings), workers, order, reply=judged)) == alone


DESCENDING = ("adamerging", "expert_merging", "fw_merging", "concrete", "defense_aware")
DEAF = ("random", "qmc", "grid", "consistency", *DESCENDING)


@EVERY_ORDERED
def test_constraints_change_the_search(settings):
    """Every search that learns hears of them: with them it proposes other candidates sooner or later.

    `consistency` and the searches that descend learn from a few items only, and constraints are judged on all of them.
    """
    free, bound = (ids(simulate(every_search(settings), reply=reply)) for reply in (answer, judged))
    assert (free != bound) == (settings["algorithm"] not in DEAF)


EVOLVERS = pytest.mark.parametrize(
    "settings", [s for s in ORDERED.values() if s["algorithm"] == "evolver"],
    ids=[n for n, s in ORDERED.items() if s["algorithm"] == "evolver"],
)  # fmt: skip


@EVOLVERS
def test_early_stopping_decides_the_same_under_constraints(settings):
    with_bars = simulate(every_search(settings), reply=judged)
    without = simulate(every_search(settings, early_stopping=False), reply=judged)
    assert [c.recipe.id for c in with_bars] == [c.recipe.id for c in without]
    assert any(c.question.bar is not None for c in with_bars)


@EVOLVERS
def test_no_bar_stops_what_could_be_accepted(settings):
    """A candidate competes with one that breaks a constraint: any score may be enough, so there is no bar."""
    asked = simulate(every_search(settings), reply=lambda c, _: replace(answer(c), violations={"0": 0.1 + score(c)}))
    assert all(c.question.bar is None for c in asked)


@pytest.mark.parametrize(
    ("first", "second", "accepted"),
    [((0.9, 0.5), (0.1, 0.0), True), ((0.9, 0.5), (0.1, 0.4), True), ((0.1, 0.4), (0.9, 0.5), False),
     ((0.1, 0.0), (0.9, 0.1), False), ((0.5, 0.0), (0.6, -1.0), True), ((0.5, -1.0), (0.4, -9.0), False)],
)  # fmt: skip
@pytest.mark.parametrize("merger", [{}, {"merger": {"method": "simple"}}], ids=["alone", "merged"])
def test_a_child_takes_its_parents_place_by_debs_rules(first, second, accepted, merger):
    search = every_search(EVOLVER | {"mode": "generational"} | merger)
    begun = search.ask(1 if merger else 4)

    def tell(candidates, value, violation):
        for c in candidates:
            search.tell(
                Result(c.number, c.recipe.id, "ok", value, value, True, (value,) * 10, violations={"0": violation})
            )

    tell(begun, *first)
    before, children = list(search.population), search.ask(4)
    tell(children, *second)
    search.ask(1)
    assert (search.population != before) == accepted


@pytest.mark.parametrize("name", ["tpe", "nsga2", "nsga3", "gp"])
def test_samplers_are_told_constraints(name):
    search = every_search(ORDERED[name])
    asked = simulate(search, reply=judged)
    trials = {t.number: t for t in search.study.trials}
    assert all(trials[c.number].constraints == by(c) for c in asked)


def test_cma_es_is_told_less_of_what_breaks_constraints():
    search = every_search(ORDERED["cmaes"] | {"penalty": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", None)  # Optuna would warn of constraints that it ignores
        asked = simulate(search, reply=judged)
    told = {t.number: t for t in search.study.trials}
    for c in asked:
        broken = sum(max(0.0, v) for v in by(c).values())
        assert told[c.number].value == pytest.approx(score(c) - 3 * broken)
        assert not told[c.number].constraints


@pytest.mark.parametrize("name", ["tpe", "cmaes", "nsga2"])
def test_samplers_find_what_keeps_the_constraints(name):
    """The score grows with the mass, which may be at most 0.6."""

    settings = {"algorithm": name, "method": "ties", "tune": ["density", "lambda"]}
    settings |= {"population": 6} if name != "tpe" else {}

    def reply(candidate, _):
        mass = search.study.trials[candidate.number].params["lambda"]
        told = Result(candidate.number, candidate.recipe.id, "ok", mass, mass, True, (mass,))
        return replace(told, tasks={"one": mass, "other": mass}, violations={"0": mass - 0.6})

    search = every_search(settings, candidates=80)
    asked = simulate(search, reply=reply)
    late = [reply(c, None) for c in asked[40:]]
    assert sum(r.feasible for r in late) / len(late) > 0.5
    assert 0.5 < max(r.score for r in late if r.feasible) <= 0.6


def test_stopped_candidates_have_no_known_constraint():
    search = every_search(ORDERED["tpe"])
    told = search.ask(1)[0]
    search.tell(Result(told.number, told.recipe.id, "ok", None, 0.3, False, (1.0,)))
    search.ask(1)
    assert search.study.trials[0].state == optuna.trial.TrialState.FAIL
    assert search.study.trials[0].constraints == {}


# Whole runs

TEXTS = ["Question: is the red house blue?", "Answer: white stone"]
GUARDED = toys.SHORT | {
    "budget.candidates": 8,
    "search": {"algorithm": "tpe", "startup": 4},
    "constraints": [{"task": "toy", "drop": 60}, {"kl": TEXTS, "at_most": 0.5}, {"norm": 0.6}],
}


@pytest.fixture(scope="module")
def guarded(make_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    return run_here(make_config(folder, GUARDED), folder / "results")


@pytest.mark.whole
def test_a_winner_keeps_the_constraints(guarded):
    history = read_history(storage_at(guarded))
    searched = [r for _, r in history.stages["search"]]
    assert all(set(r.violations) == {"0", "1", "2"} for r in searched)
    kept = [r for r in searched if r.feasible]
    assert 0 < len(kept) < len(searched)
    assert json.loads(toys.winner(guarded)) is not None
    assert history.best[1].score == max(r.score for r in kept)
    text = (guarded / "report.md").read_text()
    assert "It keeps all constraints." in text
    assert f"{len(searched) - len(kept)} of {len(searched)} candidates" in text
    assert "| toy: at most 60 points below the base |" in text
    assert "| distance from the base at most 0.6 times that of the experts |" in text
    (status,) = statuses(storage_at(guarded.parent))
    assert (status.state, status.infeasible) == ("done", len(searched) - len(kept))
    assert status.best == max(r.score for r in kept)
    shown = toys.evolver("status", guarded.parent)
    assert "break constraints" in shown.out


@pytest.mark.whole
def test_distances_are_those_of_the_weights(guarded, models):
    files = (load_file(models / name / "model.safetensors") for name in ("base", "a", "b", "c"))
    base, *experts = ({n: t.float() for n, t in file.items()} for file in files)

    def norm(model):
        return math.sqrt(sum(float(((model[n] - base[n]) ** 2).sum()) for n in base))

    best = load_file(guarded / "best" / "model.safetensors")
    ratio = norm({n: t.float() for n, t in best.items()}) / (sum(map(norm, experts)) / 3)
    winner = read_history(storage_at(guarded)).recommended[1]
    assert winner.violations["2"] + 0.6 == pytest.approx(ratio, rel=1e-3)


@pytest.mark.whole
def test_divergences_are_those_of_the_models(guarded, models):
    words = AutoTokenizer.from_pretrained(models / "base")
    pair = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (models / "base", guarded / "best")]
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([words(text)["input_ids"]])
        with torch.no_grad():
            base, ours = (m(input_ids=ids).logits[0].log_softmax(-1) for m in pair)
        total += float(torch.nn.functional.kl_div(ours, base, log_target=True, reduction="sum"))
        count += ids.shape[1]
    winner = read_history(storage_at(guarded)).recommended[1]
    assert winner.violations["1"] + 0.5 == pytest.approx(total / count, rel=0.02)


@pytest.mark.whole
def test_a_constrained_run_is_the_same_killed_or_not(guarded, make_config, tmp_path):
    for after in (6, 9):
        with contextlib.suppress(Killed):
            run_here(make_config(tmp_path, GUARDED), tmp_path / str(after), display=Dying(after))
        again = run_here(make_config(tmp_path, GUARDED), tmp_path / str(after))
        assert toys.essence(again) == toys.essence(guarded)
        assert toys.winner(again) == toys.winner(guarded)
        assert [r["violations"] for r in toys.rows(again).values()] == [
            r["violations"] for r in toys.rows(guarded).values()
        ]


@pytest.mark.whole
def test_the_verdict_says_that_none_keeps_them(make_config, tmp_path):
    nothing = GUARDED | {"constraints": [{"norm": 0.01}, {"task": "toy", "drop": 99, "against": "best expert"}]}
    folder = run_here(make_config(tmp_path, nothing), tmp_path / "results")
    text = (folder / "report.md").read_text()
    assert "No candidate of the search keeps all constraints; the winner is the one that breaks them least." in text
    searched = [r for _, r in read_history(storage_at(folder)).stages["search"]]
    winner = next(
        r for r in searched if r.recipe_id == json.loads((folder / "summary.json").read_text())["winner"]["recipe"]
    )
    assert winner.violation == min(r.violation for r in searched) > 0
    assert json.loads((folder / "summary.json").read_text())["feasible"] is False


@pytest.mark.whole
def test_another_constraint_is_another_run(guarded, make_config, tmp_path):
    other = make_config(tmp_path, GUARDED | {"constraints": [{"norm": 0.7}]})
    toys.refused(lambda: run_here(other, guarded.parent), "constraints")
    none = make_config(tmp_path, GUARDED | {"constraints": []})
    toys.refused(lambda: run_here(none, guarded.parent), "constraints")


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in halving"])
def test_a_run_from_before_the_penalty_goes_on(make_config, tmp_path, inside):
    search = {"algorithm": "halving", "first": 8, "of": {"algorithm": "cmaes"}} if inside else {"algorithm": "cmaes"}
    prepared = prepare(config_at(make_config(tmp_path, {"search": search})))
    identity = json.loads(json.dumps(prepared.identity))
    del (identity["search"]["of"] if inside else identity["search"])["penalty"]
    place = tmp_path / "results" / "toy"
    place.mkdir(parents=True)
    (place / "identity.json").write_text(json.dumps(identity))
    (place / "ledger").mkdir()
    (place / "ledger" / "part-00000000.parquet").write_text("damaged, so that the run counts as one with results")
    assert not run_folder(prepared, storage_at(place)).takes_over


def test_runs_without_constraints_are_those_from_before(make_config, tmp_path):
    assert "constraints" not in prepare(config_at(make_config(tmp_path))).identity
    assert Config.model_fields["constraints"].get_default(call_default_factory=True) == []


@pytest.mark.whole
def test_tables_and_curves_show_what_counts(guarded, tmp_path):
    history = read_history(storage_at(guarded))
    copy = tmp_path / "copy"
    assert toys.evolver("report", guarded, "--out", copy).code == 0
    with open(copy / "candidates.csv") as file:
        searched = [row for row in csv.DictReader(file) if row["stage"] == "search"]
    assert [float(row["violation"]) for row in searched] == [r.violation for _, r in history.stages["search"]]
    run = Overview(storage_at(guarded))
    kept = [r.score for _, r in history.stages["search"] if r.feasible]
    assert max(filter(None, views.curve_points(run.rows("search"))["best"])) == max(kept)
    assert {c["number"]: c["violation"] for c in views.leading(run.rows("search"))} == {
        c.number: r.violation for c, r in history.stages["search"]
    }
    broken = next(pair for pair in history.stages["search"] if not pair[1].feasible)
    assert "breaks a constraint" in describe_result(*broken)


@pytest.mark.whole
def test_a_study_tells_the_constraints(guarded, tmp_path):
    assert toys.evolver("study", guarded, tmp_path / "study.db").code == 0
    (study,) = optuna.get_all_study_names(f"sqlite:///{tmp_path}/study.db")
    trials = optuna.load_study(study_name=study, storage=f"sqlite:///{tmp_path}/study.db").trials
    violations = [dict(r.violations) for _, r in read_history(storage_at(guarded)).stages["search"]]
    assert [t.constraints for t in trials] == violations


@pytest.mark.whole
def test_workers_that_share_the_items_measure_the_same(guarded, make_config, tmp_path):
    shared = run_here(make_config(tmp_path, GUARDED), tmp_path / "results", share_of_two)
    assert toys.winner(shared) == toys.winner(guarded)
    assert [r["violations"] for r in toys.rows(shared).values()] == [
        r["violations"] for r in toys.rows(guarded).values()
    ]


def share_of_two(plan, split, tasks):
    """Pieces for two workers, of whom the one of this process takes both."""
    course = lambda c: Evaluation(c, tasks.scale(split), plan.block(split, len(tasks.scale(split).tasks)), None)  # noqa: E731
    return SharedPool(LocalPool(plan, split, tasks), 2, course)


@pytest.mark.whole
@pytest.mark.parametrize("search", [EVOLVER, {"algorithm": "halving", "first": 4, "batch": 4, "of": ORDERED["tpe"]}])
def test_other_searches_keep_the_constraints(make_config, tmp_path, search):
    changes = GUARDED | {"search": search, "constraints": [{"norm": 0.9}], "evaluation.block_items": 4}
    folder = run_here(make_config(tmp_path, changes), tmp_path / "results")
    history = read_history(storage_at(folder))
    assert history.best[1].violations.keys() == {"0"}
    assert history.best[1].feasible == any(r.feasible for _, r in history.stages["search"] if r.complete)
