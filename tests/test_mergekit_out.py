"""Recipes written as mergekit's files: what is read back makes the same model; what cannot be written says why."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent / "oracles"))

from cases import cases, located
from checkpoints import make
from prints import prints

from evolver.checkpoints.sources import open_base, open_expert
from evolver.errors import BadInput
from evolver.merging import mergekit
from evolver.merging.materialise import Materialiser
from evolver.merging.mergekit.writer import RANDOM, Inexpressible, dump
from evolver.records.noise import Noise
from evolver.records.recipe import Cross, Expert, Layers, Merge, Place, Rule


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folders = {n: str(p) for n, p in make(tmp_path_factory.mktemp("models") / "m").items()}
    base = open_base(folders["base"])
    sources = {n: base if n == "base" else open_expert(p, base, n) for n, p in folders.items()}
    nodes = {folders[n]: Expert(n, s.digest()) for n, s in sources.items()}
    materialiser = Materialiser(base, {nodes[folders[n]].digest: s for n, s in sources.items()}, torch.float32)
    return folders, nodes, materialiser


def written(recipe, world, **more):
    _, nodes, materialiser = world
    return dump(recipe, {n.digest: r for r, n in nodes.items()}, materialiser.base.names(), "float32", **more)


def read(text, world, tmp_path):
    file = tmp_path / "config.yml"
    file.write_text(text)
    return mergekit.read(file).recipe(world[1], world[2].base.names())


@pytest.mark.whole
@pytest.mark.parametrize("case", cases(), ids=lambda c: c["name"])
def test_what_is_written_is_read_as_the_same_model(case, world, tmp_path):
    folders, nodes, materialiser = world
    recipe = mergekit.parse(located(case["config"], folders), "c").recipe(nodes, materialiser.base.names())
    again = read(written(recipe, world), world, tmp_path)
    assert prints(dict(materialiser.stream(again))) == prints(dict(materialiser.stream(recipe)))


def test_a_merge_of_merges_becomes_documents(world, tmp_path):
    folders, nodes, materialiser = world
    base, one, two = (nodes[folders[n]] for n in ("base", "e1", "e2"))
    inner = Merge("linear", (one, two), base, (Rule.of({"weight": (0.3, 0.7)}),))
    outer = Merge("slerp", (inner, one), inner, (Rule.of({"t": 0.25}),))
    text = written(outer, world)
    documents = list(yaml.safe_load_all(text))
    assert [d["merge_method"] for d in documents] == ["linear", "slerp"]
    assert documents[1]["base_model"] == documents[0]["name"]
    again = read(text, world, tmp_path)
    assert prints(dict(materialiser.stream(again))) == prints(dict(materialiser.stream(outer)))


def test_settings_by_place_become_filters(world, tmp_path):
    folders, nodes, materialiser = world
    base, one = nodes[folders["base"]], nodes[folders["e1"]]
    rules = (
        Rule.of({"weight": (0.5,)}),
        Rule.of({"weight": (0.25,)}, Place((1, 2))),
        Rule.of({"weight": (0.1,)}, Place(contains="down_proj")),
    )
    recipe = Merge("task_arithmetic", (one,), base, rules)
    filters = yaml.safe_load(written(recipe, world))["models"][0]["parameters"]["weight"]
    assert {"filter": "model.layers.1.mlp.down_proj.weight", "value": 0.1} in filters
    assert {"filter": "model.layers.1.mlp.up_proj.weight", "value": 0.25} in filters
    assert filters[-1] == {"value": 0.5}
    assert not any("embed" in f.get("filter", "") for f in filters)
    again = read(written(recipe, world), world, tmp_path)
    for name in materialiser.names(recipe):
        layer = int(name.split(".")[2]) if ".layers." in name else None
        assert again.settings(name, layer)["weight"] == recipe.settings(name, layer)["weight"]


def test_a_random_method_says_that_mergekit_draws_otherwise(world):
    folders, nodes, _ = world
    values = Rule.of({"weight": 1.0, "density": 0.5})
    recipe = Merge("dare_linear", (nodes[folders["e1"]],), nodes[folders["base"]], (values,))
    assert written(recipe, world).startswith(RANDOM)


def test_what_mergekit_cannot_make_says_why(world):
    folders, nodes, _ = world
    base, one, two = (nodes[folders[n]] for n in ("base", "e1", "e2"))
    half = Rule.of({"weight": 0.5})
    crossed = Cross(one, (two,), "evolver", 0.5, 0.5, 1)
    woven = Layers((Merge("linear", (one,), base, (half,)), Merge("linear", (two,), base, (half,))), ((0, 0), (1, 1), (0, 2), (1, 3)), (0, 1))  # fmt: skip  # noqa: E501
    for recipe, why in [
        (crossed, "scalar by scalar"),
        (one, "as it is"),
        (Noise(one, (one, two), base, ((1, 0.5),)), "adds seeded noise"),
        (Merge("linear", (crossed, two), base, (half,)), "scalar by scalar"),
        (Merge("consensus", (one, two), base, (half,)), "no method consensus"),
        (Merge("ties", (one, two), base, (Rule.of({"weight": 0.5, "trim_scope": "global"}),)), "setting trim_scope"),
        (Merge("ties", (one, two), base, (Rule.of({"weight": 0.5, "rescale": "l2"}),)), "rescale by l2"),
        (Merge("karcher", (one, two), base, (Rule.of({"weight": (0.2, 0.8)}),)), "no weights"),
        (woven, "woven"),
        # A search may choose such numbers; mergekit takes no probability of 0 or of 1.
        (
            Merge("della", (one, two), base, (Rule.of({"weight": 0.5, "density": 0.9, "epsilon": 0.3}),)),
            "epsilon 0.3 b",
        ),
        (
            Merge("della", (one, two), base, (Rule.of({"weight": 0.5, "density": 0.2, "epsilon": 0.2}),)),
            "epsilon 0.2 b",
        ),
        (Merge("della", (one, two), base, (Rule.of({"weight": 0.5, "density": 0.9}),)), "epsilon 0.15 b"),
    ]:
        with pytest.raises(Inexpressible, match=why):
            written(recipe, world)


def test_an_epsilon_that_the_density_has_no_room_for_is_refused(world, tmp_path):
    """Only a default, and what a search chooses, is cut."""
    folders = world[0]

    def della(shared, *own):
        models = [{"model": folders[f"e{n}"], "parameters": {"weight": 0.5, **o}} for n, o in enumerate(own, 1)]
        parameters = {"parameters": shared} if shared else {}
        file = {"merge_method": "della", "base_model": folders["base"], "models": models, **parameters}
        return read(documents(file), world, tmp_path)

    for fits in (
        {"density": 0.9, "epsilon": 0.1},
        {"density": 0.05, "epsilon": 0.05},
        {"density": 0.9},
        {"epsilon": 0.9},
    ):
        assert della(fits, {}, {}).method == "della"
    says = r"epsilon: 0\.3 is too large for density 0\.9, .*; write a number from 0 to 0\.1\."
    with pytest.raises(BadInput, match=says):
        della({"density": 0.9, "epsilon": 0.3}, {}, {})
    with pytest.raises(BadInput, match=says):
        della({"epsilon": 0.3}, {"density": 0.5}, {"density": 0.9})
    with pytest.raises(BadInput, match=says):
        della({"density": [{"filter": "mlp", "value": 0.9}, {"value": 0.5}], "epsilon": 0.3}, {}, {})


def test_filters_that_name_every_tensor_need_no_last_one(world, tmp_path):
    folders, _, materialiser = world
    filters = [{"filter": n, "value": 0.5} for n in materialiser.base.names()]
    every = {"merge_method": "slerp", "base_model": folders["base"], "models": [{"model": folders["e1"]}]}
    recipe = read(documents(every | {"parameters": {"t": filters}}), world, tmp_path)
    assert all(recipe.settings(n, 0)["t"] == 0.5 for n in materialiser.base.names())
    with pytest.raises(BadInput, match="t: missing in model"):
        read(documents(every | {"parameters": {"t": filters[:-1]}}), world, tmp_path)


def documents(*raw):
    return "---\n".join(yaml.safe_dump(d) for d in raw)


def document(models, name=None, method="linear"):
    entries = [{"model": m, "parameters": {"weight": 0.5}} for m in models]
    return {"merge_method": method, "models": entries} | ({"name": name} if name else {})


def test_documents_use_each_other_by_name_in_any_order(world, tmp_path):
    folders, nodes, materialiser = world
    one, two, three = (folders[n] for n in ("e1", "e2", "e3"))
    text = documents(document(["ab", three]), document([one, two], "ab"))
    recipe = read(text, world, tmp_path)
    inner = Merge("linear", (nodes[one], nodes[two]), nodes[one], (Rule.of({"weight": 0.5}),))
    assert prints(dict(materialiser.stream(recipe.inputs[0]))) == prints(dict(materialiser.stream(inner)))
    configuration = mergekit.read(tmp_path / "config.yml")
    assert configuration.origin == one
    assert configuration.references == [one, two, three]


def test_the_last_of_named_documents_is_the_model(world, tmp_path):
    folders, nodes, _ = world
    text = documents(document([folders["e1"]], "a"), document([folders["e2"], "a"], "b"))
    assert read(text, world, tmp_path).inputs[0] == nodes[folders["e2"]]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ([document(["x"], "a"), document(["y"], "a")], "is used twice"),
        ([document(["x"]), document(["y"])], "have no name"),
        ([document(["b"], "a"), document(["a"], "b")], "uses itself"),
        ([document(["x"]), ["a list"]], "not a mapping"),
        ([{"merge_method": "linear", "modules": {"a": {}, "b": {}}}], "several modules"),
    ],
)
def test_documents_that_do_not_fit_are_refused(raw, says, world, tmp_path):
    with pytest.raises(BadInput, match=says):
        read(documents(*raw), world, tmp_path)


def test_a_single_module_is_the_model(world, tmp_path):
    plain = document([world[0]["e1"], world[0]["e2"]])
    inside = {"merge_method": "linear", "modules": {"text": {"models": plain["models"]}}}
    assert read(documents(inside), world, tmp_path) == read(documents(plain), world, tmp_path)
