"""Settings of a merger that evolve beside the population: steps in the range, and a mass that finds its place."""

import itertools
import math
import random
import statistics

import pytest
import torch
from test_search import BASE, EVOLVER, EXPERTS, build, simulate

from evolver.errors import BadInput
from evolver.merging.crossing import cross
from evolver.records import Knob, Result
from evolver.records.recipe import Cross, Merge, ancestors
from evolver.search.continued import continued
from evolver.search.evolution.adapting import AdaptingSettings

TASK_ARITHMETIC = {"method": "task_arithmetic", "weight": 0.25, "lambda": 1.5}
ADAPTING = EVOLVER | {"merger": TASK_ARITHMETIC, "adapt": ["lambda"]}
MASS, DENSITY = Knob("lambda", 0.2, 3.0, log=True), Knob("density", 0.05, 1.0)


def mass_of(recipe):
    return recipe.settings("w", None)["lambda"]


def test_steps_are_normal_on_the_scale_of_the_setting():
    """Around the middle, with a step of 0.02 of the range, no draw is reflected. The step itself is drawn, too:
    √E[exp(2 N/√2)] = exp(1/2) times as wide on average; 4,000 draws tell that within a tenth.
    """
    middle = {"lambda": math.sqrt(0.2 * 3.0), "density": 0.525}
    start = AdaptingSettings((MASS, DENSITY), middle, 0.02)
    draw = random.Random(0)
    found = [start.varied(draw) for _ in range(4000)]
    logs = [math.log(f.values["lambda"] / middle["lambda"]) / math.log(3.0 / 0.2) for f in found]
    plain = [(f.values["density"] - 0.525) / 0.95 for f in found]
    for moves in (logs, plain):
        assert abs(statistics.mean(moves)) < 4 * statistics.pstdev(moves) / math.sqrt(4000)
        assert statistics.pstdev(moves) == pytest.approx(0.02 * math.exp(0.5), rel=0.1)
    steps = [math.log(f.step / 0.02) for f in found if f.step > 0.01]
    assert statistics.pstdev([math.log(f.step / 0.02) for f in found]) == pytest.approx(1 / math.sqrt(2), rel=0.15)
    assert len(steps) < 4000  # a few would have been smaller than the smallest step


def test_settings_stay_in_their_ranges():
    at_the_ends = AdaptingSettings((MASS, DENSITY), {"lambda": 3.0, "density": 0.05}, 0.5)
    draw = random.Random(1)
    found = [at_the_ends.varied(draw) for _ in range(2000)]
    for knob in (MASS, DENSITY):
        values = [f.values[knob.name] for f in found]
        assert knob.low <= min(values) < max(values) <= knob.high
        assert len(set(values)) > 1900  # reflected, not cut off
    assert all(0.01 <= f.step <= 0.5 for f in found)


def test_half_of_the_candidates_vary_settings_and_the_others_a_member():
    """Of 400, 200 are expected; 5 standard deviations are 50."""

    def never(candidate, _):
        score = 0.5 if candidate.number == 0 else 0.1
        return Result(candidate.number, candidate.recipe.id, "ok", score, score, True)

    first, *others = simulate(build(ADAPTING | {"generations": 100}, candidates=401), reply=never)
    tuned = [c for c in others if c.proposer == "evolver+settings"]
    assert abs(len(tuned) - 200) < 50
    assert {c.recipe.inputs for c in tuned} == {EXPERTS[:4]}
    assert {c.parents for c in tuned} == {(first.recipe.id,)}
    assert len({mass_of(c.recipe) for c in tuned}) == len(tuned)
    assert all(mass_of(c.recipe) == 1.5 and c.recipe.inputs != EXPERTS[:4] for c in others if c not in tuned)


def test_what_is_accepted_is_kept():
    def always(candidate, _):
        return Result(candidate.number, candidate.recipe.id, "ok", float(candidate.number), None, True)

    search = build(ADAPTING, candidates=13)
    asked = simulate(search, reply=always)
    for one, other in itertools.pairwise(asked):
        same = one.recipe.inputs == other.recipe.inputs, mass_of(one.recipe) == mass_of(other.recipe)
        assert same == ((True, False) if other.proposer == "evolver+settings" else (False, True))


def test_without_adapt_nothing_is_drawn_for_settings():
    fixed = simulate(build(EVOLVER | {"merger": TASK_ARITHMETIC}))
    assert {mass_of(c.recipe) for c in fixed} == {1.5}
    assert {c.proposer for c in fixed} == {"evolver/initial", "evolver+merger"}


def test_true_adapts_all_numbers_that_a_search_can_tune():
    search = build(EVOLVER | {"merger": {"method": "dare_ties", "density": 0.5}, "adapt": True})
    assert [k.name for k in search.merge.knobs] == ["density", "lambda"]
    assert search.merge.start == {"density": 0.5, "lambda": 1.0}
    tuned = [c.recipe.settings("w", None) for c in simulate(search) if c.proposer == "evolver+settings"]
    for name in ("density", "lambda"):
        assert len({found[name] for found in tuned}) == len(tuned) > 2


def test_a_search_goes_on_with_the_numbers_of_the_best_model():
    listed = simulate(build(ADAPTING, candidates=8))
    more = build(ADAPTING, candidates=4)
    both = continued(listed, more)
    asked = simulate(both)
    best = max(listed, key=lambda c: int(c.recipe.id[:8], 16))
    assert asked[8].recipe == best.recipe
    assert more.merge.parts_of(best.recipe) == (best.recipe.inputs, {"lambda": mass_of(best.recipe)})
    assert more.merge.parts_of(EXPERTS[0]) is None
    assert more.merge.parts_of(Merge("task_arithmetic", EXPERTS[:4], BASE)) is None
    assert build(EVOLVER | {"merger": TASK_ARITHMETIC}).merge.parts_of(best.recipe) is None


@pytest.mark.parametrize(
    ("search", "sentence"),
    [
        ({"merger": {"method": "simple"}, "adapt": True}, r"^search\.adapt: simple has no number that could adapt"),
        ({"adapt": ["mass"]}, r"^search\.adapt: task_arithmetic has no number to adapt called 'mass'; .*lambda"),
        ({"adapt": ["weight"]}, r"^search\.adapt: task_arithmetic has no number to adapt called 'weight'"),
        ({"adapt": ["lambda", "lambda"]}, r"^search\.adapt: a setting is listed twice"),
        (
            {"merger": {"method": "task_arithmetic", "lambda": 0.1}},
            r"^search\.merger\.lambda: 0\.1 lies outside .* write a number from 0\.2 to 3, or leave lambda out of",
        ),
        (
            {"merger": {"method": "task_arithmetic", "lambda": [0.5, 1.0]}},
            r"^search\.merger\.lambda: lambda adapts, so it starts with one number for the whole model",
        ),
    ],
)
def test_what_cannot_adapt_is_refused(search, sentence):
    with pytest.raises(BadInput, match=sentence):
        build(ADAPTING | search)


# --- A toy with weights, whose best total mass is 1.


class Toy:
    """Four experts of 500 weights. Wanted is a mixture of them that is not quite the average, so the best total mass is
    1, and some populations merge into a better model than the experts do.
    """

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        common = torch.randn(500, generator=generator)
        experts = torch.stack([common + torch.randn(500, generator=generator) for _ in range(4)])
        self.known = {e.id: w for e, w in zip(EXPERTS, experts, strict=False)}
        self.average = experts.mean(0)
        self.wanted = torch.tensor([0.4, 0.3, 0.2, 0.1]) @ experts

    def worth(self, model):
        return -float((model - self.wanted).square().mean())

    def built(self, recipe):
        known = dict(self.known)
        for node in ancestors(recipe):
            if isinstance(node, Cross):
                parent, *partners = (known[i.id] for i in node.inputs)
                known[node.id] = cross(node.strategy, parent, partners, node.F, node.Cr, node.seed, "w")
            elif isinstance(node, Merge):
                found = node.settings("w", None)
                sums = [w * known[i.id] for w, i in zip(found["weight"], node.inputs, strict=True)]
                known[node.id] = found["lambda"] * torch.stack(sums).sum(0)
        return known[recipe.id]

    def result(self, candidate, _=False):
        score = self.worth(self.built(candidate.recipe))
        return Result(candidate.number, candidate.recipe.id, "ok", score, score, True)


def best_of(toy, seed, **more):
    settings = EVOLVER | {"merger": TASK_ARITHMETIC, "generations": 15} | more
    asked = simulate(build(settings, seed, candidates=61), reply=toy.result)
    best = max(asked, key=lambda c: toy.result(c).score)
    return toy.result(best).score, mass_of(best.recipe)


@pytest.mark.parametrize("seed", range(8))
def test_a_wrong_mass_is_mended(seed):
    """Fixed at 1.5, the mass leaves the search below the plain average; adapting, it does not, and comes near to 1."""
    toy = Toy(seed)
    average = toy.worth(toy.average)
    fixed, _ = best_of(toy, seed)
    found, mass = best_of(toy, seed, adapt=["lambda"])
    assert fixed < average <= found
    assert abs(mass - 1) < 0.1
