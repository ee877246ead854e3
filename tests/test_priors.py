"""Merges that are guessed before a search: against float64 references, in every space, and in whole runs."""

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_doubts import tensors, write
from test_report import outcome
from test_search import build
from toys import essence, rows, run_here

from evolver.checkpoints import grams as module
from evolver.checkpoints.grams import task_grams
from evolver.checkpoints.sources import open_base, open_expert
from evolver.config.reading import config_at
from evolver.config.starts import start_of, start_proposer
from evolver.driver.prepare import prepare
from evolver.driver.priors import PriorMaker, prior_count
from evolver.driver.starts import refuse_depth
from evolver.errors import BadInput
from evolver.merging.maker import RecipeMaker
from evolver.records import UNKNOWN, Candidate, Result
from evolver.records.recipe import Expert, layer_of, load_recipe
from evolver.report.arms import arms_section
from evolver.report.starts import saving_of, starts_section
from evolver.search.continued import Sequel, continued
from evolver.search.plain import Listed
from evolver.search.priors import (
    cluster_weights,
    depth_mass,
    inverse_norms,
    relevance,
    score_shares,
    score_softmax,
    soup_order,
)

NAMES = ["model.embed_tokens.weight", "model.norm.weight"] + [
    f"model.layers.{k}.{part}.weight" for k in range(6) for part in ("self_attn.q", "mlp.up")
]
WEIGHINGS = [inverse_norms, relevance, cluster_weights]


def vectors(experts, seed=0, width=40, shared=1.0):
    """Task vectors that have something in common, of different lengths, (E, width)."""
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(experts, width)) + shared * draw.normal(size=width)) * draw.uniform(0.2, 3, (experts, 1))


def nan_reference(deltas):
    inverse = [1 / math.sqrt(sum(x * x for x in d)) for d in deltas]
    return [v / sum(inverse) for v in inverse]


def relevance_reference(deltas):
    units = [d / math.sqrt(d @ d) for d in deltas]
    wanted = sum(units)
    cosines = [max(0.0, u @ wanted / math.sqrt(wanted @ wanted)) for u in units]
    return [c / sum(cosines) for c in cosines]


def clusters_reference(deltas):
    """The two clusters with the highest mean cosine are joined, while that is not below the mean of all pairs."""
    units = [d / math.sqrt(d @ d) for d in deltas]
    mean = np.mean([a @ b for a, b in itertools.combinations(units, 2)])
    found = [[i] for i in range(len(deltas))]
    while len(found) > 1:
        likeness = {
            (a, b): np.mean([units[i] @ units[j] for i in found[a] for j in found[b]])
            for a, b in itertools.combinations(range(len(found)), 2)
        }
        a, b = max(likeness, key=likeness.get)
        if likeness[a, b] < mean - 1e-9:
            break
        found[a] += found.pop(b)
    return [1 / (len(found) * len(next(c for c in found if i in c))) for i in range(len(deltas))]


@pytest.mark.parametrize("experts", [2, 3, 5, 8])
@pytest.mark.parametrize(
    ("weighing", "reference"),
    [(inverse_norms, nan_reference), (relevance, relevance_reference), (cluster_weights, clusters_reference)],
)
def test_weights_are_those_of_the_formula(weighing, reference, experts):
    for seed in range(20):
        deltas = vectors(experts, seed)
        assert weighing(deltas @ deltas.T) == pytest.approx(reference(deltas), abs=2e-6)


def test_clusters_are_found():
    """Two that are alike, three that are alike, and one alone: a third each, shared equally within."""
    draw = np.random.default_rng(1)
    heads = draw.normal(size=(3, 500))
    deltas = np.array([heads[k] + 0.2 * draw.normal(size=500) for k in (0, 0, 1, 1, 1, 2)])
    assert cluster_weights(deltas @ deltas.T) == pytest.approx([1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9, 1 / 3], abs=2e-6)


def test_an_expert_against_all_others_is_not_relevant():
    deltas = np.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]])
    assert relevance(deltas @ deltas.T) == pytest.approx([0.5, 0.5, 0.0])


@pytest.mark.parametrize("weighing", WEIGHINGS)
def test_equal_experts_have_equal_weights(weighing):
    for count in range(1, 7):
        deltas = np.repeat(vectors(1), count, axis=0)
        assert weighing(deltas @ deltas.T) == pytest.approx([1 / count] * count, abs=1e-12)


@pytest.mark.parametrize("weighing", WEIGHINGS)
def test_an_expert_that_equals_the_base_has_no_weight(weighing):
    deltas = vectors(4)
    deltas[2] = 0
    with np.errstate(all="raise"):
        found = weighing(deltas @ deltas.T)
        kept = [0, 1, 3]
        assert found[2] == 0
        assert [found[i] for i in kept] == pytest.approx(weighing((deltas @ deltas.T)[np.ix_(kept, kept)]), abs=1e-12)
        assert weighing(np.zeros((3, 3))) == pytest.approx([1 / 3] * 3)
        alone = np.zeros((3, 3))
        alone[1, 1] = 4.0
        assert weighing(alone) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("weighing", WEIGHINGS)
def test_the_rounding_of_sums_does_not_show(weighing):
    """A run that is resumed on another machine begins with the same models."""
    products = vectors(5) @ vectors(5).T
    shaken = products * (1 + 1e-13 * np.random.default_rng(0).choice([-1, 1], size=products.shape))
    assert weighing(products) == weighing((shaken + shaken.T) / 2)


def test_the_mass_grows_with_depth():
    assert [depth_mass(layer / 4, 2.0) for layer in range(5)] == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])


def test_the_soup_follows_the_scores():
    standings = [(0.0, 0.3), (0.0, 0.9), UNKNOWN, (0.0, 0.3)]
    half, third, quarter = soup_order(standings)
    assert half == (0.5, 0.5, 0.0, 0.0)  # of equals the earlier one
    assert third == pytest.approx((1 / 3, 1 / 3, 0.0, 1 / 3))
    assert quarter == (0.25,) * 4
    assert soup_order(standings[:1]) == []


def test_weights_from_scores():
    standings = [(0.0, 0.3), (-2.0, 0.6), UNKNOWN, (0.0, 0.1)]  # one breaks a constraint, one was not scored
    assert score_shares(standings) == pytest.approx((0.3, 0.6, 0.0, 0.1))
    raw = [math.exp(s / 0.06) for s in (0.3, 0.6, -math.inf, 0.1)]
    assert score_softmax(standings) == pytest.approx([r / sum(raw) for r in raw], abs=2e-6)


@pytest.mark.parametrize("weighing", [score_shares, score_softmax])
def test_weights_from_scores_of_any_size_and_sign(weighing):
    """The unit of the score does not matter; scores below 0 are no reason to fail, and neither are none."""
    scores = (0.3, 0.6, 0.5)
    assert weighing([(0.0, 100 * s) for s in scores]) == pytest.approx(weighing([(0.0, s) for s in scores]))
    for none in ([UNKNOWN] * 3, [(0.0, 0.0)] * 3, [(0.0, -900.0)] * 3):
        assert weighing(none) == pytest.approx((1 / 3,) * 3)
    worse = weighing([(0.0, -800.0), (0.0, -900.0), UNKNOWN])
    assert sum(worse) == pytest.approx(1.0)
    if weighing is score_softmax:
        assert worse[0] > worse[1] > worse[2] == 0


# --- Statistics of task vectors.


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """A base and three experts, the last of which equals the base; pieces are shorter than tensors."""
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "GRAM_PIECE", 28)
    base = open_base(str(write(tmp_path / "base", tensors())), "model.base")
    other = tensors(1) | {"model.norm.weight": tensors()["model.norm.weight"].to(torch.bfloat16)}
    contents = {"a": tensors(1), "b": other, "same": tensors()}
    experts = [open_expert(str(write(tmp_path / n, c)), base, f"experts.{n}") for n, c in contents.items()]
    return base, experts


def test_inner_products_are_those_of_whole_task_vectors(opened):
    base, experts = opened
    found = task_grams(base, experts)
    assert found.keys() == {n for n, i in base.headers.items() if i.dtype.is_floating_point}
    for name, products in found.items():
        moved = [(e.tensor(name).double() - base.tensor(name).double()).flatten().numpy() for e in experts]
        assert products == pytest.approx(np.array([[a @ b for b in moved] for a in moved]), rel=1e-12)
        assert not products[2].any()


def test_weights_are_read_once(opened, monkeypatch):
    base, experts = opened
    first = task_grams(base, experts)
    monkeypatch.setattr(module, "_measured", None)
    again = task_grams(base, experts)
    assert all((again[name] == products).all() for name, products in first.items())
    with pytest.raises(TypeError):
        task_grams(base, experts[::-1])  # other experts are other numbers


# --- Recipes in the space of a search.


def grams(count=3):
    """Of every tensor those of other task vectors."""
    return {name: vectors(count, seed) @ vectors(count, seed).T for seed, name in enumerate(NAMES)}


def prior_maker(method="task_arithmetic", groups=1, classes=False, knots=None, tune=None, count=3):
    maker = RecipeMaker(list("abcdef")[:count], NAMES)
    space = maker.space(method, groups, tune, {}, classes, knots)
    return PriorMaker(maker.experts, maker.base, NAMES, space, lambda: grams(count)), space


def same_settings(one, other):
    """Whether two merges say the same of every tensor, as far as a space can: no weight of it is exactly 0."""
    for name in NAMES:
        here, there = (r.settings(name, layer_of(name)) for r in (one, other))
        numbers = [[v for _, value in sorted(own.items()) for v in np.atleast_1d(value)] for own in (here, there)]
        if here.keys() != there.keys() or numbers[0] != pytest.approx(numbers[1], abs=3e-3):
            return False
    return one.method == other.method


PLACES = {"one": {}, "groups": {"groups": 3}, "layers": {"groups": "per-layer"}, "knots": {"knots": 4}}
PLACES |= {"classes": {"classes": True}, "groups of classes": {"groups": 2, "classes": True}}
STANDINGS = [(0.0, 0.4), (0.0, 0.6), (0.0, 0.5)]


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("word", ["nan", "relevance", "depth", "clusters", "mwa", "cocktail", "greedy"])
def test_a_prior_lies_in_the_space(word, method, places):
    priors, space = prior_maker(method, **places)
    found = list(priors.recipes(word, 0.8, STANDINGS))
    assert len(found) == prior_count(word, 3)
    flat = word == "depth" and places in ({}, {"classes": True})  # no place lies deeper than another
    for recipe in found:
        point = space.encode(recipe)
        assert (point is None) == flat
        if point is not None:
            assert same_settings(space.decode(point), recipe)


@pytest.mark.parametrize(("word", "weighing"), [("nan", inverse_norms), ("relevance", relevance)])
def test_each_group_of_layers_has_the_weights_of_its_own_tensors(word, weighing):
    priors, _ = prior_maker(groups=3)
    (recipe,) = priors.recipes(word, 0.8, STANDINGS)
    for group in (None, 0, 1, 2):
        own = [n for n in NAMES if (None if layer_of(n) is None else layer_of(n) // 2) == group]
        wanted = weighing(sum(grams()[n] for n in own))
        for name in own:
            settings = recipe.settings(name, layer_of(name))
            assert settings["weight"] == pytest.approx(wanted, abs=2e-3)  # no weight is exactly 0 in the space
            assert settings["lambda"] == pytest.approx(0.8)


@pytest.mark.parametrize("places", [{"groups": "per-layer"}, {}], ids=["per-layer", "one"])
def test_the_depth_profile_is_linear(places):
    priors, _ = prior_maker(**places)
    (recipe,) = priors.recipes("depth", 0.8, STANDINGS)
    masses = [recipe.settings(f"model.layers.{k}.mlp.up.weight", k)["lambda"] for k in range(6)]
    assert masses == pytest.approx(np.linspace(0.4, 1.2, 6))
    assert recipe.settings(NAMES[0], None)["lambda"] == pytest.approx(0.8)


def test_clusters_and_the_soup_are_the_same_at_every_place():
    priors, _ = prior_maker(groups=3)
    (recipe,) = priors.recipes("clusters", 1.0, STANDINGS)
    wanted = cluster_weights(sum(grams().values()))
    assert all(recipe.settings(n, layer_of(n))["weight"] == pytest.approx(wanted, abs=3e-3) for n in NAMES)
    pair, _ = priors.recipes("greedy", 1.0, STANDINGS)
    assert all(recipe.settings(n, layer_of(n))["weight"] for n in NAMES)
    assert pair.settings(NAMES[0], None)["weight"] == pytest.approx((0.0, 0.5, 0.5), abs=3e-3)


def test_without_weights_in_the_space_it_is_task_arithmetic():
    priors, _ = prior_maker("ties", tune=["density"])
    (recipe,) = priors.recipes("nan", 0.8, STANDINGS)
    assert recipe.method == "task_arithmetic"
    assert recipe.settings(NAMES[0], None)["weight"] == pytest.approx(inverse_norms(sum(grams().values())))


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_task_arithmetic_over_the_whole_model_lies_in_every_space_of_it(places):
    """So that the baselines with several masses are points where a sampler can begin."""
    _, space = prior_maker(**places)
    outside = PriorMaker(space.experts, space.base, NAMES, None, grams)
    (recipe,) = outside.recipes("nan", 0.8, STANDINGS)
    assert same_settings(space.decode(space.encode(recipe)), recipe)
    assert prior_maker("ties", **places)[1].encode(recipe) is None


# --- What depends on results comes second.


def test_a_sequel_waits_for_the_listed_results():
    experts = [Expert(n, 2 * n) for n in "abc"]

    def best_again(first, pairs):
        best = max(pairs, key=lambda pair: pair[1].score)[0]
        return [Candidate(first, best.recipe, "second"), Candidate(first + 1, experts[0], "second")]

    listed = [Candidate(k, e, "first") for k, e in enumerate(experts)]
    search = continued(listed, Listed([], "search"), Sequel(2, best_again))
    assert [c.number for c in search.ask(9)] == [0, 1, 2]
    for k, score in enumerate((0.1, 0.9, 0.5)):
        assert search.ask(9) == []
        assert not search.done
        search.tell(Result(k, experts[k].id, "ok", score, score, True, (score,)))
    asked = search.ask(9)
    assert [(c.number, c.recipe, c.proposer) for c in asked] == [(3, experts[1], "second"), (4, experts[0], "second")]
    for c in asked:
        assert not search.done
        search.tell(Result(c.number, c.recipe.id, "failed"))
    assert search.done


def test_a_search_learns_from_the_sequel():
    """CMA-ES begins around a model that came second, with a mass far from the middle."""
    settings = {"algorithm": "cmaes", "sigma": 0.02}
    plain = build(settings, candidates=20)
    point = plain.space.encode_equal(1.0) | {"lambda": 0.25}
    second = Candidate(0, plain.space.decode(point), "second")
    search = continued([], build(settings, candidates=20), Sequel(1, lambda first, pairs: [second]))
    masses = []
    while asked := search.ask(1):
        (own,) = (v for rule in asked[0].recipe.rules for k, v in rule.values if k == "lambda")
        masses.append(own)
        search.tell(Result(asked[0].number, asked[0].recipe.id, "ok", 0.5, 0.5, True, (0.5,)))
    assert len(masses) == 21
    assert max(masses[2:9]) < 0.6


def test_proposers_say_what_a_model_is_of():
    assert start_of(start_proposer("nan")) == "nan"
    assert start_of("cmaes") is None
    assert start_of("start") is None


ALL = ["masses", "nan", "relevance", "depth", "clusters", "mwa", "cocktail", "greedy"]


@pytest.mark.whole
@pytest.mark.parametrize("search", [
    {"algorithm": "cmaes", "layer_groups": 2}, {"algorithm": "tpe", "method": ["ties", "task_arithmetic"]},
], ids=["cmaes", "tpe"])  # fmt: skip
def test_a_run_begins_with_them(make_config, tmp_path, search):
    changes = {"start": ALL, "search": search, "budget.candidates": 17}
    folder = run_here(make_config(tmp_path, changes), tmp_path / "results")
    found = [r for (stage, _), r in sorted(rows(folder).items(), key=lambda p: p[1]["number"]) if stage == "search"]
    words = ["experts"] * 3 + ["masses"] * 2 + ["nan", "relevance", "depth", "clusters", "mwa", "cocktail"]
    words += ["greedy", "greedy"]
    assert [start_of(r["proposer"]) for r in found] == words + [None] * 4
    assert all(r["status"] == "ok" for r in found)
    masses = {r["recipe_id"]: r["score"] for r in found[3:5]}
    best = load_recipe(next(r["recipe"] for r in found if r["recipe_id"] == max(masses, key=masses.get)))
    mass = best.settings("w", None)["lambda"]
    guessed = load_recipe(found[5]["recipe"])
    assert guessed.method == ("ties" if "method" in search else "task_arithmetic")
    assert guessed.settings("w", None)["lambda"] == pytest.approx(mass)
    assert "## What the search began with" in (folder / "report.md").read_text()
    before = essence(folder)
    run_here(make_config(tmp_path, changes), tmp_path / "results")
    assert essence(folder) == before


def test_more_models_than_candidates_are_refused(make_config, tmp_path):
    file = make_config(tmp_path, {"start": ALL, "budget.candidates": 13})
    with pytest.raises(BadInput, match="start: 13 models are named, which count among the 13 candidates"):
        prepare(config_at(file), weights=False)


def test_no_depth_without_layers(make_config, tmp_path):
    config = config_at(make_config(tmp_path, {"start": ["average", "depth"]})).parsed()
    refuse_depth(config, ["model.layers.0.w"])
    with pytest.raises(BadInput, match=r"start\[1\]: the names of the base's tensors tell of no layers"):
        refuse_depth(config, ["encoder.w", "head.w"])


# --- What the start saved, on made-up ledgers.

RECIPES = [Expert(n, n) for n in "abcdefgh"]


def ledger(*entries):
    """Candidates with their results, from (proposer, score or None, items, number of the recipe)."""
    out = []
    for number, (proposer, score, items, recipe) in enumerate(entries):
        candidate = Candidate(number, RECIPES[recipe], proposer)
        status = "failed" if score is None else "ok"
        answers = (score or 0.0,) * items
        out.append((candidate, Result(number, candidate.recipe.id, status, score, score, score is not None, answers)))
    return out


NAN, DEPTH = start_proposer("nan"), start_proposer("depth")
GIVEN = [(NAN, 0.5, 100, 0), (DEPTH, 0.6, 100, 1)]


@pytest.mark.parametrize(
    ("found", "reached", "spent", "saved"),
    [
        ([("tpe", 0.4, 100, 2), ("tpe", 0.55, 100, 3), ("tpe", 0.7, 100, 4), ("tpe", 0.9, 100, 5)], 4, 300, 100),
        ([("tpe", 0.6, 100, 2), ("tpe", 0.9, 100, 3)], 2, 100, -100),  # as good is good enough
        ([("tpe", 0.6, 0, 1), ("tpe", None, 40, 2), ("tpe", 0.8, 100, 3)], 4, 140, -60),  # one of the start again
        ([("tpe", 0.4, 100, 2), ("tpe", 0.5, 400, 3)], None, 500, None),
        ([], None, 0, None),
    ],
    ids=["saved", "cost", "proposed again", "never", "no search"],
)
def test_what_the_start_saved(found, reached, spent, saved):
    summary = saving_of(ledger(*GIVEN, *found)).summary()
    assert summary == {"best": 1, "cost": 200, "spent": spent, "reached": reached, "saved": saved}


def test_a_start_that_is_a_baseline_costs_nothing():
    known = [(c, replace(r, reused=True)) for c, r in ledger(*GIVEN)]
    assert saving_of([*known, *ledger(*GIVEN, ("tpe", 0.9, 100, 3))[2:]]).saved == 100


def test_models_that_break_a_constraint_are_not_the_best():
    (first, second), more = ledger(*GIVEN), ledger(*GIVEN, ("tpe", 0.55, 100, 3))[2:]
    broken = (second[0], replace(second[1], violations={"0": 0.1}))
    assert saving_of([first, broken, *more]).summary() == {
        "best": 0, "cost": 200, "spent": 100, "reached": 2, "saved": -100,
    }  # fmt: skip


def test_without_scores_there_is_nothing_to_say():
    assert saving_of(ledger(("tpe", 0.5, 10, 0))) is None
    assert saving_of(ledger((NAN, None, 10, 0), ("tpe", 0.5, 10, 1))) is None


def reported(*entries):
    done = outcome([1.0, 0.0], [0.0, 0.0])
    config = done.config.model_copy(update={"search": {"algorithm": "portfolio"}})
    return replace(done, about=replace(done.about, config=config), searched=tuple(ledger(*entries)))


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (
            [("one: tpe", 0.4, 300, 2), ("two: tpe", 0.7, 100, 4)],
            "200 items, so by this count the start saved 200 items.",
        ),
        ([("one: tpe", 0.7, 100, 4)], "by this count the start saved nothing and took 100 items more."),
        ([("one: tpe", 0.4, 500, 2)], "never reached it, with 500 items. .* not known exactly: at least 300 items."),
        ([("one: tpe", 0.4, 100, 2)], "never reached it, with 100 items. .* whether it saved any is not known."),
    ],
)
def test_the_report_says_it_in_a_sentence(found, says):
    text = starts_section(reported(*GIVEN, *found))
    assert "| nan | 1 | 100 | 50.0 |\n| depth | 1 | 100 | 60.0 |" in text
    assert "The best of these models is candidate 1 (depth), with a score of 60.0 on the dev items." in text
    assert re.search(says, text)
    assert starts_section(reported(("one: tpe", 0.4, 100, 2))) == ""


def test_models_of_the_start_are_not_listed_as_a_search():
    text = arms_section(reported(*GIVEN, ("one: tpe", 0.4, 300, 2), ("two: tpe", 0.7, 100, 4)))
    assert re.findall(r"^\| ([^|]+) \| (\d+) \|", text, re.MULTILINE) == [
        ("given by start, found by no search", "2"), ("one", "1"), ("**two**", "1"),
    ]  # fmt: skip
