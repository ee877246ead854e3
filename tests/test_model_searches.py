"""Searches that recombine whole models: each written down a second time, numbers worked by hand, and random search."""

import math
import random
import statistics
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search import BASE, EXPERTS, Means, build, ids, simulate

from evolver.errors import BadInput
from evolver.merging.engine.apply import apply
from evolver.merging.engine.pieces import InputTensors
from evolver.merging.maker import RecipeMaker
from evolver.merging.methods import METHODS
from evolver.records import UNKNOWN, Result
from evolver.records.recipe import Expert, Merge, Rule, layer_of
from evolver.search.models import cycleqd, m2n2
from evolver.search.models import map as surrogate
from evolver.search.models.mixtures import mixture_of, shares

COUNT = 4
MEMBERS = EXPERTS[:COUNT]


def point_of(recipe, count=COUNT):
    """The coefficients of the experts' task vectors in a mixture."""
    if isinstance(recipe, Expert):
        return np.zeros(count) if recipe == BASE else np.eye(count)[EXPERTS.index(recipe)]
    inputs = np.stack([point_of(i, count) for i in recipe.inputs])
    if recipe.method == "simple":
        return inputs.mean(0)
    return np.asarray(recipe.settings("w", None)["weight"]) @ inputs


def scored(candidate, score, **more):
    return Result(candidate.number, candidate.recipe.id, "ok", score, score, True, **more)


def by_point(value, count=COUNT):
    """What a worker says whose score depends on the coefficients; with two objectives, the first ones of them."""

    def reply(candidate, _=False):
        point = point_of(candidate.recipe, count)
        return scored(candidate, value(point), tasks={"one": float(point[0]), "other": float(point[1])})

    return reply


TARGET = np.asarray([0.6, 0.3, 0.1, 0.0])


def bowl(point):
    return float(2 - ((point - TARGET) ** 2).sum())


# --- Mixtures.


def test_a_mixture_leaves_out_what_has_no_part():
    assert mixture_of(MEMBERS, BASE, (0, 0, 0, 0)) == BASE
    assert mixture_of(MEMBERS, BASE, (0, 1, 0, 0)) == MEMBERS[1]
    found = mixture_of(MEMBERS, BASE, (0.5, 0, 0, 2))
    assert found.inputs == (MEMBERS[0], MEMBERS[3])
    assert point_of(found).tolist() == [0.5, 0, 0, 2]


def test_shares_follow_the_scores_of_models_that_may_win():
    assert shares([(0.0, 3.0), (0.0, 1.0)]) == [0.75, 0.25]
    assert shares([(0.0, -1.0), (0.0, -3.0), (0.0, -2.0)]) == pytest.approx([2 / 3, 0, 1 / 3])
    assert shares([(0.0, 3.0), (-0.5, 0.0), UNKNOWN]) == [1.0, 0.0, 0.0]
    assert shares([(-0.5, 0.0), UNKNOWN]) == shares([(0.0, 0.0)] * 2) == [0.5, 0.5]


# --- Greedy soup.


def soup_again(score, rounds, count=COUNT):
    """Greedy soup: the points in their order, and how often each expert is in the soup at the end."""
    points = [np.eye(count)[i] for i in range(count)]
    ranked = sorted(range(count), key=lambda i: -score(points[i]))
    soup, best = [ranked[0]], score(points[ranked[0]])
    for i in (ranked * rounds)[1:]:
        points.append(np.eye(count)[[*soup, i]].mean(0))
        if score(points[-1]) > best:
            soup, best = [*soup, i], score(points[-1])
    return points, [soup.count(i) for i in range(count)]


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("early_stopping", [True, False])
def test_the_soup_is_the_greedy_one(rounds, early_stopping):
    for seed in range(5):
        target = np.random.default_rng(seed).dirichlet([1] * COUNT)

        def score(point, target=target):
            return float(1 - np.abs(point - target).sum())

        settings = {"algorithm": "soup", "rounds": rounds}
        search = build(settings, early_stopping=early_stopping, candidates=99)
        asked = simulate(search, reply=by_point(score))
        points, counts = soup_again(score, rounds)
        assert np.allclose([point_of(c.recipe) for c in asked], points)
        assert list(search.counts) == counts
        assert search.ended == "search"
    assert any(c.question.bar is not None for c in asked) == early_stopping


def test_a_soup_by_hand():
    """Scores .5, .9, .7, .9: b first, then d (it ties with b and stands behind it), c, a. Only the soup b + c is better
    than b; with a, it would be as good as without.
    """
    values = {(0,): 0.5, (1,): 0.9, (2,): 0.7, (3,): 0.9, (1, 3): 0.9, (1, 2): 0.95, (0, 1, 2): 0.95}

    def reply(candidate, _=False):
        members = candidate.recipe.inputs or (candidate.recipe,)
        return scored(candidate, values[tuple(sorted(MEMBERS.index(m) for m in members))])

    search = build({"algorithm": "soup"}, candidates=99)
    asked = simulate(search, reply=reply)
    assert [tuple(sorted(c.parents)) for c in asked[4:]] == [
        tuple(sorted(MEMBERS[i].id for i in places)) for places in ((1, 3), (1, 2), (0, 1, 2))
    ]
    assert search.counts == (0, 1, 1, 0)


def test_a_soup_of_experts_that_break_a_constraint_is_beaten_by_one_that_does_not():
    def reply(candidate, _=False):
        broken = {} if len(candidate.recipe.inputs) == 2 else {0: 0.1}
        return scored(candidate, 0.2 if not broken else 0.9, violations=broken)

    search = build({"algorithm": "soup"}, candidates=99)
    simulate(search, reply=reply)
    assert search.counts == (1, 1, 0, 0)


# --- M2N2.

ITEMS = 12
PARAMETERS = {e.id: np.random.default_rng(k).normal(size=ITEMS) for k, e in enumerate(EXPERTS)}


def slerp(one, other, t):
    angle = math.acos(one @ other / math.sqrt((one @ one) * (other @ other)))
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * other) / math.sin(angle)


def parameters_of(recipe):
    if recipe.id not in PARAMETERS:
        one, other = (parameters_of(i) for i in recipe.inputs)
        given = recipe.settings("w", None)
        before = np.arange(ITEMS) < round(given["split"] * ITEMS)
        PARAMETERS[recipe.id] = np.where(before, slerp(one, other, given["t"]), slerp(one, other, 1 - given["t"]))
    return PARAMETERS[recipe.id]


def items_of(recipe):
    """Item j is solved, the better the nearer parameter j is to 1."""
    return [math.exp(-((p - 1) ** 2)) for p in parameters_of(recipe)]


def by_items(candidate, _=False):
    answers = items_of(candidate.recipe)
    return scored(candidate, sum(answers) / ITEMS, items=tuple(answers))


@pytest.fixture
def one_vector(monkeypatch):
    """Crossovers of models that are one vector of parameters, whose point is a share of it."""

    def crossover(self, first, second, ratio, point):
        return Merge("split_slerp", (first, second), BASE, (Rule.of({"t": ratio, "split": point}),))

    monkeypatch.setattr(RecipeMaker, "crossover", crossover)


def m2n2_again(seed, count, size, alpha=1.0):
    archive, out = [], []
    for k in range(count):
        draw, child = random.Random(f"{seed}:m2n2:{k}"), None
        if k < COUNT:
            child = MEMBERS[k]
        else:
            z = [sum(items_of(m)[j] for m in archive) ** alpha for j in range(ITEMS)]
            f = [[s / z[j] for j, s in enumerate(items_of(m))] for m in archive]
            (a,) = draw.choices(range(len(archive)), [sum(row) for row in f])
            pull = [sum(max(0, x - y) for x, y in zip(row, f[a], strict=True)) for row in f]
            others = [i for i in range(len(archive)) if i != a]
            (b,) = draw.choices(others, [pull[i] for i in others])
            rule = Rule.of({"t": draw.random(), "split": draw.random()})
            child = Merge("split_slerp", (archive[a], archive[b]), BASE, (rule,))
        out.append(child)
        archive.append(child)
        if len(archive) > size:
            z = [sum(items_of(m)[j] for m in archive) ** alpha for j in range(ITEMS)]
            archive.remove(min(archive, key=lambda m: sum(s / z[j] for j, s in enumerate(items_of(m)))))
    return out


@pytest.mark.usefixtures("one_vector")
@pytest.mark.parametrize(("size", "alpha"), [(5, 1.0), (5, 0.0), (8, 0.5)])
def test_m2n2_is_the_papers(size, alpha):
    search = build({"algorithm": "m2n2", "archive": size, "alpha": alpha}, seed=3, candidates=60)
    asked = simulate(search, reply=by_items)
    assert [c.recipe.id for c in asked] == [r.id for r in m2n2_again(3, 60, size, alpha)]
    assert len(search.models) == size


def test_fitness_and_attraction_by_hand():
    """Item totals are 2, 1 and 0: sharing the first item halves it. Model 0 is only attracted by what model 2 has."""
    scores = np.asarray([[1, 0, 0], [1, 0, 0], [0, 1, 0]], float)
    found = m2n2.worth(scores, 1.0)
    assert found.sum(1).tolist() == [0.5, 0.5, 1.0]
    assert m2n2.attraction(found, 0).tolist() == [0.0, 0.0, 1.0]
    assert m2n2.worth(scores, 0.0).sum(1).tolist() == [1, 1, 1]


def test_what_breaks_a_constraint_leaves_the_archive_first():
    def reply(candidate, _=False):
        good = candidate.number not in (0, 5)
        return scored(
            candidate, 0.5 if good else 0.9, items=(0.5 if good else 0.9,), violations={} if good else {0: 0.1}
        )

    search = build({"algorithm": "m2n2", "archive": 4}, candidates=12)
    asked = simulate(search, reply=reply)
    assert not {asked[0].recipe, asked[5].recipe} & set(search.models)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=9), st.floats(0, 1, width=32), st.integers(0, 99)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_point_of_a_crossover_counts_scalars(counts, point, seed):
    """Of all scalars in the order of the layers, the share ``point`` has the ratio, the rest 1 minus the ratio."""
    draw = random.Random(seed)
    names = [
        draw.choice(["model.embed_tokens.w{}", "model.norm.w{}", "model.layers.0.w{}", "model.layers.1.w{}"])
        for _ in counts
    ]
    names = [f"{name.format(k)}.weight" for k, name in enumerate(names)]
    sizes = dict(zip(names, counts, strict=True))
    maker = RecipeMaker(["a", "b"], names, sizes=sizes)
    found = maker.crossover(*maker.experts, 0.25, point)
    rank = {n: (0 if "embed" in n else 1 + layer_of(n) if layer_of(n) is not None else 9) for n in names}
    ratios = []
    for name in sorted(names, key=lambda n: rank[n]):
        given = found.settings(name, layer_of(name))
        before = round(given["split"] * sizes[name])
        ratios += [given["t"]] * before + [1 - given["t"]] * (sizes[name] - before)
    border = round(point * sum(counts))
    assert ratios == [0.25] * border + [0.75] * (sum(counts) - border)


@pytest.mark.parametrize(("t", "split"), [(0.2, 0.4), (0.7, 1.0), (0.9, 0.0)])
def test_a_split_slerp_is_two_slerps(t, split):
    one, other = (torch.randn(6, 5, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    values = METHODS["split_slerp"].complete({"t": t, "split": split}, 2, "here")
    found = apply(METHODS["split_slerp"], values, InputTensors("w", [one, other], one * 0, ["1", "2"], None, {}))
    a, b = (x.double().numpy().ravel() for x in (one, other))
    wanted = np.where(np.arange(30) < round(split * 30), slerp(a, b, t), slerp(a, b, 1 - t))
    assert np.allclose(found.numpy().ravel(), wanted, atol=1e-6)


def test_m2n2_says_what_it_needs(monkeypatch):
    with pytest.raises(BadInput, match=r"^search\.of\.algorithm: m2n2 compares models on every single item"):
        build({"algorithm": "halving", "of": {"algorithm": "m2n2"}, "first": 2})
    monkeypatch.setattr(Means, "unjudged", "cola")
    with pytest.raises(BadInput, match=r"^search\.algorithm: m2n2 needs items with scores .* and cola has none"):
        build({"algorithm": "m2n2"})


# --- Particle swarms.


def swarm_again(seed, count, size, rule, moves):
    """Points of all particles, step by step, of a swarm that begins with the experts and mixtures of two of them."""
    x = [np.eye(COUNT)[i] for i in range(COUNT)]
    for i in range(COUNT, size):
        draw = random.Random(f"{seed}:pso:place:{i}")
        (a, b), part = draw.sample(range(COUNT), 2), draw.uniform(0, 2)
        x.append(part * x[a] + (1 - part) * x[b])
    v = [np.zeros(COUNT)] * size
    if rule == "model-swarms":
        for i in range(size):
            j = random.Random(f"{seed}:pso:speed:{i}").choice([j for j in range(size) if j != i])
            v[i] = x[j] - x[i]
    out = [p.copy() for p in x]
    own, worst = list(x), min(x, key=bowl)
    for k in range(1, moves):
        best = max(own, key=bowl)
        for i in range(size):
            draw = random.Random(f"{seed}:pso:{k * size + i}")
            r = [draw.random() for _ in range(4 if rule == "model-swarms" else 3)]
            if rule == "model-swarms":
                c = [0.2 * r[3], 0.3 * r[0], 0.4 * r[1], 0.05 * r[2]]
                ways = [v[i], own[i] - x[i], best - x[i], x[i] - worst]
                v[i] = sum(f * w for f, w in zip(c, ways, strict=True)) / sum(c)
                x[i] = x[i] + max(0.1, 0.95 ** (k - 1)) * v[i]
            else:
                v[i] = 0.2 * v[i] + 2 * r[0] * (own[i] - x[i]) + 2 * r[1] * (best - x[i])
                x[i] = x[i] + v[i]
        out += [p.copy() for p in x]
        own = [max(pair, key=bowl) for pair in zip(own, x, strict=True)]
        worst = min([worst, *x], key=bowl)
    return out[:count]


@pytest.mark.parametrize("rule", ["pso-merging", "model-swarms"])
def test_a_swarm_is_the_papers(rule):
    settings = {"algorithm": "pso", "rule": rule, "particles": 6, "sparse": 0.0, "restart": 0}
    asked = simulate(build(settings, seed=5, candidates=40), reply=by_point(bowl))
    assert np.allclose([point_of(c.recipe) for c in asked], swarm_again(5, 40, 6, rule, 7), atol=1e-12)


def test_the_swarm_of_pso_merging_begins_with_the_base_and_sparse_experts():
    asked = build({"algorithm": "pso"}).ask(99)
    assert [c.recipe for c in asked[:4]] == list(MEMBERS)
    assert asked[-1].recipe == BASE
    assert len(asked) == 2 * COUNT + 1
    assert len({c.recipe.settings("w", None)["seed"] for c in asked[4:8]}) == COUNT
    for expert, candidate in zip(MEMBERS, asked[4:8], strict=True):
        assert (candidate.recipe.method, candidate.recipe.inputs) == ("dare_linear", (expert,))
        given = METHODS["dare_linear"].complete(candidate.recipe.settings("w", None), 1, "here")
        assert (given["density"], given["rescale"]) == (pytest.approx((0.2,)), "inv_p")
    with pytest.raises(BadInput, match=r"^search\.particles: the swarm begins with 9 models, but has 5 particles"):
        build({"algorithm": "pso", "particles": 5})


def test_a_particle_without_success_goes_back():
    """Nothing is better than the first places: after two moves in vain each particle is at its own again, at rest."""

    def worse(candidate, _=False):
        return scored(candidate, -float(candidate.number))

    settings = {"algorithm": "pso", "rule": "model-swarms", "particles": 4, "restart": 2, "social": 0.0}
    settings |= {"repulsion": 0.0}
    points = [point_of(c.recipe) for c in simulate(build(settings, candidates=16), reply=worse)]
    assert np.allclose(points[12:], points[:4])
    assert not np.allclose(points[8:12], points[:4])


# --- The genetic algorithm.


def genetic_again(seed, count, size, rate, sigma):
    members, out = [], []
    for k in range(count):
        draw = random.Random(f"{seed}:ga:{k}")
        if k < COUNT:
            child = np.eye(COUNT)[k]
        elif k < size:
            (a, b), part = draw.sample(range(COUNT), 2), draw.random()
            child = part * np.eye(COUNT)[a] + (1 - part) * np.eye(COUNT)[b]
        else:
            if k % size == 0:
                members = sorted([*members, *out[-size:]], key=bowl, reverse=True)[:size]
            total = sum(bowl(m) for m in members)
            chances = [bowl(m) / total for m in members]
            (a,) = draw.choices(range(size), chances)
            (b,) = draw.choices(range(size), [0 if i == a else c for i, c in enumerate(chances)])
            fa, fb = bowl(members[a]), bowl(members[b])
            child = (fa * members[a] + fb * members[b]) / (fa + fb)
            child = child + [draw.gauss(0, sigma) if draw.random() < rate else 0.0 for _ in range(COUNT)]
        out.append(child)
    return out


def test_the_genetic_algorithm_is_written_down_twice():
    """Scores are positive here, so chances and weights are the scores themselves."""
    settings = {"algorithm": "ga", "population": 6, "rate": 0.5, "sigma": 0.02}
    asked = simulate(build(settings, seed=2, candidates=40), reply=by_point(bowl))
    wanted = genetic_again(2, 40, 6, 0.5, 0.02)
    assert min(map(bowl, wanted)) > 0
    assert np.allclose([point_of(c.recipe) for c in asked], wanted, atol=1e-12)


# --- CycleQD.


def test_cells_and_appeal_by_hand():
    """Task 0's archive is sorted by the other tasks: 0.55 of 0 to 1 in 10 levels is level 5; what is outside is cut."""
    levels = [(0.0, 1.0)] * 3
    assert cycleqd.cell_of((0.9, 0.55, 2.0), 0, levels, 10) == (5, 9)
    assert cycleqd.cell_of((0.9, 0.55, -1.0), 1, levels, 10) == (9, 0)
    assert cycleqd.levels_of([0.2, 0.6]) == pytest.approx((0.2, 0.8))
    assert cycleqd.appeal([(0, 5), (1, 5), (0.5, 5)]) == pytest.approx([0.5, 1.3, 0.9])
    assert cycleqd.appeal([(0, 0), (1, 1)]) == pytest.approx([0.25, 1.69])


def test_every_archive_keeps_the_best_of_each_cell():
    search = build({"algorithm": "cycleqd", "bins": 4, "mutation": 0.5}, candidates=60)
    told = []
    asked = simulate(search, reply=by_point(bowl))
    told = [tuple(point_of(c.recipe)[:2]) for c in asked]
    for task, archive in enumerate(search.archives):
        best = {}
        for values in told:
            cell = cycleqd.cell_of(values, task, search.levels, 4)
            best[cell] = max(best.get(cell, -9), values[task])
        assert {cell: elite.values[task] for cell, elite in archive.items()} == pytest.approx(best)
    assert len(search.archives[0]) > 2


def test_a_child_is_a_mixture_of_two_elites_and_a_share_of_an_expert():
    search = build({"algorithm": "cycleqd", "spread": 0.0, "mutation": 0.0}, candidates=30)
    asked = simulate(search, reply=by_point(bowl))
    assert all(point_of(c.recipe).sum() == pytest.approx(1) for c in asked)
    assert set(point_of(asked[4].recipe)) <= {0.0, 0.5}
    search = build({"algorithm": "cycleqd", "spread": 0.0, "mutation": 0.2}, candidates=5)
    (child,) = simulate(search, reply=by_point(bowl))[4:]
    assert 1 < point_of(child.recipe).sum() < 1.2


def test_one_task_is_too_few_for_cycleqd(monkeypatch):
    monkeypatch.setattr(sys.modules["test_search"], "TASKS", ("one",))
    with pytest.raises(BadInput, match=r"^search\.algorithm: cycleqd needs at least two tasks"):
        build({"algorithm": "cycleqd"})


# --- MAP.


def test_the_surrogate_is_the_function_where_it_is_quadratic():
    """q = 1 + 2x − 3y + 4x² − 5xy + 6y²."""
    points = np.random.default_rng(0).random((9, 2))
    x, y = points.T
    found = surrogate.fitted(points, 1 + 2 * x - 3 * y + 4 * x**2 - 5 * x * y + 6 * y**2, 0.0)
    assert found == pytest.approx([1, 2, -3, 4, -5, 6])


def test_the_ridge_is_that_of_the_normal_equations():
    draw = np.random.default_rng(1)
    points, scores = draw.random((7, 3)), draw.random(7)
    x, damped = surrogate.terms(points), 7 * 0.1 * np.diag([0.0] + [1.0] * 9)
    wanted = np.linalg.solve(x.T @ x + damped, x.T @ scores)
    assert surrogate.fitted(points, scores, 0.1) == pytest.approx(wanted)


def test_the_first_prediction_is_the_best_point_and_the_others_are_on_the_front():
    """The score is quadratic; the tasks' scores are the first two coefficients, so the front is where both are 1."""
    asked = simulate(build({"algorithm": "map", "ridge": 0.0, "batch": 2}, candidates=32), reply=by_point(bowl))
    assert [c.proposer for c in asked].count("map/sample") == 30
    assert point_of(asked[30].recipe) == pytest.approx(TARGET, abs=1e-3)
    assert point_of(asked[31].recipe)[:2].min() > 0.9
    assert [c.recipe for c in asked[:4]] == list(MEMBERS)
    assert point_of(asked[4].recipe).tolist() == [0.25] * 4


def test_no_point_is_proposed_twice_once_there_is_a_fit():
    asked = simulate(build({"algorithm": "map", "samples": 5}, candidates=40), reply=by_point(bowl))
    assert len({c.recipe.id for c in asked}) == 40


# --- Against random search, by the median of seeds: the functions that the searches claim.

SEEDS = range(9)


def best_of(settings, seed, candidates, reply, experts=COUNT):
    asked = simulate(build(settings, seed, experts=experts, candidates=candidates), reply=reply)
    return max(reply(c).score for c in asked)


SIX = np.asarray([0.5, 0.3, 0.2, 0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "pso", "sparse": 0.0},
        {"algorithm": "pso", "rule": "model-swarms"},
        {"algorithm": "ga"},
        {"algorithm": "map"},
    ],
    ids=["pso-merging", "model-swarms", "ga", "map"],
)
def test_mixtures_beat_random_ones(settings):
    """A bowl whose best point lies in the hull of six experts, 70 candidates: random ones are even over the hull."""

    def score(point):
        return float(2 - ((point - SIX) ** 2).sum())

    by_chance = [max(map(score, np.random.default_rng(s).dirichlet([1] * 6, 70))) for s in SEEDS]
    found = [best_of(settings, s, 70, by_point(score, 6), experts=6) for s in SEEDS]
    assert statistics.median(found) > statistics.median(by_chance)


def test_cycleqd_beats_random_mixtures_of_specialists(monkeypatch):
    """Each expert solves one of four tasks, 1 − exp(−3c), and large weights disturb all: the best point, which has more
    of all than their average, lies outside the hull. In the middle of a hull it is no better than random search.
    """
    tasks = ("one", "two", "three", "four")
    monkeypatch.setattr(sys.modules["test_search"], "TASKS", tasks)

    def values(point):
        return [1 - math.exp(-3 * max(c, 0)) - 0.25 * float(point @ point) for c in point]

    def reply(candidate, _=False):
        found = values(point_of(candidate.recipe))
        return scored(candidate, sum(found) / 4, tasks=dict(zip(tasks, found, strict=True)))

    draws = [np.random.default_rng(s).dirichlet([1] * COUNT, 60) for s in SEEDS]
    by_chance = [max(sum(values(p)) / 4 for p in points) for points in draws]
    found = [best_of({"algorithm": "cycleqd"}, s, 60, reply) for s in SEEDS]
    assert statistics.median(found) > statistics.median(by_chance) + 0.02


def test_a_soup_beats_random_averages():
    """Six experts of which three are good together; as many random averages of some of them."""
    target = np.asarray([1, 0, 1, 0, 0, 1]) / 3

    def score(point):
        return float(1 - np.abs(point - target).sum()) + 0.01 * float(point @ [0.6, 0.1, 0.5, 0.2, 0.3, 0.4])

    found = best_of({"algorithm": "soup"}, 0, 99, by_point(score, 6), experts=6)
    by_chance = []
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        picked = [draw.permutation(6)[: draw.integers(1, 7)] for _ in range(11)]
        by_chance.append(max(score(np.eye(6)[list(p)].mean(0)) for p in picked))
    assert found > statistics.median(by_chance)


@pytest.mark.usefixtures("one_vector")
def test_m2n2_beats_random_crossovers():
    """Parameters of which each expert has some near their best values; random crossovers of two random experts."""
    by_chance, found = [], []
    for seed in SEEDS:
        settings = {"algorithm": "m2n2", "archive": 8}
        by_chance.append(best_of(settings | {"warmup": 10_000}, seed, 80, by_items))
        found.append(best_of(settings, seed, 80, by_items))
    assert statistics.median(found) > statistics.median(by_chance) + 0.05


@pytest.mark.usefixtures("one_vector")
def test_attraction_is_not_idle():
    with_it, without = (
        ids(simulate(build({"algorithm": "m2n2", "attraction": a}, candidates=30), reply=by_items))
        for a in (True, False)
    )
    assert with_it != without
