"""Every merge method on models with tensors at the edge: one scalar, none at all, no axis, integers, all alike."""

import json

import pytest
import torch
from safetensors.torch import save_file
from test_methods import REQUIRED, TAKES

from evolver.checkpoints.sources import open_base, open_expert
from evolver.merging.materialise import Materialiser
from evolver.merging.methods import METHODS
from evolver.records.recipe import Expert, Merge, Rule

NAMES = ("base", "a", "b", "c")


def tensors(seed):
    draw = torch.Generator().manual_seed(seed)

    def moved(*shape):
        return torch.ones(shape) + 0.1 * torch.randn(shape, generator=draw)

    return {
        "model.embed_tokens.weight": moved(4, 3),
        "model.layers.0.gate": moved(1),
        "model.layers.0.square.weight": moved(1, 1),
        "model.layers.0.column.weight": moved(5, 1),
        "model.layers.0.scale": moved(),
        "model.layers.0.nothing": moved(0, 3),
        "model.layers.0.untrained": torch.full((7,), 2.0),
        "model.layers.0.zeros": torch.zeros(6),
        "model.layers.0.steps": torch.tensor([seed, 7]),
        "model.layers.0.mask": torch.tensor([seed % 2 == 0, True]),
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edges")
    for seed, name in enumerate(NAMES):
        (folder / name).mkdir()
        save_file(tensors(seed), folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
    base = open_base(str(folder / "base"))
    return {n: base if n == "base" else open_expert(str(folder / n), base, n) for n in NAMES}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_at_the_edge(sources, name):
    nodes = {n: Expert(n, s.digest()) for n, s in sources.items()}
    materialiser = Materialiser(sources["base"], {nodes[n].digest: s for n, s in sources.items()})
    chosen = {1: ("a",), 2: ("base", "a")}.get(TAKES.get(name, 0), ("a", "b", "c"))
    settings = METHODS[name].complete(REQUIRED.get(name, {}), len(chosen), name)
    recipe = Merge(name, tuple(nodes[n] for n in chosen), nodes["base"], (Rule.of(settings),))
    merged = dict(materialiser.stream(recipe))
    base, first = sources["base"], sources[chosen[0]]
    assert list(merged) == base.names()
    for tensor_name, tensor in merged.items():
        info = base.headers[tensor_name]
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), tensor_name
        assert bool(tensor.isfinite().all()), tensor_name
        if not info.dtype.is_floating_point:
            assert torch.equal(tensor, first.tensor(tensor_name)), tensor_name
    assert torch.allclose(merged["model.layers.0.untrained"], torch.full((7,), 2.0), rtol=1e-6)
    assert torch.equal(merged["model.layers.0.zeros"], torch.zeros(6))
