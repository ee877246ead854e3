"""Settings of every tensor, written as rules: the rules say the same, and they are few."""

import random

import pytest

from evolver.merging.settings.rules import rules_of
from evolver.records.recipe import Expert, Merge, layer_of

LLAMA = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"] + [
    f"model.layers.{i}.{part}.weight"
    for i in range(12)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
]
# Parts that hold each other's names, tensors that do, and two stacks with the same numbers.
TRICKY = ["weight", "head.weight", "encoder.head.weight", "layers.1.w", "layers.1.ww", "layers.11.w"] + [
    f"{stack}.layer.{i}.{part}"
    for stack in ("encoder", "decoder")
    for i in range(4)
    for part in ("output.dense.weight", "attention.output.dense.weight", "attention.self.query.weight")
]


def said(values):
    recipe = Merge("simple", (), Expert("b", "b"), rules_of(values))
    return {n: recipe.settings(n, layer_of(n)) for n in values}


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("names", [LLAMA, TRICKY], ids=["llama", "tricky"])
def test_every_tensor_gets_its_settings(names, seed):
    rng = random.Random(seed)
    by_layer = {layer_of(n): rng.randrange(3) / 2 for n in names}
    filters = rng.sample(["mlp", "attention", "output", "norm", "1", "dense", "head", ".w", "layers.1"], 2)
    values = {}
    for name in names:
        hit = [f for f in filters if f in name]
        weight = by_layer[layer_of(name)] if not hit else (0.9, 0.2)
        density = rng.choice([0.1, 0.2]) if seed % 3 == 0 else 0.4
        values[name] = {"weight": weight, "density": density, "rescale": "l1" if hit and seed % 2 else "none"}
    assert said(values) == values


def test_rules_are_few():
    same = {n: {"weight": 0.5} for n in LLAMA}
    assert len(rules_of(same)) == 1
    mlp = {n: {"weight": 0.1 if "mlp" in n else 0.5} for n in LLAMA}
    assert len(rules_of(mlp)) == 2
    halves = {n: {"weight": 0.1 if (layer_of(n) or 0) > 5 else 0.5} for n in LLAMA}
    assert [r.place.layers for r in rules_of(halves)] == [None, (6, 12)]
    slope = {n: {"weight": (layer_of(n) or 0) / 11, "lambda": (layer_of(n) or 0) / 11} for n in LLAMA}
    assert len(rules_of(slope)) == 12
    one = {n: {"weight": 0.1 if n == "model.layers.3.mlp.up_proj.weight" else 0.5} for n in LLAMA}
    assert [r.place.contains for r in rules_of(one)] == ["", "model.layers.3.mlp.up_proj.weight"]


def test_no_settings_are_no_rules():
    assert rules_of({n: {} for n in LLAMA}) == ()
