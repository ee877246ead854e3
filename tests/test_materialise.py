"""Recipes into weights: the same bytes whatever is cached, cut or threaded, and defined answers at the edges."""

import json
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

from evolver.checkpoints.lora import LoraAdapter
from evolver.checkpoints.weights import Checkpoint
from evolver.merging import crossing, methods, noise
from evolver.merging.engine import pieces
from evolver.merging.materialise import Materialiser
from evolver.records.node import NODES, Node
from evolver.records.noise import Noise
from evolver.records.recipe import (
    Cross,
    Expert,
    Layers,
    Merge,
    Place,
    Rule,
    ancestors,
    dump_recipe,
    load_recipe,
)

NAMES = {
    "model.embed_tokens.weight": (12, 10),
    "model.layers.0.mlp.weight": (30, 7),
    "model.layers.1.mlp.weight": (7, 30),
    "model.layers.1.scale": (1,),
    "model.layers.1.gate": (),
    "model.norm.weight": (10,),
}


def content(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    out = {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in NAMES.items()}
    return out | {"model.positions": torch.arange(5) + seed, "model.mask": torch.tensor([True, seed % 2 == 0])}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A bfloat16 base and three experts, the last one in float32."""
    opened = {}
    for seed, name in enumerate(("base", "a", "b", "c")):
        folder = tmp_path_factory.mktemp(name)
        save_file(content(seed, torch.float32 if name == "c" else torch.bfloat16), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        opened[name] = Checkpoint(folder, name)
    return opened


BASE, A, B, C = (Expert(n, n) for n in ("base", "a", "b", "c"))
CROSS = Cross(A, (B,), "evolver", 0.5, 0.5, 1)
DEEP = Cross(Cross(CROSS, (C,), "evolver", 0.25, 0.5, 2), (Cross(B, (CROSS,), "evolver", 0.5, 0.75, 3),), "evolver", 0.5, 0.5, 4)  # fmt: skip  # noqa: E501
DIFFERENCE = Cross(A, (B, C, CROSS), "current-to-best/1", 0.5, 0.5, 5)
BY_ROWS = Cross(CROSS, (B,), "evolver", 0.5, 0.5, 6, "row")
BY_LAYERS = Cross(BY_ROWS, (C,), "evolver", 0.5, 0.5, 7, "layer")
NOISY = Noise(CROSS, (A, B, C), BASE, ((1, 0.5), (2, -0.25)))
LOW_RANK = Noise(NOISY, (A, B, C), BASE, ((3, 0.5), (4, 0.125)), "rademacher", 2)
OF_CROSS = Merge("simple", (CROSS, DEEP, C), BASE)


def rule(method, place=None, **values):
    found = methods.METHODS[method]
    needed = {s.name: 0.01 for s in found.settings.values() if s.required}
    return Rule.of(found.complete({**needed, **values}, found.takes or 3, "here"), place)


THIN = Merge("ties", (A, B, CROSS), BASE, (rule("ties", density=0.3),))
DROPPED = Merge("dare_ties", (A, B, DEEP), BASE, (rule("dare_ties", density=0.5, seed=3),))
RECIPES = {"expert": C, "cross": CROSS, "deep": DEEP, "difference": DIFFERENCE, "by rows": BY_ROWS,
           "by layers": BY_LAYERS, "of cross": OF_CROSS, "ties": THIN,
           "noise": NOISY, "noise of low rank": LOW_RANK,
           "dare": DROPPED, "merge of merge": Merge("linear", (THIN, DROPPED, A), BASE, (rule("linear"),))}  # fmt: skip
EVERY = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def build(sources, recipe, cache=0, dtype=None):
    return dict(Materialiser(sources["base"], sources, dtype, cache).stream(recipe))


def same(one, two):
    assert list(one) == list(two)
    for name in one:
        assert one[name].dtype == two[name].dtype
        assert one[name].shape == two[name].shape
        assert torch.equal(one[name], two[name])


@EVERY
def test_names_shapes_and_dtypes_are_those_of_the_base(sources, recipe):
    model = build(sources, recipe)
    assert list(model) == sources["base"].names()
    for name, tensor in model.items():
        assert tensor.shape == sources["base"].headers[name].shape
        assert tensor.dtype == sources["base"].headers[name].dtype
        assert not tensor.is_floating_point() or tensor.isfinite().all()


@EVERY
def test_twice_gives_the_same_bytes(sources, recipe):
    same(build(sources, recipe), build(sources, recipe))


@pytest.fixture(scope="module")
def fresh(sources):
    """Every recipe, built without a cache."""
    return {r.id: build(sources, r) for r in RECIPES.values()}


@EVERY
@pytest.mark.parametrize("slots", [1, 2, 3, 100])
def test_the_cache_changes_nothing_and_neither_does_eviction(sources, fresh, recipe, slots):
    """One materialiser meets all recipes, twice, with room for so many models; each has the bytes of a fresh build."""
    keeping = Materialiser(sources["base"], sources, None, slots * sources["base"].size)
    for _ in range(2):
        for other in (recipe, *RECIPES.values()):
            same(dict(keeping.stream(other)), fresh[other.id])
            assert len(keeping._resident) <= slots


def test_a_layer_is_crossed_as_a_whole(sources):
    """With F = 1 every tensor of a layer is the parent's, or every one is the partner's; both happen."""
    parent, partner = (build(sources, node) for node in (A, B))
    seen = {}
    for seed in range(12):
        child = build(sources, Cross(A, (B,), "evolver", 1.0, 0.5, seed, "layer"))
        for layer in ("embed", "layers.0.", "layers.1.", "norm"):
            names = [n for n in child if layer in n]
            of = {n: torch.equal(child[n], partner[n]) for n in names}
            assert all(of[n] or torch.equal(child[n], parent[n]) for n in names)
            assert len(set(of.values())) == 1
            seen.setdefault(layer, set()).add(of[names[0]])
    assert all(found == {True, False} for found in seen.values())


def test_the_population_stays_resident(sources, monkeypatch):
    """The second offspring of one parent does not build the parent again."""
    keeping = Materialiser(sources["base"], sources, None, 10 * sources["base"].size)
    dict(keeping.stream(Cross(DEEP, (CROSS,), "evolver", 0.5, 0.5, 8)))
    assert DEEP.id in keeping._resident
    built = []
    cross = crossing.cross
    monkeypatch.setattr(crossing, "cross", lambda *given: built.append(given[5]) or cross(*given))
    dict(keeping.stream(Cross(DEEP, (CROSS,), "evolver", 0.5, 0.5, 9)))
    assert set(built) == {9}


def test_an_interrupted_stream_leaves_nothing_half_built(sources):
    keeping = Materialiser(sources["base"], sources, None, 10 * sources["base"].size)
    next(keeping.stream(DEEP))
    same(dict(keeping.stream(DEEP)), build(sources, DEEP))


@EVERY
def test_pieces_and_threads_change_nothing(sources, recipe, monkeypatch):
    whole = build(sources, recipe)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setattr(pieces, "PIECE", 37)
        monkeypatch.setattr(noise, "NOISE_PIECE", 512)
        same(build(sources, recipe), whole)
    finally:
        torch.set_num_threads(before)


@EVERY
def test_integers_are_copied_from_the_first_input(sources, recipe):
    model = build(sources, recipe)
    first = "c" if recipe is C else "a"
    assert torch.equal(model["model.positions"], sources[first].tensor("model.positions"))
    assert torch.equal(model["model.mask"], sources[first].tensor("model.mask"))


def test_arithmetic_is_float32_rounded_once(sources):
    """The average of three models, in float32 from their bfloat16 values, then one rounding."""
    average = build(sources, Merge("simple", (A, B, A), BASE))
    for name in NAMES:
        a, b = (sources[n].tensor(name).float() for n in "ab")
        assert torch.equal(average[name], ((a + b + a) / 3).bfloat16())


def test_task_vectors_are_float32_too(sources):
    """base + λ Σ w (expert - base), from bfloat16 values in float32, then one rounding."""
    merged = rule("task_arithmetic", weight=[0.3, 0.3, 0.4], **{"lambda": 0.7})
    model = build(sources, Merge("task_arithmetic", (A, B, A), BASE, (merged,)))
    for name in NAMES:
        base, a, b = (sources[n].tensor(name).double() for n in ("base", "a", "b"))
        exact = base + 0.7 * (0.3 * (a - base) + 0.3 * (b - base) + 0.4 * (a - base))
        step = torch.finfo(torch.bfloat16).eps * exact.abs().clamp(min=1e-3)
        assert ((model[name].double() - exact).abs() <= 0.5 * step + 1e-6).all()


def test_another_dtype_is_that_of_every_floating_tensor(sources):
    model = build(sources, CROSS, dtype=torch.float16)
    assert {t.dtype for n, t in model.items() if n in NAMES} == {torch.float16}
    assert model["model.positions"].dtype == torch.int64
    float32 = build(sources, C, dtype=torch.float32)
    assert all(torch.equal(float32[n], sources["c"].tensor(n)) for n in NAMES)


def test_settings_hold_for_their_layers(sources):
    """λ = 1 on one expert is that expert, λ = 0 the base: everywhere, in layer 1, and outside the layers."""
    off = {"weight": [1.0, 0.0, 0.0], "lambda": 0.0}
    on = {"weight": [1.0, 0.0, 0.0], "lambda": 1.0}
    rules = (rule("task_arithmetic", **off), rule("task_arithmetic", Place((1, 2)), **on))
    model = build(sources, Merge("task_arithmetic", (C, B, A), BASE, rules), dtype=torch.float32)
    for name in NAMES:
        source = "c" if ".1." in name else "base"
        assert torch.allclose(model[name], sources[source].tensor(name).float(), atol=1e-6)
    rules = (rule("task_arithmetic", **off), rule("task_arithmetic", Place(outside=True), **on))
    model = build(sources, Merge("task_arithmetic", (C, B, A), BASE, rules), dtype=torch.float32)
    for name in NAMES:
        source = "base" if "layers" in name else "c"
        assert torch.allclose(model[name], sources[source].tensor(name).float(), atol=1e-6)


@pytest.mark.parametrize("values", [{"lambda": 0.0}, {"weight": 0.0}])
def test_no_mass_gives_the_base(sources, values):
    model = build(sources, Merge("task_arithmetic", (A, B, C), BASE, (rule("task_arithmetic", **values),)))
    assert all(torch.equal(model[n], sources["base"].tensor(n)) for n in NAMES)


@pytest.mark.parametrize("name", [n for n, m in methods.METHODS.items() if m.on_deltas])
def test_experts_that_are_the_base_give_the_base(sources, name):
    count = methods.METHODS[name].takes or 3
    model = build(sources, Merge(name, (BASE,) * count, BASE, (rule(name),)))
    assert all(torch.equal(model[n], sources["base"].tensor(n)) for n in NAMES)


def test_settings_go_by_place(sources):
    """The later rule wins; a name is matched by a part of it."""
    rules = (Rule.of({"weight": 0.0}), Rule.of({"weight": 1.0}, Place((1, 2), contains="mlp")))
    model = build(sources, Merge("task_arithmetic", (A,), BASE, rules))
    changed = {n for n in NAMES if not torch.equal(model[n], sources["base"].tensor(n))}
    assert changed == {"model.layers.1.mlp.weight"}


def test_trimming_over_the_model_as_a_whole(sources):
    """``trim_scope: global``: the largest third of all deltas of the model, wherever they lie."""
    recipe = Merge("ties", (A,), BASE, (Rule.of({"density": (1 / 3,), "trim_scope": "global"}),))
    model = build(sources, recipe, dtype=torch.float32)
    base = {n: sources["base"].tensor(n).float() for n in NAMES}
    deltas = {n: sources["a"].tensor(n).float() - base[n] for n in NAMES}
    flat = torch.cat([d.reshape(-1).abs() for d in deltas.values()])
    cut = flat.sort(descending=True).values[int(len(flat) / 3) - 1]
    for name in NAMES:
        wanted = base[name] + torch.where(deltas[name].abs() >= cut, deltas[name], 0.0)
        assert torch.allclose(model[name], wanted, atol=1e-6)


def test_layers_are_copied_in_any_order(sources):
    """Three layers from two models; what lies outside comes from the ends."""
    recipe = Layers((A, B), ((1, 1), (0, 0), (1, 0)), (0, 1))
    model = build(sources, recipe)
    a, b = sources["a"], sources["b"]
    assert torch.equal(model["model.layers.0.mlp.weight"], b.tensor("model.layers.1.mlp.weight"))
    assert torch.equal(model["model.layers.1.mlp.weight"], a.tensor("model.layers.0.mlp.weight"))
    assert torch.equal(model["model.layers.2.mlp.weight"], b.tensor("model.layers.0.mlp.weight"))
    assert torch.equal(model["model.embed_tokens.weight"], a.tensor("model.embed_tokens.weight"))
    assert torch.equal(model["model.norm.weight"], b.tensor("model.norm.weight"))
    assert "model.layers.0.scale" in model
    assert "model.layers.1.scale" not in model


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "della", "sce", "model_stock"])
def test_lines_wraps_any_method(sources, name):
    """At α = 1, β = 0 it changes nothing; at β = -1 the last layer is the base's and the first one stays."""
    inner = Merge(name, (A, B), BASE)
    plain = build(sources, inner, dtype=torch.float32)
    same_again = Merge("lines", (inner,), BASE, (Rule.of({"alpha": 1.0, "beta": 0.0}),))
    faded = Merge("lines", (inner,), BASE, (Rule.of({"alpha": 1.0, "beta": -1.0}),))
    for n in NAMES:
        assert torch.allclose(build(sources, same_again, dtype=torch.float32)[n], plain[n], atol=1e-6)
    model = build(sources, faded, dtype=torch.float32)
    last = "model.layers.1.mlp.weight"
    assert torch.equal(model[last], sources["base"].tensor(last).float())
    assert torch.allclose(model["model.layers.0.mlp.weight"], plain["model.layers.0.mlp.weight"], atol=1e-6)


@pytest.mark.parametrize("name", ["ties", "tsv_m"])
def test_subspace_boosting_wraps_any_method(sources, name):
    """At β = 1 it changes nothing; at β = 0 all directions of the merge become as strong as the strongest."""
    inner = Merge(name, (A, B), BASE)
    plain, same_again, boosted = (
        build(sources, recipe, dtype=torch.float32)
        for recipe in (
            inner,
            *(Merge("subspace_boosting", (inner,), BASE, (Rule.of({"beta": b}),)) for b in (1.0, 0.0)),
        )
    )
    for n in NAMES:
        assert torch.allclose(same_again[n], plain[n], atol=1e-6)
    matrix = "model.layers.1.mlp.weight"
    values = torch.linalg.svdvals(boosted[matrix] - sources["base"].tensor(matrix).float())
    strongest = torch.linalg.svdvals(plain[matrix] - sources["base"].tensor(matrix).float())[0]
    assert torch.allclose(values, strongest.expand(len(values)), rtol=1e-3)


def test_an_adapter_is_an_expert_like_others(sources, tmp_path):
    """Cached once it has been an input, and never different for it."""
    a, b = torch.ones(2, 7), torch.ones(30, 2)
    module = "base_model.model.model.layers.0.mlp"
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2}')
    opened = {**sources, "lora": LoraAdapter(tmp_path, "lora", sources["base"])}
    recipe = Cross(Expert("lora", "lora"), (A,), "evolver", 0.5, 0.5, 1)
    keeping = Materialiser(sources["base"], opened, None, 10 * sources["base"].size)
    first = dict(keeping.stream(recipe))
    assert list(keeping._resident) == [Expert("lora", "lora").id]
    same(dict(keeping.stream(recipe)), first)
    same(build(opened, recipe), first)
    delta = build(opened, Expert("lora", "lora"), dtype=torch.float32)["model.layers.0.mlp.weight"]
    assert not torch.equal(delta, sources["base"].tensor("model.layers.0.mlp.weight").float())


def grown(make, generations):
    """A model of so many generations, each of which is made from the two before."""
    one, two = A, B
    for generation in range(generations):
        one, two = two, make(two, one, generation)
    return two


def crossed(parent, partner, seed):
    return Cross(parent, (partner,), "evolver", 0.5, 0.5, seed)


def layered(one, two, _):
    return Layers((one, two), ((0, 0), (1, 1)), (0, 1))


def averaged(one, two, _):
    return Merge("simple", (one, two), BASE)


def trimmed(one, two, _):
    """Of a model of which two places are trimmed in different ways, each as the model as a whole says."""
    rules = [rule("ties", place, trim_scope="global", density=d) for place, d in ((None, 0.5), (Place((0, 1)), 0.4))]
    return Merge("ties", (one, two, C), BASE, tuple(rules))


def calls_now():
    frame, count = sys._getframe(), 0
    while frame is not None:
        frame, count = frame.f_back, count + 1
    return count


@pytest.mark.parametrize("make", [crossed, layered, averaged], ids=["crossovers", "layer programs", "merges"])
def test_a_model_of_many_generations_takes_a_step_for_each(sources, monkeypatch, make):
    """Path by path, 60 generations would never end; 1,000 would be too deep for calls that nest."""
    deep = grown(make, 60)
    same(build(sources, deep), build(sources, load_recipe(dump_recipe(deep)), cache=1 << 16))
    monkeypatch.setattr("evolver.merging.materialise.Checkpoint.names", lambda self: ["model.norm.weight"])
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(calls_now() + 100)
    try:
        (built,) = build(sources, grown(make, 1000)).values()
    finally:
        sys.setrecursionlimit(before)
    assert built.isfinite().all()


def test_a_long_lineage_holds_few_tensors_at_a_time(sources, monkeypatch):
    """Where one member of a population is crossed with another one that it never helps, the order of a plain walk holds
    every version of the other one at once.
    """
    helper, member = A, B
    for seed in range(100):
        helper, member = crossed(helper, C, seed), crossed(member, helper, seed)
    recipe = averaged(helper, member, 0)
    held, tensor_of = [], Materialiser._tensor

    def watched(self, node, name, values):
        held.append(len(values))
        return tensor_of(self, node, name, values)

    monkeypatch.setattr(Materialiser, "_tensor", watched)
    built = build(sources, recipe)
    assert max(held) <= 8
    assert len(held) == len(built) * len(list(ancestors(recipe)))
    held.clear()
    build(sources, layered(recipe, recipe, 0))  # tensor by tensor
    assert max(held) <= 8


def test_what_merges_on_merges_ask_of_whole_models_is_answered_from_below(sources, monkeypatch):
    """A pass over a whole model may open one for another place below it, and never one after the other."""
    open_now, most, model_of = [0], [0], Materialiser._model

    def counted(self, node):
        model = model_of(self, node)
        tensors = model.tensors

        def watched():
            open_now[0] += 1
            most[0] = max(most[0], open_now[0])
            yield from tensors()
            open_now[0] -= 1

        model.tensors = watched
        return model

    monkeypatch.setattr(Materialiser, "_model", counted)
    build(sources, grown(trimmed, 6))
    assert 1 <= most[0] <= 2


def test_a_new_kind_of_node_says_its_own_and_is_computed_where_it_is_registered(monkeypatch, sources):
    """As statistics, routing and the like will be: nobody but the materialiser hears of it."""

    @dataclass(frozen=True, eq=False, repr=False)
    class Negated(Node):
        kind: ClassVar[str] = "negated"
        inputs: tuple

        def entry(self, place):
            return [place[self.inputs[0].id]]

        @classmethod
        def from_entry(cls, entry, nodes):
            return cls((nodes[entry[0]],))

        def describe(self):
            return "negated"

    Materialiser._compute.register(
        Negated, lambda self, node, name, below: -below[0] if below[0].is_floating_point() else below[0]
    )
    recipe = Merge("simple", (Negated((A,)), A), BASE)
    assert load_recipe(dump_recipe(recipe)) == recipe
    assert [n.describe() for n in ancestors(recipe)] == ["given as a", "negated", "given as base", "merge (simple)"]
    merged = build(sources, Merge("simple", (Negated((A,)), Negated((A,))), BASE))
    plain = build(sources, A)
    assert list(merged) == list(plain)
    assert all(torch.equal(merged[n], -t) for n, t in plain.items() if t.is_floating_point())
    monkeypatch.delitem(NODES, "negated")
    with pytest.raises(ValueError, match="unknown kind of node 'negated'"):
        load_recipe(dump_recipe(recipe))
