"""First populations: experts, then models made of them; what the seed decides and what it does not."""

import pytest
from test_search import BASE, EVOLVER, EXPERTS, build, simulate

from evolver.config import Budget
from evolver.errors import BadInput
from evolver.merging.maker import RecipeMaker
from evolver.records.recipe import Cross, Merge
from evolver.search.base import Setup
from evolver.search.evolution.offspring import best_places
from evolver.search.evolution.population import first_population, led_by


def setup(seed=0, experts=3):
    chosen = EXPERTS[:experts]
    maker = RecipeMaker([e.name for e in chosen], ["w"], {"base": BASE.digest} | {e.name: e.digest for e in chosen})
    return Setup(chosen, BASE, seed, Budget(candidates=9), maker, None)


def test_experts_come_first_then_their_average_then_merges_and_mixtures_by_turns():
    found = first_population(setup(), 9)
    assert found[:3] == list(EXPERTS[:3])
    assert found[3] == Merge("simple", EXPERTS[:3], BASE)
    assert [m.method for m in found[4:]] == ["ties", "linear", "ties", "linear", "ties"]
    assert len({m.id for m in found}) == 9


def test_a_larger_population_begins_with_the_smaller_one():
    assert first_population(setup(), 20)[:7] == first_population(setup(), 7)
    assert first_population(setup(), 3) == list(EXPERTS[:3])
    assert first_population(setup(seed=1), 7)[4:] != first_population(setup(), 7)[4:]
    assert first_population(setup(seed=1), 7)[:4] == first_population(setup(), 7)[:4]


def test_what_is_drawn_lies_where_it_should():
    """Weights are Dirichlet(1, 1, 1): each has mean 1/3 and variance 1/18, so 400 of them a mean within 0.06 of it."""
    found = first_population(setup(), 804)[4:]
    mixtures = [m.settings("w", None)["weight"] for m in found if m.method == "linear"]
    assert all(abs(sum(w) - 1) < 1e-5 and min(w) >= 0 for w in mixtures)
    for column in zip(*mixtures, strict=True):
        assert abs(sum(column) / 400 - 1 / 3) < 0.06
        assert abs(sum((w - 1 / 3) ** 2 for w in column) / 400 - 1 / 18) < 0.02
    merges = [m for m in found if m.method == "ties"]
    densities = [d for m in merges for d in m.settings("w", None)["density"]]
    assert 0.2 <= min(densities) < 0.25
    assert 0.85 < max(densities) <= 0.9
    assert {len(m.inputs) for m in merges} == {2, 3}
    assert all(list(m.inputs) == [e for e in EXPERTS if e in m.inputs] for m in merges)


def test_models_of_an_earlier_search_lead_the_population():
    children = [Cross(EXPERTS[0], (EXPERTS[1],), "evolver", 0.5, 0.5, n) for n in range(2)]
    found = led_by([children[0], EXPERTS[1], children[1]], first_population(setup(), 5))
    assert found == [children[0], EXPERTS[1], children[1], EXPERTS[0], EXPERTS[2]]


def test_a_population_makes_up_for_missing_experts():
    asked = simulate(build(EVOLVER | {"population": 7, "strategy": "rand/2"}, experts=2, candidates=20))
    assert [c.recipe for c in asked[:2]] == list(EXPERTS[:2])
    assert all(isinstance(c.recipe, Merge) for c in asked[2:7])
    assert all(isinstance(c.recipe, Cross) and len(c.recipe.partners) == 5 for c in asked[7:])


def test_a_merger_merges_the_whole_population():
    asked = simulate(build(EVOLVER | {"population": 6, "merger": {"method": "ties", "density": 0.5}}, candidates=9))
    assert all(len(c.recipe.inputs) == 6 for c in asked)
    assert asked[0].recipe.inputs == tuple(first_population(build(EVOLVER).setup, 6))


@pytest.mark.parametrize("mask", ["scalar", "row", "tensor", "layer"])
@pytest.mark.parametrize("search", [EVOLVER, EVOLVER | {"merger": {"method": "simple"}}, {"algorithm": "shade"}])
def test_children_have_the_mask_of_the_configuration(search, mask):
    asked = simulate(build(search | {"mask": mask}, candidates=12))
    inputs = [i for c in asked for i in (c.recipe, *c.recipe.inputs) if isinstance(i, Cross)]
    assert {i.mask for i in inputs} == {mask}


def test_the_best_are_few_but_two():
    standings = [(0.0, s) for s in (0.1, 0.9, 0.5, 0.9, 0.2)]
    assert best_places(standings, 0.01) == [1, 3]
    assert best_places(standings, 0.6) == [1, 3, 2]
    assert best_places([(-1.0, 0.0), *standings], 1.0)[-1] == 0


def test_one_of_the_best_leads():
    """Of ten members with p = 0.3 the best three lead, and each of them does at times."""

    def reply(candidate, _):
        from evolver.records import Result

        value = candidate.number / 10 if candidate.number < 10 else -1.0
        return Result(candidate.number, candidate.recipe.id, "ok", value, value, True)

    settings = EVOLVER | {"population": 10, "strategy": "current-to-pbest/1", "p": 0.3, "generations": 9}
    asked = simulate(build(settings, candidates=99), reply=reply)
    best = [c.recipe for c in asked[7:10]]
    assert {c.recipe.partners[0] for c in asked[10:]} == set(best)
    assert all(c.recipe.partners[0] != c.recipe.parent for c in asked[10:])


@pytest.mark.parametrize(
    ("search", "sentence"),
    [
        ({"population": 3}, r"^search\.population: 3 is less than the number of experts, 4, who .* write 4 or more\."),
        (
            {"strategy": "rand/2"},
            r"^search\.strategy: rand/2 needs a population of 6, and there are 4 exp",
        ),
        ({"adapt": True}, r"^search\.adapt: without a merger"),
        ({"population": 6, "merger": {"method": "regmean"}}, r"^search\.population: regmean needs statistics of exp"),
        (
            {"population": 6, "merger": {"method": "linear", "weight": [1, 2, 3, 4]}},
            r"^search\.merger\.weight: one number for each expert, but the population has 6 members; write one number",
        ),
        (
            {"population": 6, "merger": {"method": "linear", "weight": {"a": 1, "b": 2, "c": 3, "d": 4}}},
            r"^search\.merger\.weight: one number for each expert",
        ),
        ({"population": 6, "merger": {"method": "slerp", "t": 0.5}}, r"search\.merger: slerp takes 2 models, not 6"),
    ],
)
def test_what_does_not_fit_is_refused(search, sentence):
    with pytest.raises(BadInput, match=sentence):
        build(EVOLVER | search)
