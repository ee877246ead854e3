"""Spaces of layer programs, without models: there and back, against the papers, and searches that find a program."""

import difflib
import random
import statistics

import pytest
from test_search import BASE, EXPERTS, HALVING, Means, build, maker, simulate

from evolver.config import Budget
from evolver.config.reading import check_section
from evolver.records import Choice, Result
from evolver.records.depth import layer_origins
from evolver.records.recipe import Expert, Layers, Merge, Rule, ancestors
from evolver.search import SEARCHES
from evolver.search.base import Setup
from evolver.search.programs.layers import LayersSettings, search_layers

A, B, C = EXPERTS[:3]


def space(experts=3, layers=4, **settings):
    setup = Setup(
        EXPERTS[:experts], BASE, 0, Budget(candidates=9), maker(experts, layers), Means(), tasks=("one", "other")
    )
    return search_layers(setup, check_section(LayersSettings, {"algorithm": "layers", **settings}, "f")).space


SPACES = {
    "swap": {},
    "swap by groups": {"groups": 2, "ends": "b", "sources": ["a", "b", "base"]},
    "swap ties": {"by": {"algorithm": "tpe", "method": "ties", "tune": ["density", "sign"], "layer_groups": 2}},
    "prune": {"genome": "prune", "remove": [0, 2], "groups": 2},
    "prune one": {"genome": "prune", "sources": ["merge"], "remove": 2},
    "prune with a merge": {"genome": "prune", "sources": ["a", "merge"], "protect": 0, "remove": [1, 3]},
    "dataflow": {"genome": "dataflow"},
    "dataflow of merges": {"genome": "dataflow", "sources": ["merge", "base", "c"], "protect": 0, "repeats": 2, "most": 9},  # noqa: E501
}  # fmt: skip
EVERY = pytest.mark.parametrize("settings", SPACES.values(), ids=SPACES.keys())


def drawn(found, draw):
    return {
        k.name: draw.choice(k.options) if isinstance(k, Choice) else draw.uniform(k.low, k.high) for k in found.knobs
    }


def programs(recipe):
    """The layers as (id of the model, its layer), without merges' last bits."""
    kind = {A.id: "a", B.id: "b", C.id: "c", BASE.id: "base"}
    return [(kind.get(o.model, "merge"), o.layer) for o in layer_origins(recipe, 4)]


@EVERY
def test_every_point_is_a_program_and_can_be_read_back(settings):
    """And what is read back is the same model, up to the rounding of the weights of merges."""
    found, draw = space(**settings), random.Random(1)
    for _ in range(60):
        recipe = found.decode(drawn(found, draw))
        assert len(layer_origins(recipe, 4)) >= 1
        point = found.encode(recipe)
        assert point.keys() == {k.name for k in found.knobs}
        again = found.decode(point)
        assert programs(again) == programs(recipe)
        rounded = any(isinstance(node, Merge) for node in ancestors(again))
        assert rounded or found.decode(point).id == again.id == recipe.id
    first = found.decode(found.encode_equal(1.0))
    assert programs(found.decode(found.encode(first))) == programs(first)


@EVERY
def test_models_outside_of_the_space_are_not_taken_for_members(settings):
    found = space(**settings)
    stranger = Expert("x", "ee")
    for recipe in (
        stranger,
        Merge("slerp", (A, B), BASE),
        Layers((stranger,), ((0, 0), (0, 3)), (0, 0)),
        Layers((A,), tuple((0, 3 - k % 4) for k in range(40)), (0, 0)),
        Layers((A, B), ((0, 0), (1, 1), (0, 2), (0, 3)), (0, 1)),
    ):
        assert found.encode(recipe) is None


def test_a_program_that_is_one_model_is_this_model():
    """It is then known from the baselines, and not scored again."""
    swap = space(sources=["a", "b"])
    assert swap.decode(dict.fromkeys((k.name for k in swap.knobs), "b")) == B
    assert swap.encode(B) == dict.fromkeys((k.name for k in swap.knobs), "b")
    flow = space(genome="dataflow")
    assert flow.decode(flow.encode_equal(1.0)) == A
    assert len(simulate(build({"algorithm": "layers", "sources": ["a", "b"]}, candidates=9))) == 9


def test_layer_swapping_begins_with_the_published_program():
    """Bandarkar et al. 2024: of 32 layers, the lowest 5 and the highest 2 are the outer model's, as are its ends."""
    found = space(2, 32, sources=["a", "b"])
    recipe = found.decode(found.encode_equal(1.0))
    assert recipe == Layers((A, B), tuple((0 if k < 5 or k >= 30 else 1, k) for k in range(32)), (0, 0))


def test_pruning_is_that_of_gptailor():
    """The layers of the lowest priorities go; a group is one expert's, several experts' by task arithmetic, or the
    base's (Su et al. 2025).
    """
    found = space(2, genome="prune", remove=[1, 2], protect=0, groups=2)
    point = {f"priority@{layer}": value for layer, value in enumerate((0.9, 0.1, 0.3, 0.2))}
    point |= {"chosen[a]@0-1": 0.5, "chosen[b]@0-1": 0.9, "scale@0-1": 0.25}
    point |= {"chosen[a]@2-3": 0.49, "chosen[b]@2-3": 0.0, "scale@2-3": 1.0}
    rule = Rule.of({"lambda": 0.25, "normalize": False, "weight": (1.0, 1.0)})
    both = Merge("task_arithmetic", (A, B), BASE, (rule,))
    assert found.decode(point | {"removed": 1.9}) == Layers((A, both, BASE), ((1, 0), (2, 2), (2, 3)), (0, 0))
    assert found.decode(point | {"removed": 2.1}) == Layers((A, both, BASE), ((1, 0), (2, 2)), (0, 0))
    assert found.decode(point | {"removed": 3.0}) == found.decode(point | {"removed": 2.1})
    alone = point | {"removed": 1.0, "chosen[b]@0-1": 0.2, "chosen[b]@2-3": 0.7}
    assert found.decode(alone) == Layers((A, B), ((0, 0), (1, 2), (1, 3)), (0, 0))
    begin = space(2, 32, genome="prune", remove=8)
    kept = [o.layer for o in layer_origins(begin.decode(begin.encode_equal(1.0)), 32)]
    assert kept == [*range(23), 31]


def test_the_data_flow_is_that_of_sakana():
    """Slot t holds layer t mod M of the row of all M layers, and is used where its indicator is above 0 (Akiba et al.
    2024); three passes over two models of 32 layers have 192 slots.
    """
    assert len(space(2, 32, genome="dataflow", protect=0).knobs) == 192
    found = space(2, genome="dataflow", protect=0, repeats=2, most=5)
    names = [k.name for k in found.knobs]
    row = [(number, layer) for _ in range(2) for number in range(2) for layer in range(4)]
    draw = random.Random(3)
    for _ in range(50):
        values = [draw.uniform(-1, 1) for _ in names]
        used = [t for t, value in enumerate(values) if value > 0]
        used = sorted(sorted(used, key=lambda t: -values[t])[:5])
        expected = [(("a", "b")[row[t][0]], row[t][1]) for t in used]
        assert programs(found.decode(dict(zip(names, values, strict=True)))) == expected
    none = found.decode({name: -0.5 - 0.01 * k for k, name in enumerate(names)})
    assert programs(none) == [("a", 0)]  # there is no model without layers: the highest indicator is used
    kept = space(2, genome="dataflow").decode({k.name: -1.0 for k in space(2, genome="dataflow").knobs})
    assert programs(kept) == [("a", 0), ("a", 3)]


def test_what_was_scored_before_is_learnt_from():
    """Models in the space become points of the search, whichever search has made them."""
    search = build({"algorithm": "layers", "sources": ["a", "b"], "by": {"algorithm": "tpe", "startup": 2}})
    earlier = simulate(build({"algorithm": "layers", "sources": ["a", "b"]}, seed=5, candidates=12))
    pairs = [(c, Result(c.number, c.recipe.id, "ok", 0.5, 0.5, True)) for c in earlier]
    search.inform(pairs)
    assert len([t for t in search.study.trials if t.state.is_finished()]) == len({c.recipe.id for c in earlier})


def reached(settings, goal, seed):
    """The best value of a search: how like a program is to the wanted one, from 0 to 1."""

    def reply(candidate, _):
        same = difflib.SequenceMatcher(None, programs(candidate.recipe), goal, autojunk=False).ratio()
        values.append(same)
        return Result(candidate.number, candidate.recipe.id, "ok", same, same, True)

    values = []
    simulate(build(settings, seed, experts=2, candidates=60), reply=reply)
    return max(values[1:])


@pytest.mark.whole
@pytest.mark.parametrize(
    ("more", "goal"),
    [
        ({"genome": "swap", "sources": ["a", "b", "base", "merge"]}, [("b", 0), ("base", 1), ("a", 2), ("base", 3)]),
        ({"genome": "dataflow", "protect": 0, "repeats": 2}, [("b", 0), ("b", 2), ("b", 3), ("a", 1), ("a", 3)]),
    ],
)  # fmt: skip
def test_a_search_finds_a_program_sooner_than_chance(more, goal):
    """Median of 5 seeds; a search that has not begun to learn draws at random."""
    settings = {"algorithm": "layers", **more}
    ours, chance = (
        statistics.median(
            reached(settings | {"by": {"algorithm": "tpe", "startup": startup}}, goal, seed) for seed in range(5)
        )
        for startup in (10, 1000)
    )
    assert ours > chance


def test_halving_and_layers_hold_each_other_s_settings():
    settings = HALVING | {"of": {"algorithm": "layers", "genome": "dataflow", "by": {"algorithm": "tpe", "startup": 3}}}
    assert len(simulate(build(settings))) > 5
    assert SEARCHES["layers"].inside == "by"
