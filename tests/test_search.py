"""Searches: the laws of all of them, the released Evolver simulated a second time, and samplers that do improve."""

import random
import sys
from dataclasses import replace

import pytest

from evolver.config import Budget
from evolver.config.reading import check_section
from evolver.errors import BadInput
from evolver.merging.maker import RecipeMaker
from evolver.records import Result
from evolver.records.recipe import Cross, Expert, Merge
from evolver.search import SEARCHES
from evolver.search.base import Setup
from evolver.search.coefficients.cmaes import default_population
from evolver.search.evolution.offspring import offspring
from evolver.search.plain import Listed

BASE = Expert("base", "00")
EXPERTS = tuple(Expert(n, 2 * n) for n in "abcdef")
DIGESTS = {"base": "00", **{e.name: e.digest for e in EXPERTS}}


def maker(count, layers=4):
    """The making half, without models."""
    names = [e.name for e in EXPERTS[:count]]
    digests = {"base": BASE.digest} | {n: 2 * n for n in names}
    tensors = [f"model.layers.{i}.{part}" for i in range(layers) for part in ("self_attn.w", "mlp.w", "w")]
    return RecipeMaker(names, tensors, digests, shapes=dict.fromkeys(tensors, (3, 2)))


class Means:
    """The evaluating half, without tasks: the mean of the first items stands for that of all 10."""

    items, block, unjudged = 10, 1, None

    def check(self, kind, key):
        pass

    def known(self, recipe_id):
        return None

    def learn(self, result):
        pass

    def estimate(self, kind, items, order=""):
        return sum(items) / len(items)

    def estimate_tasks(self, kind, items, order=""):
        return dict.fromkeys(TASKS, self.estimate(kind, items, order))


def build(settings, seed=0, experts=4, early_stopping=True, racing=False, arrival=False, **budget):
    found = SEARCHES[settings["algorithm"]]
    typed = check_section(found.settings, settings, "f", "search.")
    budget = Budget(**(budget or {"candidates": 30}))
    setup = Setup(
        EXPERTS[:experts], BASE, seed, budget, maker(experts), Means(), early_stopping, racing, arrival=arrival,
        tasks=TASKS, owned={"a": TASKS[:1], "b": TASKS[1:]},
    )  # fmt: skip
    return found.build(setup, typed)


TASKS = ("one", "other")
EVOLVER = {"algorithm": "evolver", "generations": 3}
HALVING = {"algorithm": "halving", "first": 2, "eta": 2, "batch": 4}
TPE = {"algorithm": "tpe", "startup": 5}
STEADY = {"mode": "steady", "in_flight": 3}
MODES = [
    mode | more
    for mode in ({"mode": "sequential"}, {"mode": "generational"}, STEADY)
    for more in ({}, {"merger": {"method": "simple"}})
]
ORDERED = {
    **{
        f"evolver {c['mode']}{' merger' if 'merger' in c else ''} {s}": EVOLVER | c | {"strategy": s}
        for c in MODES
        for s in ("evolver", "rand/1", "best/1", "current-to-best/1", "current-to-pbest/1", "rand/2")
    },
    "evolver population": EVOLVER | {"population": 7, "strategy": "rand/2", "mask": "row"},
    "evolver merger population": EVOLVER | {"population": 6, "merger": {"method": "ties"}, "adapt": True},
    "shade": {"algorithm": "shade", "generations": 5},
    "shade reduced": {"algorithm": "shade", "generations": 9, "population": 8, "reduce_to": 4, "mask": "layer"},
    "tpe": {"algorithm": "tpe", "startup": 5},
    "tpe 4": {"algorithm": "tpe", "startup": 5, "in_flight": 4, "layer_groups": 2},
    "tpe choosing": {"algorithm": "tpe", "startup": 5, "method": "ties", "tune": ["lambda", "sign", "normalize"]},
    "cmaes": {"algorithm": "cmaes"},
    "cmaes 5": {"algorithm": "cmaes", "population": 5, "sigma": 0.2, "method": "ties", "tune": ["density", "lambda"]},
    "nsga2": {"algorithm": "nsga2", "population": 5},
    "portfolio": {
        "algorithm": "portfolio",
        "turn": 2,
        "eta": 1.2,
        "arms": {"one": EVOLVER | {"mode": "generational"}, "two": TPE, "three": {"algorithm": "random"}},
    },
    "islands": {
        "algorithm": "islands",
        "islands": {"one": EVOLVER | {"mode": "generational"}, "two": TPE, "three": TPE},
    },
    "evolution strategy": {"algorithm": "evolution_strategy", "population": 6, "decay": 0.1},
    "evolution strategy 2": {"algorithm": "evolution_strategy", "population": 2, "utilities": "z-scores", "rank": 1},
    "soup": {"algorithm": "soup", "rounds": 3},
    "m2n2": {"algorithm": "m2n2", "archive": 5},
    "m2n2 4": {"algorithm": "m2n2", "warmup": 3, "in_flight": 4, "attraction": False, "split": False},
    "pso": {"algorithm": "pso"},
    "pso swarms": {"algorithm": "pso", "rule": "model-swarms", "particles": 6, "restart": 1},
    "ga": {"algorithm": "ga", "population": 5},
    "cycleqd": {"algorithm": "cycleqd"},
    "cycleqd 4": {"algorithm": "cycleqd", "bins": 3, "in_flight": 4},
    "map": {"algorithm": "map", "samples": 8, "batch": 3},
    "layers": {"algorithm": "layers", "by": {"algorithm": "tpe", "startup": 5}},
    "layers prune": {
        "algorithm": "layers",
        "genome": "prune",
        "remove": [0, 2],
        "by": {"algorithm": "cmaes", "population": 5},
    },
    "layers dataflow": {
        "algorithm": "layers",
        "genome": "dataflow",
        "sources": ["a", "merge", "b"],
        "by": {"algorithm": "nsga2", "population": 5},
    },
    "tpe methods": {"algorithm": "tpe", "startup": 8, "in_flight": 2, "method": ["task_arithmetic", "ties"]},
    "tpe classes": {"algorithm": "tpe", "startup": 5, "tensor_classes": True, "tune": ["lambda"]},
    "cmaes methods": {"algorithm": "cmaes", "population": 4, "method": ["task_arithmetic", "ties", "dare_ties"]},
    "cmaes knots": {"algorithm": "cmaes", "knots": 3, "tune": ["lambda"]},
    "nsga2 methods": {"algorithm": "nsga2", "population": 5, "method": ["task_arithmetic", "ties"]},
    "nsga3": {"algorithm": "nsga3", "population": 5},
    "nsga3 methods": {"algorithm": "nsga3", "population": 5, "method": ["task_arithmetic", "ties"]},
    "gp": {"algorithm": "gp", "startup": 25, "tune": ["lambda", "weight", "sign"], "method": "ties"},
    "gp 3": {"algorithm": "gp", "startup": 26, "in_flight": 3, "tune": ["lambda"]},
    "random": {"algorithm": "random", "layer_groups": "per-layer"},
    "random 4": {"algorithm": "random", "in_flight": 4, "method": ["task_arithmetic", "ties"]},
    "qmc": {"algorithm": "qmc", "method": "ties", "tune": ["lambda", "sign", "weight"]},
    "qmc methods": {"algorithm": "qmc", "in_flight": 2, "method": ["task_arithmetic", "ties"]},
    "genetic": {"algorithm": "genetic", "population": 5, "method": "ties", "tune": ["lambda", "density", "sign"]},
    "genetic steps": {
        "algorithm": "genetic",
        "population": 5,
        "steps": 10,
        "method": "ties",
        "tune": ["density"],
        "tensor_classes": True,
        "layer_groups": "per-layer",
    },
    "signed": {"algorithm": "signed", "population": 5, "sparsity": 8},
    "signed scaling": {"algorithm": "signed", "population": 5, "sparsity": 0, "reach": 0.2},
    "policy": {"algorithm": "policy", "population": 4, "rate": 1.0},
    "policy swaps": {"algorithm": "policy", "population": 5, "edits": False, "merges": [], "ends": "b"},
    "consistency": {"algorithm": "consistency", "step": 0.05, "target": "a", "source": "c"},
    "hi_merging": {"algorithm": "hi_merging", "tune": "none", "keep": "better"},
    "hi_merging tuned": {"algorithm": "hi_merging", "alpha": 2.0},
    "adamerging": {"algorithm": "adamerging", "steps": 12, "items": 4},
    "expert_merging": {"algorithm": "expert_merging", "steps": 12, "items": 4, "redraw": True},
    "expert_merging chunks": {"algorithm": "expert_merging", "steps": 6, "items": 4, "chunks": 1.5, "power": 2.0},
    "fw_merging": {"algorithm": "fw_merging", "steps": 12, "items": 4},
    "concrete": {"algorithm": "concrete", "steps": 12, "items": 4, "parts": 2, "per": "tensor"},
    "concrete learn": {"algorithm": "concrete", "steps": 4, "after": 4, "items": 4, "learn": True},
    "defense_aware": {"algorithm": "defense_aware", "steps": 4, "after": 4, "items": 4},
    "adamerging tensor": {"algorithm": "adamerging", "per": "tensor", "steps": 12, "items": 4},
    "grid": {"algorithm": "grid", "levels": 3},
    "grid methods": {"algorithm": "grid", "levels_of": {"lambda": 5}, "method": ["task_arithmetic", "ties"]},
}
CONFIGURATIONS = ORDERED | {
    "portfolio of all": {"algorithm": "portfolio"},
    "halving tpe": HALVING | {"of": ORDERED["tpe"]},
    "halving cmaes 5": HALVING | {"of": ORDERED["cmaes 5"], "batch": 3},
    "halving nsga2": HALVING | {"of": ORDERED["nsga2"], "batch": 5},
    "halving layers": HALVING | {"of": ORDERED["layers"]},
    "halving evolver": HALVING | {"of": ORDERED["evolver generational evolver"]},
    "halving shade": HALVING | {"of": ORDERED["shade reduced"]},
    "halving evolution strategy": HALVING | {"of": ORDERED["evolution strategy"]},
    "halving soup": HALVING | {"of": ORDERED["soup"]},
    "halving pso": HALVING | {"of": ORDERED["pso"]},
    "halving ga": HALVING | {"of": ORDERED["ga"], "batch": 5},
    "halving cycleqd": HALVING | {"of": ORDERED["cycleqd"]},
    "halving genetic": HALVING | {"of": ORDERED["genetic"], "batch": 5},
    "halving signed": HALVING | {"of": ORDERED["signed"]},
    "halving policy": HALVING | {"of": ORDERED["policy"]},
    "halving map": HALVING | {"of": ORDERED["map"], "batch": 3},
    "halving evolver merger": HALVING | {"of": ORDERED["evolver generational merger evolver"]},
}


def test_every_search_is_held_to_the_laws():
    held = {c["algorithm"] for c in CONFIGURATIONS.values()}
    for name in SEARCHES:
        assert name in held, f"the search {name!r} is held to no law; add a configuration of it in tests/test_search.py"
    assert held == set(SEARCHES)


EVERY = pytest.mark.parametrize("settings", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
EVERY_ORDERED = pytest.mark.parametrize("settings", ORDERED.values(), ids=ORDERED.keys())


def experts_for(settings):
    inner = settings.get("of", settings)
    return 6 if inner.get("strategy") == "rand/2" or inner["algorithm"] == "soup" else 4


def score(candidate):
    """A score that only the recipe decides."""
    return int(candidate.recipe.id[:8], 16) / 16**8


def answer(candidate, failing=False):
    """What a worker would say: it stops early where the score is not above the bar, and some candidates fail."""
    value = score(candidate)
    if failing and value < 0.3:
        return Result(candidate.number, candidate.recipe.id, "failed", reason="boom")
    if candidate.question.bar is not None and value <= candidate.question.bar:
        return Result(candidate.number, candidate.recipe.id, "ok", None, candidate.question.bar, False, (value,) * 3)
    if candidate.question.limit is not None:
        told = Result(
            candidate.number, candidate.recipe.id, "ok", None, 1.0, False, (value,) * candidate.question.limit
        )
        return told if candidate.question.loss is None else replace(told, loss=1.0, gradient=slopes(candidate))
    return Result(
        candidate.number,
        candidate.recipe.id,
        "ok",
        value,
        value,
        True,
        (value,) * 10,
        {"one": value, "other": 1 - value},
    )


def slopes(candidate):
    """A gradient that depends on the model and on which items it is taken."""
    draw = random.Random(f"{candidate.recipe.id}:{candidate.question.order}")
    return tuple(draw.gauss(0, 1) for _ in range(len(candidate.recipe.rules) * len(candidate.recipe.inputs)))


def simulate(search, workers=1, order=None, failing=False, reply=answer):
    """Run a search on simulated workers that finish in random order; all candidates by number."""
    draw = random.Random(order)
    flying, asked = [], []
    while not search.done:
        new = search.ask(workers - len(flying))
        assert len(new) <= workers - len(flying)
        asked += new
        flying += new
        if not flying:
            assert search.done, "the search waits for nothing and is not done"
            break
        for _ in range(draw.randint(1, len(flying)) if order is not None else 1):
            candidate = flying.pop(draw.randrange(len(flying)) if order is not None else 0)
            search.tell(reply(candidate, failing))
    assert not flying
    assert search.ask(5) == []
    return asked


def ids(candidates):
    return [(c.number, c.recipe.id, c.question.bar, c.parents, c.proposer) for c in candidates]


def every_search(settings, **more):
    long = {"candidates": 120} if settings["algorithm"] == "hi_merging" else {}  # its last candidates are the merges
    return build(settings, experts=experts_for(settings), **{**long, **more})


@pytest.mark.whole
@EVERY
@pytest.mark.parametrize("failing", [False, True], ids=["", "failing"])
def test_workers_timing_and_failures_change_nothing(settings, failing):
    alone = ids(simulate(every_search(settings), failing=failing))
    assert len({c[0] for c in alone}) == len(alone) > 10
    for workers, order in ((1, 1), (8, 2), (8, 3), (3, 4)):
        assert ids(simulate(every_search(settings), workers, order, failing)) == alone


@EVERY
def test_a_replay_of_a_recorded_run_gives_its_candidates(settings):
    """As resume does: every result is told as soon as its candidate was asked."""
    recorded = {c.number: answer(c) for c in simulate(every_search(settings), 4, 1)}
    search = every_search(settings)
    replayed = []
    while not search.done:
        for candidate in search.ask(1):
            replayed.append(candidate)
            assert recorded[candidate.number].recipe_id == candidate.recipe.id
            search.tell(recorded[candidate.number])
    assert len(replayed) == len(recorded)


# Results that are learnt as they come: with their ranks, as the ledger gives them.


def arriving(search, workers, order):
    """Simulated workers that finish in random order: the candidates, and the results with their ranks."""
    results = []

    def rank(candidate, failing):
        results.append(replace(answer(candidate, failing), rank=len(results)))
        return results[-1]

    return simulate(search, workers, order, reply=rank), {r.number: r for r in results}


@pytest.mark.whole
@EVERY_ORDERED
@pytest.mark.parametrize("order", range(3))
def test_a_replay_repeats_the_order_of_arrival(settings, order):
    """As resume does: every result is told as soon as its candidate was asked, with the rank that it had."""
    asked, recorded = arriving(every_search(settings, arrival=True), 4, order)
    search, replayed = every_search(settings, arrival=True), []
    while not search.done:
        for candidate in search.ask(1):
            replayed.append(candidate)
            search.tell(recorded[candidate.number])
    assert ids(replayed) == ids(asked)


def without(search, slow):
    """Ask and tell for as long as possible while one candidate takes for ever; how many were told."""
    told = 0
    while new := [c for c in search.ask(3) if c.number != slow]:
        for candidate in new:
            search.tell(replace(answer(candidate), rank=told))
            told += 1
    return told


@pytest.mark.parametrize(
    "settings", [EVOLVER | STEADY | {"generations": 9}, {"algorithm": "tpe", "startup": 5, "in_flight": 3}]
)
def test_nobody_waits_for_a_slow_one(settings):
    assert without(every_search(settings, arrival=True, candidates=40), slow=5) == 39
    assert without(every_search(settings, candidates=40), slow=5) < 10


SEEDLESS = ("soup", "consistency", "hi_merging")  # they draw nothing at random


@EVERY
def test_another_seed_gives_other_candidates(settings):
    one, two = ([c.recipe.id for c in simulate(every_search(settings, seed=s))] for s in (0, 1))
    assert (one == two) == (settings.get("of", settings)["algorithm"] in SEEDLESS)


@EVERY
def test_all_candidates_may_fail(settings):
    def failed(candidate, _):
        return Result(candidate.number, candidate.recipe.id, "failed", reason="boom")

    asked = simulate(every_search(settings), 3, 5, reply=failed)
    assert len(asked) > 10
    assert all(c.question.bar is None for c in asked)


@EVERY_ORDERED
def test_candidates_are_counted(settings):
    asked = simulate(every_search(settings), 4, 1)
    assert [c.number for c in asked] == list(range(len(asked)))


@EVERY_ORDERED
def test_the_budget_of_candidates_is_kept(settings):
    for count in (1, 7, 12):
        search = every_search(settings, candidates=count)
        assert search.total == count
        assert len(simulate(search, 4, 1)) == count


@EVERY_ORDERED
@pytest.mark.parametrize("order", [None, 1])
def test_the_budget_of_items_is_kept(settings, order):
    """Nothing is proposed once the results that a candidate waits for have cost the budget; workers change nothing."""
    asked = simulate(every_search(settings, items=60), 4, order)
    assert ids(asked) == ids(simulate(every_search(settings, items=60)))
    assert len(asked) > 1
    costs = [answer(c).cost for c in asked]
    search = every_search(settings, items=60)
    assert sum(costs[: search.waits_for(asked[-1].number)]) < 60
    assert sum(costs) >= 60 or len(asked) == search.total


@EVERY
def test_the_budget_of_items_ends_a_replay_too(settings):
    """Results that are told at once, as on resume, leave no candidate over that nobody will ever hear of again."""
    for items in (1, 10, 35):
        search, count = every_search(settings, items=items), 0
        for _ in range(99):
            for candidate in search.ask(1):
                search.tell(answer(candidate))
                count += 1
        assert search.done
        assert count == len(simulate(every_search(settings, items=items), 4, 1))


@EVERY
def test_reused_results_cost_nothing(settings):
    def reused(candidate, _):
        told = Result(candidate.number, candidate.recipe.id, "ok", 0.5, 0.5, True, (0.5,) * 10, reused=True)
        return told if candidate.question.loss is None else replace(told, gradient=slopes(candidate))

    asked = simulate(every_search(settings, items=10, candidates=9), reply=reused)
    assert len({c.recipe.id for c in asked}) == 9


@EVERY
def test_what_is_told_is_not_changed(settings):
    search = every_search(settings)
    told = []

    def remember(candidate, _):
        told.append((answer(candidate), answer(candidate)))
        return told[-1][0]

    simulate(search, reply=remember)
    assert all(given == copy for given, copy in told)


def test_asking_for_none_gives_none():
    search = build(EVOLVER)
    assert search.ask(0) == []
    assert len(search.ask(99)) == 4  # the experts; what comes after has to wait
    assert search.ask(99) == []


# --- The released algorithm, written down a second time (reference/evolver.md, section 1.1). The searches' own draws
# stand in for the released generator; everything else is independent of evolver/search.


def child(population, i, r, draw):
    return Cross(population[i], (population[r],), "evolver", 0.5, 0.5, draw.getrandbits(32))


def released_alone(experts, generations, seed, dev):
    x, out = list(experts), list(experts)
    s = [dev(m) for m in x]
    n = len(x)
    for t in range(generations):
        for i in range(n):
            draw = random.Random(f"{seed}:evolver:{len(out)}")
            p = 0.5 + 0.5 / (generations - t)
            uniform = draw.random() < p
            r = draw.sample([j for j in range(n) if j != i], 1)[0]
            if not uniform:
                r = max((j for j in range(n) if j != i), key=lambda j: s[j])
            u = child(x, i, r, draw)
            out.append(u)
            if dev(u) > s[i]:
                x[i], s[i] = u, dev(u)
    return out


def released_merged(experts, generations, seed, dev):
    x = list(experts)
    out = [Merge("simple", tuple(x), BASE)]
    s = dev(out[0])
    n = len(x)
    for t in range(generations):
        order = list(range(n))
        random.Random(f"{seed}:order:{t}").shuffle(order)
        for i in order:
            draw = random.Random(f"{seed}:merged:{len(out)}")
            r = draw.sample([j for j in range(n) if j != i], 1)[0]
            u = child(x, i, r, draw)
            out.append(Merge("simple", (*x[:i], u, *x[i + 1 :]), BASE))
            if dev(out[-1]) > s:
                x[i], s = u, dev(out[-1])
    return out


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("merger", [None, {"method": "simple"}])
@pytest.mark.parametrize("early_stopping", [True, False])
def test_evolver_is_the_released_algorithm(seed, merger, early_stopping):
    settings = {"algorithm": "evolver", "generations": 5} | ({"merger": merger} if merger else {})
    search = build(settings, seed, early_stopping=early_stopping, candidates=99)
    asked = simulate(search)
    reference = released_merged if merger else released_alone
    wanted = reference(EXPERTS[:4], 5, seed, lambda recipe: int(recipe.id[:8], 16) / 16**8)
    assert [c.recipe.id for c in asked] == [r.id for r in wanted]
    assert any(c.question.bar is not None for c in asked) == early_stopping


def test_the_best_leads_early_and_never_at_the_end():
    """Of 4 members, a random partner is the best other one in 1 of 3 cases. T = 15: p = 0.53 at first, 1 at last.

    So the best leads 0.47 + 0.53 / 3 = 64 % of the first generation and 33 % of the last; of 4 · 150 candidates each,
    5 standard deviations are 10 points.
    """
    best = EXPERTS[3]
    led = {0: 0, 14: 0}
    for seed in range(150):
        search = build({"algorithm": "evolver", "generations": 15}, seed, candidates=999)

        def reply(candidate, _):
            value = 0.9 if candidate.recipe == best else 0.5 if candidate.number < 4 else 0.1
            return Result(candidate.number, candidate.recipe.id, "ok", value, value, True)

        for c in simulate(search, reply=reply):
            generation = (c.number - 4) // 4
            if c.number >= 4 and generation in led and c.recipe.parent != best:
                led[generation] += c.recipe.partners == (best,)
    assert abs(led[0] / 450 - 0.644) < 0.115
    assert abs(led[14] / 450 - 0.333) < 0.115


def test_a_generation_challenges_a_frozen_population():
    """Every child wins: in generational mode the parents are still the members of the generation before."""

    def reply(candidate, _):
        return Result(candidate.number, candidate.recipe.id, "ok", float(candidate.number), None, True)

    asked = simulate(build(EVOLVER | {"mode": "generational"}), 4, 1, reply=reply)
    for k in range(4, len(asked)):
        generation = {c.recipe for c in asked[k - k % 4 - 4 : k - k % 4]}
        assert asked[k].recipe.parent == asked[k - 4].recipe
        assert set(asked[k].recipe.inputs) <= generation
    asked = simulate(build(EVOLVER), reply=reply)
    assert asked[5].recipe.parent == EXPERTS[1]
    assert asked[4].recipe in [p for c in asked[5:8] for p in c.recipe.partners] + [asked[8].recipe.parent]


def test_a_child_replaces_its_parent_only_when_it_is_better():
    def equal(candidate, _):
        return Result(candidate.number, candidate.recipe.id, "ok", 0.5, 0.5, True)

    asked = simulate(build(EVOLVER), reply=equal)
    assert {c.recipe.parent for c in asked[4:]} == set(EXPERTS[:4])
    assert all(c.question.bar == 0.5 for c in asked[4:])


@pytest.mark.parametrize(("strategy", "partners"), [("evolver", 1), ("rand/1", 3), ("best/1", 3), ("rand/2", 5)])
def test_partners_are_different_members_and_never_the_parent(strategy, partners):
    settings = check_section(SEARCHES["evolver"].settings, {"algorithm": "evolver", "strategy": strategy}, "f")
    for seed in range(50):
        for leader in (None, 1, 2):
            found = offspring(list(EXPERTS), 1, leader, settings, random.Random(seed))
            assert len({*found.partners, found.parent}) == partners + 1
            assert found.parent == EXPERTS[1]
            assert leader != 2 or found.partners[0] == EXPERTS[2]


@EVERY_ORDERED
@pytest.mark.parametrize("early_stopping", [True, False])
def test_a_race_is_given_the_incumbent_s_items(settings, early_stopping):
    """Those of the model whose score is the bar; without racing, or without a bar, none."""

    def reply(candidate, _):
        result = answer(candidate)
        items = tuple(result.score * k for k in (0.5, 1.5)) if result.complete else result.items
        return Result(result.number, result.recipe_id, "ok", result.score, result.bound, result.complete, items)

    more = {"early_stopping": early_stopping, "candidates": 30}
    plain = simulate(every_search(settings, **more), 4, 1, reply=reply)
    raced = simulate(every_search(settings, racing=True, **more), 4, 1, reply=reply)
    assert ids(raced) == ids(plain)
    assert not any(c.question.rival for c in plain)
    for candidate in raced:
        bar = candidate.question.bar
        assert candidate.question.rival == (() if bar is None else (bar * 0.5, bar * 1.5))
        assert (candidate.question.order == "") == (bar is None) or candidate.question.loss is not None
    orders = [c.question.order for c in raced if c.question.bar is not None]
    assert len(set(orders)) == len(orders)
    assert any(c.question.rival for c in raced) == (early_stopping and SEARCHES[settings["algorithm"]].incumbent)


def test_strategies_that_need_more_experts_are_refused():
    with pytest.raises(
        BadInput,
        match=r"^search\.strategy: rand/2 needs a population of 6, and there are 4 experts; write population: 6",
    ):
        build(EVOLVER | {"strategy": "rand/2"})
    with pytest.raises(BadInput, match=r"^search\.strategy: rand/2 .* of 6, and search.population is 5; write"):
        build(EVOLVER | {"strategy": "rand/2", "population": 5})
    with pytest.raises(BadInput, match=r"search\.startegy: unknown key; did you mean 'strategy'"):
        build(EVOLVER | {"startegy": "rand/2"})


def quadratic(candidate, _=False):
    """Best at mass 1.5 and weights 0.6, 0.2, 0.1, 0.1."""
    values = candidate.recipe.settings("norm.weight", None)
    far = (values["lambda"] - 1.5) ** 2
    far += sum((w - t) ** 2 for w, t in zip(values["weight"], (0.6, 0.2, 0.1, 0.1), strict=True))
    return Result(candidate.number, candidate.recipe.id, "ok", -far, -far, True)


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "tpe"},
        {"algorithm": "tpe", "in_flight": 4},
        {"algorithm": "cmaes"},
        {"algorithm": "genetic", "population": 10},
    ],
)
def test_coefficient_searches_improve(settings):
    """The best of 60 is nearer to the optimum than the best of the first 10, and the last 20 are on average, too."""
    for seed in (0, 1):
        scores = [quadratic(c).score for c in simulate(build(settings, seed, candidates=60), reply=quadratic)]
        assert max(scores[10:]) > max(scores[:10])
        assert sum(scores[40:]) / 20 > sum(scores[:10]) / 10


@pytest.mark.parametrize("settings", [{"algorithm": "tpe"}, {"algorithm": "cmaes"}])
def test_coefficient_searches_start_at_the_average(settings):
    first = build(settings).ask(1)[0].recipe.settings("w", 0)
    assert first["weight"] == pytest.approx((0.25,) * 4)
    assert first["lambda"] == pytest.approx(1.0)


def test_as_many_in_flight_as_promised():
    assert len(build({"algorithm": "tpe", "in_flight": 4}).ask(99)) == 4
    cmaes = build({"algorithm": "cmaes", "population": 5})
    first = cmaes.ask(99)
    assert len(first) == 1
    cmaes.tell(quadratic(first[0]))
    assert len(cmaes.ask(99)) == 5


def test_a_search_of_two_objectives_spreads_over_their_front():
    """One objective falls with the mass from 1 on and the other one grows: all masses are on the front."""

    def torn(candidate, _=False):
        mass = candidate.recipe.settings("norm.weight", None)["lambda"]
        tasks = {"one": -mass, "other": mass}
        return Result(candidate.number, candidate.recipe.id, "ok", 0.0, 0.0, True, tasks=tasks)

    search = build({"algorithm": "nsga2", "population": 8}, candidates=40)
    masses = [c.recipe.settings("norm.weight", None)["lambda"] for c in simulate(search, reply=torn)]
    assert max(masses[20:]) - min(masses[20:]) > 1
    assert len(search.study.best_trials) > 10
    assert len(build({"algorithm": "nsga2", "population": 8}).ask(99)) == 8


def test_several_objectives_need_several_tasks(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "TASKS", ("one",))
    with pytest.raises(BadInput, match=r"search.algorithm: nsga2 needs at least two tasks"):
        build({"algorithm": "nsga2"})


def test_the_population_of_cmaes():
    """4 + ⌊3 ln 5⌋ = 4 + ⌊4.83⌋ = 8; 4 + ⌊3 ln 1⌋ = 4."""
    assert default_population(5) == 8
    assert default_population(1) == 4


def test_a_list_proposes_what_it_holds():
    listed = Listed([(n, e) for n, e in zip("xyz", EXPERTS, strict=False)], "report")
    assert [c.label for c in listed.ask(2)] == ["x", "y"]
    rest = listed.ask(9)
    assert [(c.number, c.label, c.stage, c.split) for c in rest] == [(2, "z", "report", "report")]
    for k in (2, 0, 1):
        assert not listed.done
        listed.tell(Result(k, EXPERTS[k].id, "ok", float(k), None, True))
    assert listed.done
    assert listed.results["z"].score == 2.0


def test_cmaes_tunes_numbers_only():
    with pytest.raises(
        BadInput, match=r"^search\.tune: cmaes can only tune numbers, and sign is a choice among words; fix it in"
    ):
        build({"algorithm": "cmaes", "method": "ties", "tune": ["lambda", "sign"]})


def test_a_choice_that_pays_is_found():
    search = build({"algorithm": "tpe", "startup": 8, "method": "ties", "tune": ["sign", "elect"]}, candidates=30)
    chosen = []
    while not search.done:
        (candidate,) = search.ask(1)
        found = candidate.recipe.settings("model.layers.0.w", 0)
        chosen.append((found["sign"], found["elect"]))
        score = 0.5 * (found["sign"] == "count") + 0.25 * (found["elect"] == "raw")
        search.tell(Result(candidate.number, candidate.recipe.id, "ok", score, score, True))
    assert chosen[0] == ("mass", "weighted")  # the defaults first
    assert chosen[15:].count(("count", "raw")) > 7  # most of the time; by chance it were a quarter
