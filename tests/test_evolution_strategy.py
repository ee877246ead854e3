"""The evolution strategy: its formulas worked by hand, its trajectory written down a second time, and what it gains."""

import random
import statistics

import numpy as np
import pytest
import torch
from test_search import BASE, EXPERTS, build, simulate

from evolver.errors import BadInput
from evolver.merging.noise import with_noise
from evolver.records import Candidate, Result
from evolver.records.noise import Noise
from evolver.records.recipe import Cross, Merge
from evolver.search.evolution.evolution_strategy import centred_ranks, fitness_of, z_scores

ES = {"algorithm": "evolution_strategy"}
AVERAGE = Merge("simple", EXPERTS[:4], BASE)


def said(candidate, score, **more):
    return Result(candidate.number, candidate.recipe.id, "ok", score, score, True, **more)


def test_equal_scores_share_their_ranks():
    """Ranks 0, 1½, 1½ and 3 of at most 3; and the order of what is given stays."""
    assert centred_ranks([1.0, 2.0, 2.0, 5.0]) == [-0.5, 0.0, 0.0, 0.5]
    assert centred_ranks([5.0, 1.0, 3.0]) == [0.5, -0.5, 0.0]
    assert centred_ranks([2.0] * 4) == [0.0] * 4
    assert centred_ranks([]) == []


def test_z_scores_are_in_standard_deviations():
    """1, 1, 5 and 5: a mean of 3 and a standard deviation of 2."""
    assert z_scores([1.0, 5.0, 5.0, 1.0]) == [-1.0, 1.0, 1.0, -1.0]
    assert z_scores([0.5, 0.5]) == [0.0, 0.0]
    assert z_scores([]) == []


def test_who_keeps_the_constraints_comes_first():
    results = [
        Result(0, "", "ok", 0.9, violations={"0": 0.2}), Result(1, "", "ok", 0.4), Result(2, "", "failed"),
        Result(3, "", "ok", 0.6), Result(4, "", "ok", 0.1, violations={"0": 0.1}),
    ]  # fmt: skip
    found = fitness_of(results)
    assert found == [pytest.approx(0.2), 0.4, None, 0.6, pytest.approx(0.3)]
    scored = [r for r in results if r.score is not None]
    assert sorted(scored, key=lambda r: r.standing) == sorted(scored, key=lambda r: found[r.number])
    assert fitness_of([results[0], results[4]]) == [-0.2, -0.1]


def generation(search, scores):
    """One generation with these scores after the mean's, if that is new; the candidates."""
    asked = search.ask(99)
    for candidate, score in zip(asked, [0.0, *scores][-len(asked) :], strict=True):
        search.tell(said(candidate, score) if score is not None else Result.failed(candidate, "boom"))
    return asked


def test_two_steps_by_hand():
    """Ranks ±½ of one pair, a rate of 2: the step is 2/2 · (½ + ½) = 1; a decay of ¼ then leaves ¾ of it."""
    search = build(ES | {"population": 2, "sigma": 0.5, "learning_rate": 2, "decay": 0.25, "rank": 3})
    mean, plus, minus = generation(search, [0.7, 0.2])
    assert mean.recipe == AVERAGE
    ((seed, _),) = plus.recipe.terms
    assert plus.recipe == Noise(AVERAGE, EXPERTS[:4], BASE, ((seed, 0.5),), "normal", 3)
    assert minus.recipe == Noise(AVERAGE, EXPERTS[:4], BASE, ((seed, -0.5),), "normal", 3)
    mean, plus, _ = generation(search, [0.1, 0.3])
    assert mean.recipe == Noise(AVERAGE, EXPERTS[:4], BASE, ((seed, 1.0),), "normal", 3)
    assert plus.recipe.point == mean.recipe
    ((other, _),) = plus.recipe.terms
    assert generation(search, [0, 0])[0].recipe.terms == ((seed, 0.75), (other, -1.0))


def test_a_pair_of_which_one_failed_is_left_out():
    search = build(ES | {"population": 4, "sigma": 0.5, "learning_rate": 4})
    asked = generation(search, [0.9, None, 0.2, 0.7])
    ((seed, _),) = asked[3].recipe.terms
    after = generation(search, [None] * 4)
    assert after[0].recipe.terms == ((seed, -1.0),)
    for _ in range(2):  # nothing is learnt, so the mean stays and is not scored again; the noise is new
        more = generation(search, [0.5] * 4)
        assert [c.recipe.point for c in more] == [after[0].recipe] * 4
        assert not {c.recipe for c in more} & {c.recipe for c in after}


def es_in_numpy(start, epsilon, score, generations, n, sigma, rate, decay, shape):
    """The formula of the papers, in float64, on weights instead of recipes: all models in order."""
    theta, out = start.copy(), []
    for t in range(generations):
        noise = [epsilon(t, i) for i in range(n // 2)]
        around = [theta + sign * sigma * e for e in noise for sign in (1, -1)]
        out += [theta, *around]
        u = shape(np.array([score(x) for x in around]))
        slope = sum(u[2 * i] * e + u[2 * i + 1] * -e for i, e in enumerate(noise)) / n
        theta = start + (1 - decay) * (theta - start) + rate * slope
    return out


SHAPES = {
    "ranks": lambda f: f.argsort().argsort() / (len(f) - 1) - 0.5,
    "z-scores": lambda f: (f - f.mean()) / f.std(),
}
SIGMA = 0.75  # of the toy's task vectors


class Toy:
    """Experts of a few weights, and a score that falls with the distance from what is wanted."""

    def __init__(self, seed, weights=8):
        generator = torch.Generator().manual_seed(seed)
        self.experts = {e.id: torch.randn(weights, generator=generator) for e in EXPERTS[:4]}
        self.wanted, self.made = torch.randn(weights, generator=generator).double().numpy(), dict(self.experts)

    def weights(self, recipe):
        if recipe.id not in self.made:
            if isinstance(recipe, Noise):
                given = recipe.terms, recipe.distribution, recipe.rank, "w"
                self.made[recipe.id] = with_noise(self.weights(recipe.point), SIGMA, *given)
            else:
                self.made[recipe.id] = torch.stack([self.weights(i) for i in recipe.inputs]).mean(0)
        return self.made[recipe.id]

    def score(self, weights):
        return -float(np.square(np.asarray(weights, dtype=np.float64) - self.wanted).sum())

    def run(self, search):
        return simulate(search, 3, 1, reply=lambda c, _: said(c, self.score(self.weights(c.recipe))))


@pytest.mark.parametrize("utilities", SHAPES)
def test_its_trajectory_is_that_of_the_papers(utilities):
    """Four generations of six models; only the draws are taken from the seeds, which are named as in the search."""
    toy, count = Toy(3), 8
    settings = {"population": 6, "sigma": 0.25, "learning_rate": 1.5, "utilities": utilities, "decay": 0.125}
    asked = toy.run(build(ES | settings, seed=5, candidates=28))

    def epsilon(t, i):
        seed = random.Random(f"5:evolution_strategy:{t}:{i}").getrandbits(53)
        return SIGMA * with_noise(torch.zeros(count), 1.0, ((seed, 1.0),), "normal", 0, "w").double().numpy()

    start = toy.weights(AVERAGE).double().numpy()
    wanted = es_in_numpy(start, epsilon, toy.score, 4, 6, 0.25, 1.5, 0.125, SHAPES[utilities])
    assert len(asked) == len(wanted)
    for candidate, weights in zip(asked, wanted, strict=True):
        assert np.allclose(toy.weights(candidate.recipe).numpy(), weights, atol=1e-5)
    assert not np.allclose(wanted[0], wanted[-7], atol=0.01)


def test_it_beats_random_noise_where_few_weights_matter():
    """Median of 8 seeds, 120 candidates each, on a sphere around a point outside of the experts' hull."""
    ratios = []
    for seed in range(8):
        toy = Toy(seed)
        search = build(ES | {"population": 8}, seed, candidates=120)
        found = max(toy.score(toy.weights(c.recipe)) for c in toy.run(search))
        around = [Noise(AVERAGE, EXPERTS[:4], BASE, ((k, 0.5),)) for k in range(120)]
        ratios.append(found / max(toy.score(toy.weights(r)) for r in around))  # of squared distances
    assert statistics.median(ratios) < 0.2


def test_the_best_start_is_where_it_begins():
    """Of models that keep the constraints, and the earliest of equals; without any start, at the average."""
    search, crossed = build(ES), Cross(EXPERTS[0], (EXPERTS[1],), "evolver", 0.5, 0.5, 1)
    pairs = [(Candidate(k, r, "start"), v) for k, (r, v) in enumerate(((EXPERTS[0], 0.5), (crossed, 0.6), (EXPERTS[1], 0.6), (EXPERTS[2], 0.9)))]  # fmt: skip  # noqa: E501
    told = [(c, said(c, v, violations={"0": 0.1} if c.number == 3 else {})) for c, v in pairs]
    search.inform(told)
    assert search.ask(1)[0].recipe.point == crossed  # which has its score
    assert build(ES).ask(1)[0].recipe == AVERAGE


def test_a_long_search_keeps_numbers_only():
    """One pair of numbers for each two candidates, and a mean that is one node on the start."""
    search = build(ES | {"population": 10}, candidates=550)
    asked = simulate(search, reply=lambda c, _: said(c, c.number % 7 / 7))
    mean = next(c.recipe for c in reversed(asked) if c.proposer == "evolution_strategy/mean")
    assert mean.point == AVERAGE
    assert len({s for s, _ in mean.terms}) == len(mean.terms) <= 250
    assert not any(isinstance(value, torch.Tensor) for value in vars(search).values())
    assert len(search._results) <= 10


def test_an_odd_population_is_refused():
    with pytest.raises(BadInput, match=r"^search\.population: evolution_strategy tries pairs.* 7 is odd; write 8\.$"):
        build(ES | {"population": 7})
