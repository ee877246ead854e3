"""SHADE: its formulas worked by hand, its trajectory written down a second time from the papers, and what it gains."""

import math
import random
import statistics

import pytest
import torch
from test_population import setup
from test_search import EXPERTS, build, ids, score, simulate

from evolver.errors import BadInput
from evolver.merging.crossing import cross
from evolver.records import Result
from evolver.records.recipe import Cross, Merge, ancestors
from evolver.search.evolution.population import first_population
from evolver.search.evolution.shade import Success, SuccessHistory, gain_of, lehmer_mean

SHADE = {"algorithm": "shade"}


def test_the_mean_is_weighted_and_leans_to_the_larger_number():
    """Weights 3 and 1 of 0.5 and 1: (3 · 0.25 + 1) / (3 · 0.5 + 1) = 1.75 / 2.5 = 0.7; only ratios count."""
    assert lehmer_mean([0.5, 1.0], [3, 1]) == pytest.approx(0.7)
    assert lehmer_mean([0.5, 1.0], [0.3, 0.1]) == pytest.approx(0.7)
    assert lehmer_mean([0.25], [7]) == pytest.approx(0.25)


def test_the_oldest_pair_is_overwritten():
    first = SuccessHistory((0.5,) * 3, (0.4,) * 3)
    once = first.after([Success(0.5, 0.2, 3), Success(1.0, 0.6, 1)])
    assert pytest.approx((0.7, 0.5, 0.5)) == once.F
    assert once.Cr == pytest.approx(((3 * 0.04 + 0.36) / (3 * 0.2 + 0.6), 0.4, 0.4))
    assert once.after([]) == once
    again = once.after([Success(0.9, 0.9, 1)]).after([Success(0.8, 0.8, 1)]).after([Success(0.6, 0.6, 1)])
    assert pytest.approx((0.6, 0.9, 0.8)) == again.F
    assert again.Cr == pytest.approx((0.6, 0.9, 0.8))


def test_scales_are_cauchy_and_rates_normal_around_a_remembered_pair():
    """The quartiles of a Cauchy distribution lie one scale from its median, here 0.1; those of a normal one 0.67."""
    draw = random.Random(0)
    found = [SuccessHistory((0.5,), (0.5,)).drawn(draw) for _ in range(4000)]
    scales, rates = (statistics.quantiles(column, n=4) for column in zip(*found, strict=True))
    assert scales == pytest.approx([0.41, 0.51, 0.61], abs=0.02)  # a sixteenth lies below 0 and is drawn again
    assert rates == pytest.approx([0.433, 0.5, 0.567], abs=0.015)
    extreme = [SuccessHistory((0.02, 0.98), (0.02, 0.98)).drawn(draw) for _ in range(4000)]
    assert 0.01 == min(f for f, _ in extreme) < max(f for f, _ in extreme) == 1
    assert 0.05 == min(c for _, c in extreme) < max(c for _, c in extreme) == 1
    assert 0.4 < sum(f > 0.5 for f, _ in extreme) / 4000 < 0.6  # both pairs are drawn


def test_gains_are_of_scores_or_of_broken_constraints():
    assert gain_of((0.0, 0.75), (0.0, 0.5)) == 0.25
    assert gain_of((0.0, 0.1), (-0.5, 0.0)) == 0.5
    assert gain_of((-0.25, 0.0), (-0.5, 0.0)) == 0.25
    assert gain_of((0.0, 0.1), Result(0, "", "failed").standing) == math.inf


# --- L-SHADE, written down a second time from the papers; only the draws are the search's.


def lehmer(pairs, which):
    return sum(g * p[which] ** 2 for g, p in pairs) / sum(g * p[which] for g, p in pairs)


def l_shade(population, seed, dev, generations, H=6, p=0.11, archive=2.6, least=None):
    N = first = len(population)
    most = N * (1 + generations)
    x, f, out = list(population), [dev(m) for m in population], list(population)
    A, M, oldest = [], [(0.5, 0.5)] * H, 0
    while len(out) < most:
        start, trials, S, beaten = len(out), [], [], []
        for i in range(N):
            draw = random.Random(f"{seed}:shade:{start + i}")
            mean_F, mean_Cr = M[draw.randrange(H)]
            Cr, F = min(max(draw.normalvariate(mean_Cr, 0.1), 0.05), 1.0), -1.0
            while F <= 0:
                F = mean_F + 0.1 * math.tan(math.pi * (draw.random() - 0.5))
            F, Cr = round(min(max(F, 0.01), 1.0), 6), round(Cr, 6)
            best = sorted(range(N), key=lambda j: (-f[j], j))[: max(2, int(p * N + 0.5))]
            pbest = x[draw.choice(best)]
            r1 = draw.choice([j for j in range(N) if j != i])
            r2 = draw.choice([m for j, m in enumerate(x + A) if j not in (i, r1)])
            u = Cross(x[i], (pbest, x[r1], r2), "current-to-pbest/1", F, Cr, draw.getrandbits(32))
            trials.append(u)
            if dev(u) > f[i]:
                S.append((dev(u) - f[i], (F, Cr)))
                beaten.append(x[i])
        out += trials
        x, f = zip(
            *[(u, dev(u)) if dev(u) > fi else (m, fi) for u, m, fi in zip(trials, x, f, strict=True)], strict=True
        )
        x, f, A = list(x), list(f), A + beaten
        if S:
            M[oldest], oldest = (lehmer(S, 0), lehmer(S, 1)), (oldest + 1) % H
        if least is not None:
            N = round((least - first) / most * len(out) + first)
            kept = sorted(sorted(range(len(x)), key=lambda j: (-f[j], j))[:N])
            x, f = [x[j] for j in kept], [f[j] for j in kept]
        draw = random.Random(f"{seed}:shade:archive:{len(out)}")
        while len(A) > round(archive * N):
            A.pop(draw.randrange(len(A)))
    return out[:most]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "settings", [{}, {"reduce_to": 4}, {"p": 0.4, "archive": 0.5, "memory": 2}], ids=["SHADE", "L-SHADE", "other"]
)
def test_it_is_the_published_algorithm(seed, settings):
    search = build(SHADE | {"population": 9, "generations": 12} | settings, seed, experts=3, candidates=999)
    given = {{"memory": "H", "reduce_to": "least"}.get(key, key): value for key, value in settings.items()}
    wanted = l_shade(
        first_population(setup(seed), 9), seed, lambda r: int(r.id[:8], 16) / 16**8, generations=12, **given
    )
    asked = simulate(search)
    assert len(asked) == 9 * 13
    assert [c.recipe.id for c in asked] == [r.id for r in wanted]
    assert sum(score(c) > 0.9 for c in asked) > 5  # some children were better, or nothing was learnt


def test_the_population_shrinks_to_what_was_asked_for():
    search = build(SHADE | {"population": 20, "generations": 19, "reduce_to": 5}, candidates=999)
    sizes = []
    while not search.done:
        for candidate in search.ask(99):
            sizes.append(len(search.members))
            search.tell(Result(candidate.number, candidate.recipe.id, "ok", score(candidate), None, True))
    assert len(sizes) == 400
    assert sizes == sorted(sizes, reverse=True)
    assert sizes.count(20) == 40  # the members themselves and their first children
    assert sizes[-1] == 5
    assert sizes[40] == 18  # 20 - 15 · 40 / 400 = 18.5, and halves are rounded to even numbers


def test_failed_parents_teach_no_step_but_give_way():
    def reply(candidate, _):
        if candidate.number < 4:
            return Result(candidate.number, candidate.recipe.id, "failed", reason="boom")
        return Result(candidate.number, candidate.recipe.id, "ok", 0.5, 0.5, True)

    search = build(SHADE | {"generations": 3})
    asked = simulate(search, reply=reply)
    assert search.history == SuccessHistory((0.5,) * 6, (0.5,) * 6)
    assert all(c.question.bar is None for c in asked[:8])
    assert all(c.question.bar == 0.5 for c in asked[8:])
    assert {m.recipe for m in search.members} == {c.recipe for c in asked[4:8]}


def test_former_members_become_partners():
    def improving(candidate, _):
        return Result(candidate.number, candidate.recipe.id, "ok", float(candidate.number), None, True)

    asked = simulate(build(SHADE | {"generations": 9, "population": 6}, candidates=60), reply=improving)
    generations = [{c.recipe for c in asked[k : k + 6]} for k in range(0, 60, 6)]
    last = {partner for c in asked[54:] for partner in c.recipe.partners}
    assert last - generations[-2]  # every child takes its parent's place, so what is not in there was let go before
    plain = simulate(build(SHADE | {"generations": 9, "population": 6, "archive": 0}, candidates=60), reply=improving)
    assert {p for c in plain[54:] for p in c.recipe.partners} <= {c.recipe for c in plain[48:54]}


def test_a_raised_budget_changes_no_candidate():
    settings = SHADE | {"population": 10, "generations": 9, "reduce_to": 4}
    short, long = (simulate(build(settings, candidates=count)) for count in (40, 90))
    assert ids(long[:40]) == ids(short)


@pytest.mark.parametrize(
    ("search", "sentence"),
    [
        ({"population": 3}, r"^search\.algorithm: shade needs a population of 4, and search.population is 3; write"),
        ({"population": 6, "reduce_to": 7}, r"^search\.reduce_to: 7 is more than the 6 members of the population"),
    ],
)
def test_what_does_not_fit_is_refused(search, sentence):
    with pytest.raises(BadInput, match=sentence):
        build(SHADE | search, experts=3)


def test_three_experts_are_filled_up_to_four():
    assert len(build(SHADE, experts=3).ask(99)) == 4


# --- What it gains: experts of a few weights, of which the wanted ones lie outside of the experts' hull.


def sphere(seed, weights=8):
    """The score of a recipe: minus its squared distance from what is wanted."""
    generator = torch.Generator().manual_seed(seed)
    built = {e.id: torch.randn(weights, generator=generator) for e in EXPERTS[:4]}
    wanted = torch.randn(weights, generator=generator)

    def worth(recipe):
        for node in (n for n in ancestors(recipe) if n.id not in built):
            if isinstance(node, Cross):
                parent, *partners = (built[i.id] for i in node.inputs)
                built[node.id] = cross(node.strategy, parent, partners, node.F, node.Cr, node.seed, "w")
            elif isinstance(
                node, Merge
            ):  # what fills up a population; of TIES only the average, as tensors are missing
                shares = node.settings("w", None).get("weight", (1.0,) * len(node.inputs))
                parts = [w * built[i.id] for w, i in zip(shares, node.inputs, strict=True)]
                built[node.id] = torch.stack(parts).sum(0) / sum(shares)
        return -float((built[recipe.id] - wanted).square().sum())

    return worth


def best(worth, search):
    def reply(candidate, _):
        value = worth(candidate.recipe)
        return Result(candidate.number, candidate.recipe.id, "ok", value, value, True)

    return max(worth(c.recipe) for c in simulate(search, reply=reply))


def test_it_finds_more_than_random_mixtures_and_leaves_the_hull():
    """Median of 8 seeds, 150 candidates each, on a sphere around a point outside of the experts' hull."""
    ratios = []
    for seed in range(8):
        worth = sphere(seed)
        search = build(SHADE | {"population": 15, "generations": 9}, seed, candidates=150)
        mixtures = max(map(worth, first_population(search.setup, 150)))
        ratios.append(best(worth, search) / mixtures)  # of squared distances
    assert statistics.median(ratios) < 0.5
