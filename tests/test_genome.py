"""The genome: a search space of named knobs, and recipes from points of it."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolver.errors import BadInput
from evolver.merging.methods import METHODS, Range, Simplex
from evolver.merging.settings.genome import HIGH_U, LOW_U, genome
from evolver.records import Choice
from evolver.records.recipe import Expert, dump_recipe, load_recipe

BASE = Expert("base", "00")
EXPERTS = (Expert("a", "aa"), Expert("b", "bb"), Expert("c", "cc"))
EVERY = pytest.mark.parametrize("name", [n for n, m in METHODS.items() if any(s.search for s in m.settings.values())])


def make(method="task_arithmetic", layers=6, groups=1, tune=None, fixed=None):
    required = {n: 1.0 for n, s in METHODS[method].settings.items() if s.required and not s.search}
    return genome(
        METHODS[method],
        EXPERTS[: METHODS[method].takes],
        BASE,
        ["model.embed", *(f"model.layers.{i}.w" for i in range(layers))],
        groups,
        tune,
        {**required, **(fixed or {})},
        "search",
    )


def everything(name, groups=1):
    return make(name, groups=groups, tune=[n for n, s in METHODS[name].settings.items() if s.search])


def middle(space):
    return {k.name: (k.low * k.high) ** 0.5 if k.log else (k.low + k.high) / 2 for k in space.knobs}


def test_knobs_are_named_by_setting_expert_and_group():
    assert [k.name for k in make().knobs] == ["lambda", "weight[a]", "weight[b]", "weight[c]"]
    assert [k.name for k in make(groups=2, tune=["lambda"]).knobs] == ["lambda@outside", "lambda@0-2", "lambda@3-5"]
    assert [k.name for k in make("ties", groups=6, tune=["density"]).knobs][-1] == "density@5-5"


def test_knobs_have_the_ranges_of_the_method():
    knobs = {k.name: k for k in make("ties", tune=["lambda", "density", "weight"]).knobs}
    assert (knobs["lambda"].low, knobs["lambda"].high, knobs["lambda"].log) == (0.2, 3.0, True)
    assert (knobs["density"].low, knobs["density"].high, knobs["density"].log) == (0.05, 1.0, False)
    assert (knobs["weight[a]"].low, knobs["weight[a]"].high) == (LOW_U, HIGH_U)


@EVERY
@pytest.mark.parametrize("groups", [1, 2, 5, 6])
def test_every_point_is_a_recipe_with_all_settings_everywhere(name, groups):
    space = everything(name, groups)
    recipe = space.decode(middle(space))
    for layer in (None, *range(6)):
        values = recipe.settings("w", layer)
        assert values.keys() == METHODS[name].settings.keys()
        for key, setting in METHODS[name].settings.items():
            if isinstance(setting.search, Simplex):
                assert math.fsum(values[key]) == pytest.approx(1.0)
                assert len(values[key]) == (METHODS[name].takes or len(EXPERTS))
            if isinstance(setting.search, Range):
                assert setting.search.low <= values[key] <= setting.search.high


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_weights_sum_to_one_in_every_group(data):
    space = make(groups=data.draw(st.integers(1, 6)))
    point = {k.name: data.draw(st.floats(k.low, k.high)) for k in space.knobs}
    recipe = space.decode(point)
    for layer in (None, *range(6)):
        weights = recipe.settings("w", layer)["weight"]
        assert math.fsum(weights) == pytest.approx(1.0)
        assert all(0 < w < 1 for w in weights)


def test_a_point_by_hand():
    """u = e^-1, e^-1, e^-2 are the exponentials 1, 1, 2: weights 0.25, 0.25, 0.5."""
    point = {"lambda": 1.5, "weight[a]": math.exp(-1), "weight[b]": math.exp(-1), "weight[c]": math.exp(-2)}
    values = make(fixed={"normalize": True}).decode(point).settings("w", None)
    assert values["weight"] == pytest.approx((0.25, 0.25, 0.5))
    assert values["lambda"] == 1.5
    assert values["normalize"] is True


def test_each_knob_moves_its_own_group_only():
    space = make(groups=3)
    start = middle(space)
    before = space.decode(start)
    for layers, suffix in (((None,), "@outside"), ((0, 1), "@0-1"), ((2, 3), "@2-3"), ((4, 5), "@4-5")):
        after = space.decode({**start, f"lambda{suffix}": 2.9})
        moved = {layer for layer in (None, *range(6)) if after.settings("w", layer) != before.settings("w", layer)}
        assert moved == set(layers)


@pytest.mark.parametrize("layers", [2, 6, 7, 30])
def test_groups_cover_every_layer_exactly_once(layers):
    for groups in range(1, layers + 1):
        _, *rules = make(layers=layers, groups=groups).decode(middle(make(layers=layers, groups=groups))).rules
        for layer in (None, *range(layers)):
            assert sum(r.place.covers("w", layer) for r in rules) == 1
        assert len(rules) == (1 if groups == 1 else groups + 1)
        assert all(any(r.place.covers("w", layer) for layer in (None, *range(layers))) for r in rules)


def test_the_equal_start_is_the_average_at_its_mass():
    space = make()
    values = space.decode(space.encode_equal(1.0)).settings("w", None)
    assert values["weight"] == pytest.approx((1 / 3,) * 3)
    assert values["lambda"] == 1.0
    assert space.encode_equal(99.0)["lambda"] == 3.0
    assert everything("ties").encode_equal(1.0)["density"] == pytest.approx(0.525)


def test_what_is_not_tuned_stays_as_given():
    recipe = make(tune=["lambda"], fixed={"weight": [1, 2, 3]}).decode({"lambda": 0.7})
    assert recipe.settings("w", 0)["weight"] == (1.0, 2.0, 3.0)
    assert recipe.settings("w", 0)["lambda"] == 0.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tune": ["lamda"]}, r"^search\.tune: task_arithmetic has nothing .* 'lamda'; did you mean 'lambda'"),
        ({"method": "dare_ties", "tune": ["seed"]}, r"^search\.tune: .*'seed'"),  # a number, and none to be tuned
        ({"method": "simple"}, r"^search\.method: simple has nothing to tune"),
        ({"tune": []}, r"^search\.method: task_arithmetic has nothing to tune"),
        ({"groups": 7}, r"^search\.layer_groups: 7 groups of 6 layers; write a number from 1 to 6"),
        ({"groups": 0}, r"^search\.layer_groups"),
        ({"fixed": {"lamda": 1.0}}, r"^search\.settings: .*did you mean 'lambda'"),
        ({"fixed": {"weight": [1.0] * 2}, "tune": ["lambda"]}, r"^search\.settings\.weight: 2 numbers for 3 experts"),
        ({"fixed": {"weight": [1.0] * 3}}, r"^search\.settings\.weight: weight is tuned"),
        ({"tune": ["lambda", "lambda"]}, r"^search\.tune: a setting is listed twice"),
    ],
)  # fmt: skip
def test_bad_spaces_are_refused(change, message):
    with pytest.raises(BadInput, match=message):
        make(**change)


def decoded(settings):
    space = make("ties", layers=3, tune=["weight"], fixed=settings)
    return space.decode(middle(space))


def test_a_fixed_setting_is_a_number_a_gradient_or_a_list_of_filters():
    plain = decoded({"density": [0.1, 0.2, 0.3]})
    assert all(plain.settings("w", layer)["density"] == (0.1, 0.2, 0.3) for layer in (None, 0, 2))
    slope = decoded({"lambda": [0.2, 0.8]})
    assert [slope.settings(f"model.layers.{i}.w", i)["lambda"] for i in range(3)] == pytest.approx([0.2, 0.5, 0.8])
    filtered = decoded({"density": [{"filter": "w", "value": [0.2, 0.4]}, {"value": 0.9}]})
    assert filtered.settings("model.layers.1.w", 1)["density"] == pytest.approx((0.3, 0.3, 0.3))
    assert filtered.settings("model.embed", None)["density"] == (0.9, 0.9, 0.9)
    each = decoded({"density": {"a": 0.5, "c": [{"filter": "layers.2", "value": 0.1}, {"value": 0.6}]}})
    assert each.settings("model.layers.2.w", 2)["density"] == (0.5, 1.0, 0.1)
    assert each.settings("model.layers.0.w", 0)["density"] == (0.5, 1.0, 0.6)
    assert each.settings("w", None)["lambda"] == 1.0
    assert each.settings("w", None)["normalize"] is True


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"density": {"d": 0.5}}, "no expert 'd'"),
        ({"density": [{"value": 1.5}]}, "density: 1.5 is not usable"),
        ({"normalize": {"a": True}}, "one value for all experts"),
        ({"density": [{"value": "much"}]}, "'much' is not usable"),
    ],
)
def test_settings_that_differ_are_checked(settings, says):
    with pytest.raises(BadInput, match=says):
        decoded(settings)


@pytest.mark.parametrize(
    ("tune", "fixed", "refused"),
    [
        (["lambda"], {"density": 0.9, "epsilon": 0.3}, True),
        (["lambda"], {"density": [{"filter": "embed", "value": 0.5}, {"value": 0.9}], "epsilon": 0.3}, True),
        (["lambda"], {"density": {"a": 0.5, "b": 0.9, "c": 0.5}, "epsilon": 0.3}, True),
        (["lambda"], {"density": 0.5, "epsilon": {"a": 0.6, "b": 0.1, "c": 0.1}}, True),
        (["lambda"], {"density": 0.9, "epsilon": 0.1}, False),
        (["lambda"], {"density": 0.9}, False),  # the default is cut
        (["density"], {"epsilon": 0.3}, False),  # so is what the search chooses, or what it makes too large
        (["epsilon"], {"density": 0.9}, False),
    ],
)
def test_an_epsilon_is_refused_if_it_was_written_and_does_not_fit(tune, fixed, refused):
    if refused:
        with pytest.raises(BadInput, match=r"settings\.epsilon: 0\.[36] is too large for density 0\.[59]"):
            make("della", tune=tune, fixed=fixed)
    else:
        assert make("della", tune=tune, fixed=fixed).tune == tuple(tune)


def test_what_is_no_number_is_chosen_among_its_values():
    """A setting with words or a switch, where it is tuned by name."""
    space = make("ties", groups=2, tune=["density", "sign", "normalize"])
    chosen = {k.name: k.options for k in space.knobs if isinstance(k, Choice)}
    assert chosen == {
        f"{name}{at}": options
        for at in ("@outside", "@0-2", "@3-5")
        for name, options in (("sign", ("mass", "count")), ("normalize", (False, True)))
    }  # fmt: skip
    start = space.encode_equal(1.0)
    assert start["sign@0-2"] == METHODS["ties"].settings["sign"].default
    recipe = space.decode({**start, "sign@0-2": "count", "normalize@3-5": False})
    assert [recipe.settings("w", layer)["sign"] for layer in (None, 0, 3)] == [
        start["sign@0-2"],
        "count",
        start["sign@0-2"],
    ]
    assert recipe.settings("w", 5)["normalize"] is False
    assert load_recipe(dump_recipe(recipe)) == recipe
