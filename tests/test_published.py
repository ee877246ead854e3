"""The searches that came with presets: worked examples, their formulas again, and what they gain over chance."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toys
from test_halving import ONE, answers, complete
from test_search import EXPERTS, build, simulate
from toys import run_here

from evolver.evaluation.scores.estimates import Estimates
from evolver.evaluation.scores.irt import fit_items
from evolver.records import Candidate, Question, Result
from evolver.records.recipe import Layers, Merge
from evolver.runs.history import read_history
from evolver.search.models.consistency import differing
from evolver.search.programs.policy import EpisodeStep, returns
from evolver.storage import storage_at


def scored(candidate, value):
    return Result(candidate.number, candidate.recipe.id, "ok", value, value, True, (value,) * 10)


# --- signed: Evo-Merging

SIGNED = {"algorithm": "signed", "population": 6, "sparsity": 13, "sigma": 0.2}


def numbers(recipe, name):
    """A setting of every expert; 0 where it is left out."""
    found = dict(zip((i.name for i in recipe.inputs), recipe.settings("w", None)[name], strict=True))
    return [found.get(e.name, 0.0) for e in EXPERTS[:4]]


def test_the_first_stage_begins_with_everything_and_the_second_with_its_best():
    def reply(candidate, _=False):
        density = numbers(candidate.recipe, "density")
        return scored(candidate, 1 - abs(density[0] - 0.6) - 0.1 * abs(numbers(candidate.recipe, "weight")[1]))

    found = simulate(build(SIGNED, candidates=40), reply=reply)
    first, second = found[:13], found[13:]
    assert numbers(first[0].recipe, "density") == [1.0] * 4
    assert all(numbers(c.recipe, "weight") == [0.25] * 4 for c in first)
    best = max(first, key=lambda c: reply(c).score - 0.05 * statistics.mean(numbers(c.recipe, "density")))
    assert all(numbers(c.recipe, "density") == numbers(best.recipe, "density") for c in second)
    assert best.recipe.id not in {c.recipe.id for c in second}  # its score is known
    assert {c.proposer for c in first} == {"signed/sparsity"}
    assert {c.proposer for c in second} == {"signed/scaling"}
    settings = first[0].recipe.settings("w", None)
    assert (settings["gamma"], settings["lambda"], settings["normalize"]) == ((0.0,) * 4, 1.0, False)


def test_a_smaller_model_is_preferred_among_equals():
    """The same score for all: only the penalty tells them apart."""
    search = build(SIGNED | {"penalty": 1.0, "sparsity": 300}, candidates=300)
    found = simulate(search, reply=lambda c, _=False: scored(c, 0.5))
    means = [statistics.mean(numbers(c.recipe, "density")) for c in found]
    assert statistics.mean(means[-6:]) < 0.6 < statistics.mean(means[:6])


def test_a_harmful_expert_is_subtracted():
    """Best at weights 0.8, -0.5, 0.2, 0: against as many random draws from the same ranges, the median of 5 seeds."""
    target = (0.8, -0.5, 0.2, 0.0)

    def reply(candidate, _=False):
        return scored(candidate, -math.dist(numbers(candidate.recipe, "weight"), target))

    gains = []
    for seed in range(5):
        ours = max(reply(c).score for c in simulate(build(SIGNED | {"sparsity": 0}, seed, candidates=120), reply=reply))
        draw = random.Random(seed)
        chance = max(-math.dist([draw.uniform(-1.5, 1.5) for _ in range(4)], target) for _ in range(120))
        gains.append(ours - chance)
    assert statistics.median(gains) > 0.1


def test_a_budget_that_ends_in_the_first_stage_is_remarked_on():
    assert "the first 13 only decide" in build(SIGNED, candidates=13).remarks[0]
    assert build(SIGNED, candidates=14).remarks == ()


# --- genetic


def test_steps_round_numbers_to_a_grid():
    settings = {"algorithm": "genetic", "population": 6, "steps": 4, "method": "ties", "tune": ["density"]}
    found = simulate(build(settings, candidates=40))
    densities = {c.recipe.settings("w", None)["density"] for c in found}
    grid = [0.05 + k * 0.95 / 4 for k in range(5)]
    assert len(densities) > 2
    for density in densities:
        assert min(abs(density[0] - g) if isinstance(density, tuple) else abs(density - g) for g in grid) < 1e-9


def test_it_climbs_faster_than_chance():
    """A sphere in 5 dimensions: the mass and four weights; the median of 5 seeds."""

    def reply(candidate, _=False):
        values = candidate.recipe.settings("w", None)
        return scored(candidate, -math.dist([values["lambda"], *values["weight"]], [1.5, 0.7, 0.1, 0.1, 0.1]))

    best = {
        name: [max(reply(c).score for c in simulate(build(s, seed, candidates=100), reply=reply)) for seed in range(5)]
        for name, s in {"genetic": {"algorithm": "genetic"}, "random": {"algorithm": "random"}}.items()
    }
    assert statistics.median(best["genetic"]) > statistics.median(best["random"])


# --- policy: Reinforced Model Merging

POLICY = {"algorithm": "policy", "population": 6, "merges": [], "sources": ["a", "b"]}


def test_rewards_are_discounted_backwards():
    """Two steps before the end and a fine: 0.5·(0.5·8 + 0) - 10, 0.5·8, 8."""
    steps = [EpisodeStep(0, 3, (0, 3), -10.0), EpisodeStep(0, 0, (0, 3), 0.0), EpisodeStep(1, 0, (0, 3), 0.0)]
    assert [value for _, value in returns(steps, 8.0, 0.5)] == [-8.0, 4.0, 8.0]


def test_the_gradient_is_that_of_the_clipped_objective():
    """Against differences of the objective itself, far from the edges of the clip and beyond them."""
    search = build(POLICY | {"rate": 1.0, "epochs": 1}, candidates=9)
    draw = np.random.default_rng(3)
    table = draw.normal(0, 0.5, (4, 4))
    every = (0, 1, 2, 3)
    told = [
        (EpisodeStep(int(draw.integers(4)), int(draw.integers(4)), every, 0.0), float(draw.normal())) for _ in "ab" * 9
    ]
    before = [float(x) for x in draw.uniform(0.15, 0.4, len(told))]

    def objective(at):
        out = 0.0
        for (step, gain), old in zip(told, before, strict=True):
            row = np.exp(at[step.layer]) / np.exp(at[step.layer]).sum()
            ratio = row[step.action] / old
            share = min(ratio * gain, float(np.clip(ratio, 0.8, 1.2)) * gain)
            out += share / sum(s.layer == step.layer for s, _ in told)
        return out

    search.logits = table.tolist()
    search._ascend(told, before)
    moved = np.asarray(search.logits) - table
    for place in np.ndindex(4, 4):
        near = np.zeros((4, 4))
        near[place] = 1e-6
        assert moved[place] == pytest.approx((objective(table + near) - objective(table - near)) / 2e-6, abs=1e-6)


def test_it_learns_where_each_layer_comes_from():
    """The right source of each of four layers gives a quarter, and every layer too many or too few takes one."""
    wanted = ["b", "a", "b", "b"]

    def reply(candidate, _=False):
        recipe = candidate.recipe
        row = [(recipe, n) for n in range(4)] if not isinstance(recipe, Layers) else [
            (recipe.inputs[i], layer) for i, layer in recipe.program
        ]  # fmt: skip
        right = sum(model.name == wanted[layer] for model, layer in row)
        return scored(candidate, (right - abs(len(row) - 4)) / 4)

    late, early = [], []
    for seed in range(3):
        scores = [reply(c).score for c in simulate(build(POLICY, seed, candidates=240), reply=reply)]
        early.append(statistics.mean(scores[:30]))
        late.append(statistics.mean(scores[-30:]))
    assert statistics.median(late) > statistics.median(early) + 0.5


def test_programs_have_layers_and_no_end_without_one():
    search = build(POLICY | {"most": 5}, candidates=200)
    search.logits = [[0.0, 0.0, 5.0, 5.0]] * 4  # skip and back nearly always
    for candidate in search.ask(6):
        recipe = candidate.recipe
        assert not isinstance(recipe, Layers) or 1 <= len(recipe.program) <= 5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sources": ["z"]}, "search.sources: there is no source 'z'"),
        ({"ends": "z"}, "search.ends: there is no source 'z'"),
        ({"merges": [{"method": "tie"}]}, "search.merges[0].method: unknown merge method 'tie'"),
        ({"edits": False, "most": 3}, "search.most: without edits, a model has 4 layers"),
    ],
)
def test_policies_that_cannot_be(given, said):
    toys.refused(lambda: build(POLICY | given), said)


# --- consistency: AdaMMS

LINE = {"algorithm": "consistency", "target": "a", "source": "b", "items": 4, "most": 0.6, "step": 0.2}
SAID = ["ABCD", "abcx", "abyx", "abyz", "qrst"]  # differences of neighbours: 1, 1, 1, 4


def test_the_model_whose_answers_change_least_is_chosen():
    """Of the inner ones: 0.2 differs from its neighbours on 1 + 1 answers, 0.4 on 1 + 1, and 0.6 on 1 + 4."""

    def reply(candidate, _=False):
        words = tuple(f" {letter} " for letter in SAID[candidate.number]) if candidate.question.words else ()
        limit = candidate.question.limit
        return Result(candidate.number, candidate.recipe.id, "ok", None if limit else 0.5, 1.0, not limit, (0.0,) * (limit or 10), said=words)  # fmt: skip  # noqa: E501

    found = simulate(build(LINE, experts=4), reply=reply)
    assert [c.question.limit for c in found] == [4] * 5 + [None]
    assert found[0].recipe == EXPERTS[0]
    assert [c.recipe.settings("w", None)["weight"] for c in found[1:]] == [
        (0.8, 0.2), (0.6, 0.4), (0.4, 0.6), (pytest.approx(0.2), 0.8), (0.8, 0.2),
    ]  # fmt: skip
    SAID[1] = "zzzz"
    assert simulate(build(LINE), reply=reply)[-1].recipe.settings("w", None)["weight"] == (0.6, 0.4)
    SAID[1] = "abcx"


def test_answers_are_compared_one_by_one():
    assert differing(("a", "b"), ("a", "c")) == 1
    assert differing((), ("a",)) == math.inf
    assert differing((), ()) == math.inf


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"source": None}, "search.target: a line has two ends, and there are 4 experts"),
        ({"source": "x"}, "search.source: there is no expert 'x'"),
        ({"source": "a"}, "search.source: a is the target, too"),
    ],
)
def test_lines_that_cannot_be(given, said):
    toys.refused(lambda: build(LINE | given), said)


def test_it_cannot_stand_inside_of_another_search():
    inner = {"algorithm": "consistency"}
    toys.refused(
        lambda: build({"algorithm": "halving", "first": 2, "of": inner}),
        "search.of.algorithm: 'consistency' cannot be the inner",
    )
    arms = {"one": inner, "two": {"algorithm": "random"}}
    toys.refused(
        lambda: build({"algorithm": "portfolio", "arms": arms}), "search.arms.one.algorithm: 'consistency' cannot be"
    )


def test_words_that_are_asked_for_are_not_answered_without_them():
    whole = scored(Candidate(0, EXPERTS[0], "x"), 0.5)
    asked = Candidate(0, EXPERTS[0], "x", question=Question(limit=4, words=True))
    assert whole.answers(replace(asked, question=Question(limit=4)))
    assert not whole.answers(asked)
    assert replace(whole, said=("a",) * 10).answers(asked)


@pytest.mark.whole
def test_words_are_said_of_dev_items_and_nothing_changes_on_resume(make_config, tmp_path):
    changes = {"experts.c": toys.DROP, "search": {"preset": "adamms", "items": 8}, "budget": {"candidates": 9}}
    file = make_config(tmp_path, changes)
    folder = run_here(file, tmp_path / "results")
    stages = read_history(storage_at(folder)).stages
    line = [r for c, r in stages["search"] if c.proposer == "consistency/line"]
    assert [(len(r.items), len(r.said)) for r in line] == [(8, 8)] * 8
    assert all(map(any, (r.said for r in line)))
    assert stages["search"][-1][1].complete
    before = Path(folder, "recipe.json").read_text()
    run_here(file, tmp_path / "results")
    assert Path(folder, "recipe.json").read_text() == before


# --- mp-irt: MERGE³'s estimate


def test_the_ability_of_a_merge_is_expected_near_that_of_the_experts():
    """Against the item model itself, and without experts it is p-irt."""
    estimates = Estimates(ONE, 4)
    for expert in EXPERTS[:4]:
        estimates.learn(complete(expert, answers(expert)))
    first = answers(Merge("simple", EXPERTS[:2], EXPERTS[0]))[:6]
    assert estimates.estimate("mp-irt", first) == estimates.estimate("p-irt", first)
    estimates.experts = (*(e.id for e in EXPERTS[:3]), "unknown")
    estimates.learn(complete(EXPERTS[4], answers(EXPERTS[4])))
    known = sorted([*EXPERTS[:4], EXPERTS[4]], key=lambda e: e.id)
    model = fit_items([answers(e) for e in known], len(ONE.tasks))
    abilities = [model.ability(answers(e)) for e in EXPERTS[:3]]
    wanted = model.estimate(first, ONE, "mp-irt", abilities)
    assert estimates.estimate("mp-irt", first) == pytest.approx(wanted, abs=1e-6)
    assert estimates.estimate("mp-irt", first) != estimates.estimate("p-irt", first)
