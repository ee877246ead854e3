"""Where coefficients differ from place to place: groups of layers, classes of tensors, splines, and several methods."""

import random

import pytest

from evolver.errors import BadInput
from evolver.merging.maker import RecipeMaker
from evolver.merging.settings.division import division_of, tensor_class
from evolver.records import Choice
from evolver.records.recipe import dump_recipe, layer_of, load_recipe

LLAMA = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{k}.{part}.weight"
        for k in range(6)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
    ),
    "model.norm.weight",
    "lm_head.weight",
]
BERT = [
    "bert.embeddings.word_embeddings.weight",
    "bert.embeddings.LayerNorm.weight",
    *(
        f"bert.encoder.layer.{k}.{part}"
        for k in range(4)
        for part in (
            "attention.self.query.weight", "attention.output.dense.weight", "attention.output.LayerNorm.weight",
            "intermediate.dense.weight", "output.dense.weight", "output.LayerNorm.bias",
        )
    ),
    "classifier.weight",
]  # fmt: skip
GROUPINGS = {
    "whole": {}, "3 groups": {"groups": 3}, "per layer": {"groups": "per-layer"}, "spline of 2": {"knots": 2},
    "spline of 3": {"knots": 3}, "spline through all": {"knots": 4}, "classes": {"classes": True},
    "classes in groups": {"classes": True, "groups": 2}, "classes per layer": {"classes": True, "groups": "per-layer"},
    "spline of classes": {"classes": True, "knots": 3},
}  # fmt: skip


def space(names=BERT, method="ties", groups=1, tune=("lambda", "weight", "sign"), settings=None, **more):
    tune = None if tune is None else list(tune)
    return RecipeMaker(["a", "b", "c"], names).space(method, groups, tune, settings or {}, **more)


def drawn(found, seed=0):
    draw = random.Random(seed)
    return {
        k.name: draw.choice(k.options) if isinstance(k, Choice) else k.at(draw.random())
        for k in found.knobs
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention"), ("model.layers.0.mlp.gate_proj.weight", "mlp"),
        ("model.layers.0.post_attention_layernorm.weight", "norm"), ("model.embed_tokens.weight", "other"),
        ("lm_head.weight", "other"), ("model.norm.weight", "norm"), ("model.layers.3.self_attn.q_norm.weight", "norm"),
        ("model.layers.1.block_sparse_moe.experts.3.w1.weight", "mlp"), ("model.layers.1.mlp.gate.weight", "mlp"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "attention"),
        ("bert.encoder.layer.0.output.dense.bias", "mlp"), ("bert.encoder.layer.0.intermediate.dense.weight", "mlp"),
        ("bert.encoder.layer.0.attention.output.LayerNorm.weight", "norm"), ("bert.pooler.dense.weight", "other"),
        ("transformer.h.0.attn.c_attn.weight", "attention"), ("transformer.h.0.ln_1.bias", "norm"),
        ("transformer.h.0.mlp.c_fc.weight", "mlp"), ("transformer.wte.weight", "other"),
        ("transformer.ln_f.bias", "norm"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "attention"),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "mlp"),
        ("encoder.block.0.layer.1.layer_norm.weight", "norm"),
        ("decoder.block.0.layer.1.EncDecAttention.k.weight", "attention"),
        ("model.decoder.layers.0.fc1.weight", "mlp"),
        ("model.decoder.layers.0.encoder_attn.k_proj.weight", "attention"),
        ("distilbert.transformer.layer.0.ffn.lin1.weight", "mlp"),
        ("distilbert.transformer.layer.0.sa_layer_norm.weight", "norm"),
    ],
)  # fmt: skip
def test_tensors_are_told_apart_by_their_names(name, kind):
    assert tensor_class(name) == kind


@pytest.mark.parametrize("names", [LLAMA, BERT], ids=["llama", "bert"])
@pytest.mark.parametrize("groups", [1, 2, "per-layer"])
def test_every_tensor_has_the_coefficients_of_its_class_and_group(names, groups):
    """Each place has another total mass, by which a tensor shows where it belongs."""
    found = space(names, "task_arithmetic", groups, ["lambda"], classes=True)
    masses = {k.name: 0.3 + 0.05 * i for i, k in enumerate(found.knobs)}
    recipe, layers = found.decode(masses), 1 + max(layer_of(n) or 0 for n in names)
    for name in names:
        layer, kind = layer_of(name), tensor_class(name)
        if groups == 1:
            place = f"@{kind}"
        elif layer is None:
            place = "@outside"
        else:
            size = layers // 2 if groups == 2 else 1
            first = layer - layer % size
            place = f"@{first}-{first + size - 1}/{kind}"
        assert recipe.settings(name, layer)["lambda"] == masses[f"lambda{place}"], name
    assert len({recipe.settings(n, layer_of(n))["lambda"] for n in names}) == len(masses)


def test_a_few_rules_say_it():
    """By the parts of a layer, not one for every tensor."""
    rules = space(LLAMA, "task_arithmetic", 1, ["lambda"], classes=True)
    assert len(rules.decode(drawn(rules)).rules) < 9


@pytest.mark.parametrize("knots", [2, 3, 4, 6])
def test_a_spline_is_a_gradient(knots):
    """The same numbers as a fixed setting in the form of a list, which is another piece of code."""
    found = space(LLAMA, "ties", 1, ["lambda", "sign"], knots=knots)
    point = drawn(found, knots)
    recipe = found.decode(point)
    values = [point[f"lambda@knot{k}"] for k in range(knots)]
    words = [point[f"sign@knot{k}"] for k in range(knots)]
    fixed = space(LLAMA, "ties", 1, ["density"], {"lambda": values, "sign": words}).decode({"density": 0.5})
    for name in LLAMA:
        if (layer := layer_of(name)) is not None:
            assert recipe.settings(name, layer)["lambda"] == pytest.approx(fixed.settings(name, layer)["lambda"])
            assert recipe.settings(name, layer)["sign"] == fixed.settings(name, layer)["sign"]
        else:
            assert recipe.settings(name, layer)["lambda"] == point["lambda@outside"]


def test_weights_along_a_spline_sum_to_one():
    found = space(LLAMA, "task_arithmetic", 1, ["weight"], knots=3)
    recipe = found.decode(drawn(found))
    for layer in range(6):
        weights = recipe.settings("w", layer)["weight"]
        assert sum(weights) == pytest.approx(1.0)
        assert min(weights) > 0
    assert len({recipe.settings("w", layer)["weight"] for layer in range(6)}) == 6


@pytest.mark.parametrize("more", GROUPINGS.values(), ids=GROUPINGS.keys())
@pytest.mark.parametrize("method", ["ties", ["ties", "task_arithmetic", "dare_ties"]], ids=["one", "several"])
def test_points_come_back_from_their_recipes(more, method):
    found = space(method=method, **more)
    for seed in range(5):
        recipe = found.decode(drawn(found, seed))
        assert load_recipe(dump_recipe(recipe)) == recipe
        point = found.encode(recipe)
        again = found.decode(point)
        assert [r.place for r in again.rules] == [r.place for r in recipe.rules]
        for name in BERT:
            ours, theirs = (r.settings(name, layer_of(name)) for r in (again, recipe))
            assert ours.keys() == theirs.keys()
            assert ours["lambda"] == pytest.approx(theirs["lambda"], rel=1e-9)
            assert ours["weight"] == pytest.approx(theirs["weight"], abs=0.01)
            assert ours.get("sign") == theirs.get("sign")


@pytest.mark.parametrize("more", GROUPINGS.values(), ids=GROUPINGS.keys())
def test_the_equal_point_is_in_the_space(more):
    found = space(**more)
    start = found.encode_equal(1.0)
    assert start.keys() == {k.name for k in found.knobs}
    assert found.encode(found.decode(start)) is not None


def test_recipes_of_other_splines_have_no_point():
    """Three knots cannot make what four do, but four make a straight line; two groups cannot make what three do."""
    two, three, four = (space(LLAMA, knots=k) for k in (2, 3, 4))
    assert three.encode(four.decode(drawn(four))) is None
    assert four.encode(two.decode(drawn(two))) is not None
    assert space(groups=2).encode(space(groups=3).decode(drawn(space(groups=3)))) is None
    several, other = space(method=["ties", "dare_ties"]), space(method="task_arithmetic", tune=None)
    assert several.encode(other.decode(drawn(other))) is None


def test_several_methods_are_spaces_of_their_own():
    found = space(method=["task_arithmetic", "ties"], tune=["lambda", "density"], settings={"sign": "count"})
    assert [k.name for k in found.knobs] == ["method", "task_arithmetic.lambda", "ties.lambda", "ties.density"]
    point = {"method": "ties", "task_arithmetic.lambda": 0.3, "ties.lambda": 1.5, "ties.density": 0.4}
    recipe = found.decode(point)
    assert recipe.method == "ties"
    assert recipe.settings("w", 0)["sign"] == "count"
    assert recipe.settings("w", 0)["lambda"] == 1.5
    assert found.encode(recipe) == {n: v for n, v in point.items() if not n.startswith("task")}
    assert found.decode({**point, "method": "task_arithmetic"}).settings("w", 0)["lambda"] == 0.3
    assert space(method=["ties"]).knobs == space(method="ties").knobs


NO_LAYERS = ["embed.weight", "head.weight"]


@pytest.mark.parametrize(
    ("names", "more", "said"),
    [
        (NO_LAYERS, {"groups": "per-layer"}, r"^search\.layer_groups: the names of the base's .* tell of no layers"),
        (NO_LAYERS, {"groups": 2}, r"^search\.layer_groups: .* no layers"),
        (NO_LAYERS, {"knots": 2}, r"^search\.knots: .* no layers"),
        (NO_LAYERS, {"classes": True}, r"^search\.tensor_classes: .* do not tell attention, MLP and norms apart"),
        (BERT, {"knots": 5}, r"^search\.knots: a spline of 5 knots through 4 layers; write a number from 2 to 4"),
        (BERT, {"knots": 2, "groups": 2}, r"^search\.knots: a spline stands in the place of groups"),
        (BERT, {"groups": 5}, r"^search\.layer_groups: 5 groups of 4 layers; write a number from 1 to 4"),
        (BERT, {"method": ["ties", "ties"]}, r"^search\.method: a method is listed twice"),
        (BERT, {"method": ["ties", "tise"]}, r"^search\.method: .*'tise'; did you mean 'ties'"),
        (BERT, {"method": ["ties", "dare_ties"], "tune": ["lamda"]}, r"^search: none of the methods .* 'lamda'; did"),
        (BERT, {"method": ["ties", "task_arithmetic"], "tune": ["density"]}, r"task_arithmetic has nothing to tune"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_refused(names, more, said):
    with pytest.raises(BadInput, match=said):
        space(names, **more)


def test_a_division_covers_what_it_names():
    for more in GROUPINGS.values():
        found = division_of(LLAMA, more.get("groups", 1), more.get("classes", False), more.get("knots"), "search")
        for name in LLAMA:
            *_, (_, blend) = [part for part in found.parts if part[0].covers(name, layer_of(name))]
            assert sum(share for _, share in blend) == pytest.approx(1.0)
            assert {suffix for suffix, _ in blend} <= set(found.suffixes)
