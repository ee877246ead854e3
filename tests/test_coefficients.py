"""Searches over coefficients: references for each sampler, several methods, and that models beat chance."""

import itertools
import math
import statistics
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import optuna
import pytest
from optuna.samplers._tpe.sampler import default_gamma, default_weights
from scipy import stats
from test_search import ORDERED, TASKS, Means, answer, build, ids, maker, quadratic, score, simulate

from evolver.config import Budget
from evolver.config.reading import check_section
from evolver.errors import BadInput
from evolver.records import Knob, Result
from evolver.records.recipe import Expert, Merge, Rule
from evolver.search import SEARCHES
from evolver.search.base import Setup
from evolver.search.coefficients.nsga3 import default_divisions
from evolver.search.continued import continued

METHODS = ["task_arithmetic", "ties"]


def masses(candidates, name="norm.weight"):
    return [c.recipe.settings(name, None)["lambda"] for c in candidates]


# References


def test_random_draws_are_uniform():
    """Of the mass on its log scale, and of each weight: one of four that are uniform on the simplex is Beta(1, 3)."""
    asked = simulate(build({"algorithm": "random"}, candidates=401))[1:]
    shares = [math.log(m / 0.2) / math.log(3.0 / 0.2) for m in masses(asked)]
    assert stats.kstest(shares, "uniform").pvalue > 0.001
    weights = [c.recipe.settings("w", 0)["weight"][2] for c in asked]
    assert stats.kstest(weights, stats.beta(1, 3).cdf).pvalue > 0.001


@pytest.mark.parametrize("name", ["random", "qmc", "grid"])
@pytest.mark.parametrize("method", ["ties", METHODS], ids=["one", "several"])
def test_how_many_are_in_flight_changes_no_candidate(name, method):
    settings = {"algorithm": name, "method": method}
    every = [
        ids(simulate(build(settings | more), 8, 1)) for more in ({}, {"in_flight": 1}, {"in_flight": 5})
    ]  # fmt: skip
    assert every[0] == every[1] == every[2]
    assert len(build(settings).ask(99)) == 30
    assert len(build(settings | {"in_flight": 5}).ask(99)) == 5
    assert len(build(settings, items=1000).ask(99)) == 1  # each result may be the last one


@pytest.mark.parametrize("name", ["random", "qmc", "grid"])
def test_results_are_not_kept_to_the_end(name):
    search = build({"algorithm": name}, candidates=None, minutes=5.0)
    for candidate in search.ask(20):
        search.tell(answer(candidate))
    assert not search._told


def test_a_sobol_sequence_is_even():
    """Each of the first 16 points is in another sixteenth of every dimension, and every half of the space has 8."""
    search = build({"algorithm": "qmc"}, candidates=17)
    points = [t.params for t in _asked(search)][1:]
    for knob in search.space.knobs:
        scale = math.log if knob.log else float
        low, high = scale(knob.low), scale(knob.high)
        shares = [(scale(p[knob.name]) - low) / (high - low) for p in points]
        assert sorted(int(16 * s) for s in shares) == list(range(16))


def _asked(search):
    simulate(search)
    return search.study.trials


def test_several_methods_take_turns_in_a_sobol_sequence():
    asked = simulate(build({"algorithm": "qmc", "method": METHODS}))
    assert [c.recipe.method for c in asked] == METHODS * 15
    assert [c.recipe.settings("w", 0)["weight"] for c in asked[:2]] == [pytest.approx((0.25,) * 4)] * 2


def test_a_grid_is_all_of_its_points_once():
    """5 masses, and weights of three experts in thirds: C(5, 2) = 10."""
    settings = {"algorithm": "grid", "levels": 4, "levels_of": {"lambda": 5}}
    search = build(settings, experts=3, candidates=99)
    assert search.total == search.points == 50
    asked = simulate(search, 4, 1)
    found = {(round(c.recipe.settings("w", 0)["lambda"], 6), c.recipe.settings("w", 0)["weight"]) for c in asked}
    assert len(found) == len(asked) == 50
    assert search.ended == "search"
    mass = sorted({m for m, _ in found})
    assert mass == pytest.approx([0.2 * 15 ** (k / 4) for k in range(5)], abs=1e-6)
    thirds = {tuple(round(3 * w) for w in weights) for _, weights in found}
    assert thirds == {t for t in itertools.product(range(4), repeat=3) if sum(t) == 3}


def test_a_grid_of_several_methods_holds_the_points_of_each():
    settings = {"algorithm": "grid", "levels": 2, "tune": ["lambda", "sign"], "method": METHODS}
    search = build(settings, candidates=99)
    asked = simulate(search)
    assert sorted(c.recipe.method for c in asked) == ["task_arithmetic"] * 2 + ["ties"] * 4
    assert len({c.recipe.id for c in asked}) == search.points == 6


def test_a_larger_budget_goes_on_in_the_same_order():
    small, large = (simulate(build({"algorithm": "grid"}, candidates=n)) for n in (10, 25))
    assert ids(large)[:10] == ids(small)


def test_a_grid_that_is_larger_than_the_budget_says_so():
    (said,) = build({"algorithm": "grid"}, candidates=7).remarks  # 3 masses, C(5, 3) = 10 weights
    assert said.startswith("search: the grid has 30 points, and the budget ends after 7 of them")
    assert build({"algorithm": "grid"}, candidates=30).remarks == ()
    assert "after 4 of them" in build({"algorithm": "grid"}, items=31).remarks[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"levels_of": {"lamda": 3}}, r"^search\.levels_of: nothing called 'lamda' is tuned; did you mean 'lambda'"),
        ({"levels_of": {"lambda": 0}}, r"^search\.levels_of\.lambda: 0 is not usable"),
        ({"levels": 1000}, r"^search\.levels: weights of 4 experts in steps of 1/999 are \d+ combinations"),
    ],
)
def test_grids_that_cannot_be_made_are_refused(settings, said):
    with pytest.raises(BadInput, match=said):
        build({"algorithm": "grid"} | settings)


def test_what_tpe_leaves_to_optuna_is_what_we_rely_on():
    """The same candidates as with every setting written out, those that Optuna calls deprecated among them."""
    sampler = optuna.samplers.TPESampler(
        seed=0, n_startup_trials=5, n_ei_candidates=24, multivariate=True, group=False, constant_liar=False,
        prior_weight=1.0, consider_magic_clip=True, consider_endpoints=False, gamma=default_gamma,
        weights=default_weights,
    )  # fmt: skip
    assert [default_gamma(n) for n in (1, 10, 11, 300)] == [1, 1, 2, 25]
    ours, theirs = build({"algorithm": "tpe", "startup": 5}), build({"algorithm": "tpe", "startup": 5})
    theirs.study.sampler = sampler
    assert ids(simulate(ours, reply=quadratic)) == ids(simulate(theirs, reply=quadratic))


def test_reference_directions_are_as_many_as_a_generation_has_candidates():
    """Deb & Jain 2014: p = 12 gives 91 directions for 3 objectives, p = 6 gives 210 for 5."""
    assert default_divisions(3, 91) == 12
    assert default_divisions(3, 90) == 11
    assert default_divisions(5, 210) == 6
    assert default_divisions(2, 12) == 11
    assert default_divisions(8, 4) == 1


# Several methods


def test_each_method_of_cmaes_is_a_search_of_its_own():
    """Every method sees what it would see alone, up to its share of the candidates."""
    settings = {"algorithm": "cmaes", "population": 4}
    both = simulate(build(settings | {"method": METHODS}, candidates=42), 3, 1)
    for method in METHODS:
        alone = simulate(build(settings | {"method": method}, candidates=21))
        assert [c.recipe.id for c in both if c.recipe.method == method] == [c.recipe.id for c in alone]


def test_cmaes_searches_several_methods_at_the_same_time():
    """A generation of one method can be in evaluation while one of the other is."""
    search = build({"algorithm": "cmaes", "population": 4, "method": METHODS})
    first = search.ask(99)
    assert len(first) == 2
    for candidate in first:
        search.tell(answer(candidate))
    generations = search.ask(99)
    assert [c.recipe.method for c in generations] == ["task_arithmetic"] * 4 + ["ties"] * 4
    for candidate in generations[:4]:
        search.tell(answer(candidate))
    assert [c.recipe.method for c in search.ask(99)] == ["task_arithmetic"] * 4


@pytest.mark.parametrize("name", ["tpe", "nsga2", "nsga3"])
def test_a_method_that_pays_is_found(name):
    """One of three is better whatever its settings."""

    def reply(candidate, _=False):
        value = (candidate.recipe.method == "ties") + 0.1 * score(candidate)
        return Result(
            candidate.number, candidate.recipe.id, "ok", value, value, True, tasks=dict.fromkeys(TASKS, value)
        )

    settings = {"algorithm": name, "method": ["task_arithmetic", "ties", "dare_ties"], "tune": ["lambda"]}
    asked = simulate(build(settings, candidates=72), reply=reply)
    assert [c.recipe.method for c in asked[:3]] == settings["method"]
    assert sum(c.recipe.method == "ties" for c in asked[36:]) > 24  # by chance, 12


def test_a_gaussian_process_refuses_several_methods():
    with pytest.raises(
        BadInput, match=r"^search\.method: gp models one set of dimensions, .* name one method, or search"
    ):
        build({"algorithm": "gp", "method": METHODS})


@pytest.mark.parametrize("name", ["tpe methods", "nsga2 methods", "random 4", "qmc methods", "grid methods", "gp"])
def test_searches_go_on_from_the_results_of_others(name):
    listed = simulate(build({"algorithm": "random", "method": "ties", "tune": ORDERED[name].get("tune")}, candidates=6))
    one = continued(listed, build(ORDERED[name], candidates=8))
    again = continued(listed, build(ORDERED[name], candidates=8))
    assert ids(simulate(one)) == ids(simulate(again, 4, 1))


# Constraints


def test_a_gaussian_process_takes_what_is_not_known_to_break_a_constraint():
    """What halving scored in part has no violations; the sampler wants all of every candidate."""
    settings = check_section(SEARCHES["gp"].settings, {"algorithm": "gp", "startup": 3, "tune": ["lambda"]}, "f")
    setup = Setup((), None, 0, Budget(candidates=9), maker(4), Means(), constraints=2)
    search = SEARCHES["gp"].build(setup, settings)

    def reply(candidate, _):
        mass = masses([candidate])[0]
        told = Result(candidate.number, candidate.recipe.id, "ok", mass, mass, True)
        return replace(told, violations={"0": mass - 1.0, "1": -1.0} if candidate.number % 2 else {})

    simulate(search, reply=reply)
    assert all(t.constraints.keys() == {"0", "1"} for t in search.study.trials)


# Models beat chance


@dataclass(frozen=True)
class Box:
    """A space of five numbers from -1 to 1, whose recipes say the numbers."""

    branches = MappingProxyType({})
    knobs = tuple(Knob(f"x{k}", -1.0, 1.0) for k in range(5))

    def space(self, *given):
        return self

    def within(self, branch, values):
        return dict(values)

    def decode(self, values):
        numbers = [values[k.name] for k in self.knobs]
        return Merge("simple", (Expert("a", "aa"),), Expert("base", "00"), (Rule.of({"x": numbers}),))

    def encode(self, recipe):
        return None

    def encode_equal(self, mass):
        return {k.name: 0.9 for k in self.knobs}


OPTIMUM = np.array([0.3, -0.4, 0.1, 0.5, -0.2])
ROTATION = stats.ortho_group.rvs(5, random_state=1)
SCALES = 10.0 ** np.linspace(0, 1, 5)
FUNCTIONS = {
    "sphere": lambda x, draw: -np.sum((x - OPTIMUM) ** 2),
    "rotated ellipsoid": lambda x, draw: -np.sum(SCALES * (ROTATION @ (x - OPTIMUM)) ** 2),
    "noisy steps": lambda x, draw: -np.sum(np.round(5 * (x - OPTIMUM)) ** 2) / 25 + draw.normal(0, 0.05),
}
CANDIDATES = {"tpe": 60, "cmaes": 60, "gp": 30}


def best_of(name, function, seed, candidates):
    """The true value of the candidate that a search found best, of a function whose values may be noisy."""
    settings = {"algorithm": name} | ({"startup": 8} if name == "gp" else {})
    setup = Setup((), None, seed, Budget(candidates=candidates), Box(), Means())
    search = SEARCHES[name].build(setup, check_section(SEARCHES[name].settings, settings, "f"))
    draw, found = np.random.default_rng(seed), []

    def reply(candidate, _):
        x = np.array(dict(candidate.recipe.rules[0].values)["x"])
        value = float(FUNCTIONS[function](x, draw))
        found.append((value, x))
        return Result(candidate.number, candidate.recipe.id, "ok", value, value, True)

    simulate(search, reply=reply)
    _, x = max(found, key=lambda pair: pair[0])
    return float(FUNCTIONS[function](x, _Silent()))


class _Silent:
    def normal(self, mean, deviation):
        return 0.0


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ["tpe", "cmaes", pytest.param("gp", marks=pytest.mark.whole)])
def test_models_beat_chance(name, function):
    """The median of seeds, at the same number of candidates."""
    count = CANDIDATES[name]
    ours, chance = ([best_of(n, function, seed, count) for seed in range(5)] for n in (name, "random"))
    assert statistics.median(ours) > statistics.median(chance)
