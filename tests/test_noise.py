"""Seeded noise on weights: against references in float64, and the same bits for every piece, process and processor."""

import json
import math
import os
import subprocess
import sys
from statistics import NormalDist

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

from evolver.checkpoints.weights import Checkpoint
from evolver.kernels import native
from evolver.kernels.random import draws
from evolver.merging import noise
from evolver.merging.materialise import Materialiser
from evolver.merging.noise import task_vector_rms, with_noise
from evolver.records.noise import Noise
from evolver.records.recipe import Cross, Expert, Layers, Merge, ancestors, dump_recipe, load_recipe

TERMS = ((11, 0.5), (2**64 - 1, -1.25), (13, 0.75))
KINDS = pytest.mark.parametrize(("distribution", "rank"), [("normal", 0), ("rademacher", 0), ("normal", 3), ("rademacher", 1)])  # fmt: skip  # noqa: E501


def numbers(seed, name, count, distribution):
    """The draws as the numbers that they stand for, one by one."""
    drawn = draws(seed, name, 0, count).tolist()
    if distribution == "rademacher":
        return np.array([1.0 if u >= 32768 else -1.0 for u in drawn])
    return np.array([NormalDist().inv_cdf((u + 0.5) / 65536) for u in drawn])


def reference(point, sigma, terms, distribution, rank, name):
    """The formula of ``Noise``, in float64."""
    total = np.zeros(point.shape)
    for seed, coefficient in terms:
        if rank and point.dim() > 1:
            m, n = point.shape[0], point[0].numel()
            a = numbers(seed, f"{name}#noise A", m * rank, distribution).reshape(m, rank)
            b = numbers(seed, f"{name}#noise B", n * rank, distribution).reshape(n, rank)
            epsilon = a @ b.T / math.sqrt(rank)
        else:
            epsilon = numbers(seed, f"{name}#noise", point.numel(), distribution)
        total += coefficient * epsilon.reshape(point.shape)
    return point.double().numpy() + sigma * total


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@KINDS
@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (1, 9000), (4, 3, 2)])
def test_noise_is_the_formula(distribution, rank, shape):
    point = tensor(*shape)
    found = with_noise(point, 0.3, TERMS, distribution, rank, "w")
    assert found.shape == point.shape
    assert np.allclose(found.double().numpy(), reference(point, 0.3, TERMS, distribution, rank, "w"), atol=2e-6)


def test_the_size_is_the_root_mean_square_of_all_task_vectors():
    """Differences 3 and 4 everywhere: √((9 + 16) / 2); and a reference for drawn ones of more than a piece."""
    base = torch.zeros(600)
    assert task_vector_rms([base + 3, base - 4], base) == pytest.approx(math.sqrt(12.5))
    experts, base = [tensor(3, 70_000, seed=s).bfloat16() for s in (1, 2)], tensor(3, 70_000).bfloat16()
    vectors = [(e.double() - base.double()).numpy() for e in experts]
    assert task_vector_rms(experts, base) == pytest.approx(np.sqrt(np.mean(np.square(vectors))), rel=1e-12)
    assert task_vector_rms([base, base], base) == 0


@KINDS
def test_pieces_threads_and_the_plain_code_change_no_bit(distribution, rank, monkeypatch):
    point, experts = tensor(37, 1111).bfloat16(), [tensor(37, 1111, seed=1)]
    before = torch.get_num_threads()

    def made():
        sigma = task_vector_rms(experts, point)
        return sigma, with_noise(point, sigma, TERMS, distribution, rank, "w")

    sigma, whole = made()
    try:
        for piece, threads in ((512, 1), (8192, 3), (10**9, 2)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(noise, "NOISE_PIECE", piece)
            again = made()
            assert again[0] == sigma
            assert torch.equal(again[1], whole)
        monkeypatch.setattr(native, "library", lambda: None)
        assert torch.equal(made()[1], whole)
    finally:
        torch.set_num_threads(before)


HASHED = """
import hashlib, torch
from evolver.merging.noise import task_vector_rms, with_noise
point = (torch.arange(50_000) % 997 / 997).view(50, 1000)
sigma = task_vector_rms([point * 1.01, point - 0.3], point)
out = [with_noise(p, sigma, ((5, 0.5), (6, -2.0)), d, r, "w") for d in ("normal", "rademacher") for r in (0, 2)
       for p in (point, point.bfloat16())]
print(hashlib.sha256(repr(sigma).encode() + b"".join(o.view(torch.uint8).numpy().tobytes() for o in out)).hexdigest())
"""


@pytest.mark.whole
def test_other_processors_and_processes_draw_the_same():
    found = set()
    for capability in ("default", "avx2", "avx512"):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run(
            [sys.executable, "-c", HASHED], env=environment, capture_output=True, text=True, check=True
        )
        found.add(done.stdout)
    assert len(found) == 1


@KINDS
def test_noise_has_mean_0_and_variance_1(distribution, rank):
    """Of 160,000 numbers; those of low rank hang together, so their moments are rougher."""
    drawn = with_noise(torch.zeros(400, 400), 1.0, ((3, 1.0),), distribution, rank, "w")
    assert abs(drawn.mean()) < (0.02 if not rank else 0.05)
    assert drawn.square().mean() == pytest.approx(1, abs=0.02 if not rank else 0.15)
    if rank:
        assert torch.linalg.matrix_rank(drawn.double(), rtol=1e-5) == rank


def test_normal_draws_are_symmetric_quantiles():
    table = noise._quantiles(torch.device("cpu"))
    assert torch.equal(table, -table.flip(0))
    assert np.allclose(table.numpy(), stats.norm.ppf((np.arange(65536) + 0.5) / 65536), atol=1e-6)


@KINDS
def test_a_pair_is_symmetric_and_seeds_and_names_differ(distribution, rank):
    zero = torch.zeros(30, 40)
    plus, minus, other, elsewhere = (
        with_noise(zero, 0.5, ((seed, c),), distribution, rank, name)
        for seed, c, name in ((1, 0.5, "w"), (1, -0.5, "w"), (2, 0.5, "w"), (1, 0.5, "v"))
    )
    assert torch.equal(plus, -minus)
    assert not torch.equal(plus, other)
    assert not torch.equal(plus, elsewhere)


# --- As a node of a recipe.

BASE, A, B = (Expert(n, n) for n in ("base", "a", "b"))
NOISE = Noise(A, (A, B), BASE, TERMS, "rademacher", 4)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two layers, tensors that no expert has changed, and whole numbers."""
    opened = {}
    for seed, name in enumerate(("base", "a", "b")):
        folder = tmp_path_factory.mktemp(name)
        tensors = {f"model.layers.{n}.w": tensor(6, 5, seed=10 * n + seed) for n in (0, 1)}
        tensors |= {"model.norm.weight": torch.ones(5), "model.positions": torch.arange(4) + seed}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
        opened[name] = Checkpoint(folder, name)
    return opened


def built(sources, recipe, cache=0):
    return dict(Materialiser(sources["base"], sources, None, cache).stream(recipe))


def test_a_model_with_noise(sources):
    """Of each tensor its own size; what no expert has changed stays, and so do whole numbers."""
    model = built(sources, NOISE)
    for name in ("model.layers.0.w", "model.layers.1.w"):
        base, a, b = (sources[n].tensor(name) for n in ("base", "a", "b"))
        sigma = np.sqrt(np.mean(np.square([(e - base).double().numpy() for e in (a, b)])))
        assert np.allclose(model[name].double().numpy(), reference(a, sigma, TERMS, "rademacher", 4, name), atol=1e-5)
    for name in ("model.norm.weight", "model.positions"):
        assert torch.equal(model[name], sources["a"].tensor(name))


def test_a_mean_around_a_mean_is_built_from_what_is_kept(sources):
    outer = Noise(Noise(Merge("simple", (A, B), BASE), (A, B), BASE, ((1, 0.5),)), (A, B), BASE, ((2, 0.1),))
    keeping = Materialiser(sources["base"], sources, None, 10 * sources["base"].size)
    first, again = dict(keeping.stream(outer)), dict(keeping.stream(outer))
    assert outer.point.id in keeping._resident
    for name, value in built(sources, outer).items():
        assert torch.equal(value, first[name])
        assert torch.equal(value, again[name])


def test_noise_around_a_model_of_other_layers(sources):
    """The size is that of the layer that is there; layers with equal weights get noise of their own."""
    deep = Layers((A,), ((0, 1), (0, 0), (0, 1)), (0, 0))
    recipe = Noise(deep, (A, B), BASE, ((1, 0.5),))
    keeping = Materialiser(sources["base"], sources, None, 10 * sources["base"].size)
    for model in (built(sources, recipe), dict(keeping.stream(recipe)), dict(keeping.stream(recipe))):
        for layer, of in ((0, 1), (1, 0), (2, 1)):
            name, own = f"model.layers.{layer}.w", f"model.layers.{of}.w"
            sigma = task_vector_rms([sources[e].tensor(own) for e in "ab"], sources["base"].tensor(own))
            wanted = with_noise(sources["a"].tensor(own), sigma, ((1, 0.5),), "normal", 0, name)
            assert torch.equal(model[name], wanted)


def test_noise_is_written_and_read():
    assert load_recipe(dump_recipe(NOISE)) == NOISE
    inside = Cross(NOISE, (B,), "evolver", 0.5, 0.5, 1)
    assert load_recipe(dump_recipe(inside)) == inside
    assert [n.label for n in ancestors(NOISE)][:3] == ["a", "b", "base"]
    assert NOISE.describe() == "noise of 3 seeds (rademacher, rank 4, 1.54 of a task vector)"
    assert len({NOISE.id, Noise(A, (A, B), BASE, TERMS).id, Noise(A, (A, B), BASE, TERMS[:2], "rademacher", 4).id}) == 3


@pytest.mark.parametrize(
    ("terms", "distribution", "rank", "said"),
    [
        ((), "normal", 0, "seeds that differ"),
        (((1, 0.5), (1, 0.25)), "normal", 0, "seeds that differ"),
        (((-1, 0.5),), "normal", 0, "64 bits"),
        (((2**64, 0.5),), "normal", 0, "64 bits"),
        (((1, math.nan),), "normal", 0, "cannot hold nan"),
        (((1, 0.5),), "cauchy", 0, "no noise 'cauchy'"),
        (((1, 0.5),), "normal", -1, "of rank -1"),
    ],
)
def test_what_is_no_noise_is_refused(terms, distribution, rank, said):
    with pytest.raises(ValueError, match=said):
        Noise(A, (A, B), BASE, terms, distribution, rank)
