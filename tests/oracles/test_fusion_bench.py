"""Merge methods against those of FusionBench (``fusion_bench`` 0.2.33), on small random experts.

The library is no dependency of the tests. To run this file, put it and what it imports into a folder of its own, and
name that folder:

    pip install --target FOLDER --no-deps fusion_bench==0.2.33 hydra-core omegaconf antlr4-python3-runtime==4.9.3 \
        lightning lightning-utilities pytorch-lightning torchmetrics bidict
    make prove FUSION_BENCH=FOLDER

Where the two differ, the tests say how one is put into terms of the other:

* Theirs add up task vectors, and average what is no matrix; ours are λ Σ w·τ throughout.
* Theirs keep one scalar more than a share of so many, as the k-th smallest is counted from 1.
* Theirs decompose a matrix to all of its directions, whatever its rank: that is ``rank_aware: false``.
* Their Model Stock averages angles, ours, like the paper's equation and mergekit, cosines.
* Their task arithmetic with TALL masks compares weights with task vectors, so that only the function for vectors, which
  is right, is an oracle. Their Fisher information squares a sum over a batch and over labels: only their average by it
  is compared.
* WUDI is minimised by Adam there, and by a gradient flow here: both have to go down, and ours ends lower.
"""

import importlib
import os
import sys
import types

import pytest
import torch
from torch import nn

from evolver.evaluation.losses import entropy
from evolver.merging.engine.apply import AllTensors, apply
from evolver.merging.engine.pieces import InputTensors
from evolver.merging.methods import METHODS

os.environ.setdefault("HF_HUB_OFFLINE", "1")
library = pytest.importorskip("fusion_bench", reason="fusion_bench is not installed")
pytestmark = pytest.mark.whole

SHAPES = [(24, 18), (18, 24), (12, 12)]
CLOSE = 2e-5


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path))


def theirs(module, name):
    """A function or class of theirs, by module."""
    return getattr(importlib.import_module(f"fusion_bench.method.{module}"), name)


def drawn(shape, count=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) * scale for scale in (1.0, 0.6, 1.7)[:count]]


def ours(name, deltas, base=None, ids="abc", statistics=None, **given):
    """The merged task vector; of each expert in full, where the method has weights and nothing else is said."""
    base = torch.zeros_like(deltas[0]) if base is None else base
    given = ({"weight": 1.0} if "weight" in METHODS[name].settings else {}) | given
    values = METHODS[name].complete(given, len(deltas), name)
    inputs = [base + d for d in deltas]
    return apply(METHODS[name], values, InputTensors("w", inputs, base, ids, None, statistics or {})) - base


def assert_close(found, wanted, share=CLOSE):
    assert found.shape == wanted.shape
    assert float((found.double() - wanted.double()).norm()) <= share * float(wanted.double().norm())


def kept_by_them(share, size):
    """The share of scalars that theirs keep where one asks for ``share``."""
    return (int(share * size) + 1) / size


class Model(nn.Module):
    """A layer whose name theirs look for, and nothing else."""

    def __init__(self, weight):
        super().__init__()
        self.encoder = nn.Linear(*reversed(weight.shape), bias=False)
        self.encoder.weight.data = weight.clone()


def pool(base, deltas):
    """Their pool of models: the base, and one model for each task vector."""
    models = {f"expert {k}": Model(base + d) for k, d in enumerate(deltas)}
    return library.BaseModelPool({"_pretrained_": Model(base), **models})


# --- averages


def test_averages():
    deltas = drawn((7, 9))
    average = theirs("simple_average", "simple_average")([{"w": d} for d in deltas])["w"]
    assert_close(ours("simple", deltas), average)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_task_arithmetic(scale):
    base, deltas = torch.randn(7, 9), drawn((7, 9))
    merge = theirs("task_arithmetic.task_arithmetic", "TaskArithmeticAlgorithm")(scale)
    merged = merge.run(pool(base, deltas)).encoder.weight.detach() - base
    assert_close(ours("task_arithmetic", deltas, base, **{"lambda": scale}), merged)
    assert_close(ours("task_arithmetic", deltas, base, weight=1 / 3, **{"lambda": 3 * scale}), merged)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(shape, t):
    one, other, _ = drawn(shape)
    assert_close(ours("slerp", [one, other], ids="ab", t=t), theirs("slerp.slerp_utils", "slerp")(t, one, other))
    near = one + 1e-4 * other
    assert_close(ours("slerp", [one, near], ids="ab", t=t), theirs("slerp.slerp_utils", "slerp")(t, one, near))


# --- scalar by scalar


@pytest.mark.parametrize("share", [0.2, 0.7])
@pytest.mark.parametrize(("function", "normalize"), [("mean", True), ("sum", False)])
def test_ties(share, function, normalize):
    flat = torch.stack([d.flatten() for d in drawn((30, 20))])
    wanted = theirs("ties_merging.ties_merging_utils", "ties_merging")(flat, share, function)
    given = {"density": kept_by_them(share, 600), "normalize": normalize}
    assert_close(ours("ties", list(flat), **given), wanted)


def test_ties_over_the_whole_model():
    """Theirs lay the tensors of a model one behind the other: ``trim_scope: global``."""
    parts = [drawn((20, 10), seed=1), [5 * d for d in drawn((30,), seed=2)]]
    flat = torch.stack([torch.cat([p[k].flatten() for p in parts]) for k in range(3)])
    wanted = theirs("ties_merging.ties_merging_utils", "ties_merging")(flat, 0.3, "mean")
    given = {"density": kept_by_them(0.3, 230), "weight": 1.0, "trim_scope": "global", "elect": "raw"}
    values = METHODS["ties"].complete(given, 3, "ties")
    tensors = [InputTensors(f"t{k}", p, torch.zeros_like(p[0]), "abc") for k, p in enumerate(parts)]
    model = AllTensors(230, lambda: iter(tensors))
    assert_close(torch.cat([apply(METHODS["ties"], values, t, model).flatten() for t in tensors]), wanted)


def test_dare_keeps_as_much_and_divides_by_the_same():
    (delta,) = drawn((200, 150), count=1)
    dropped = nn.Parameter(delta.clone())
    torch.manual_seed(0)
    theirs("dare.utils", "param_random_drop_")(dropped, 0.7, True)
    found = ours("dare_linear", [delta], ids="a", density=0.3, rescale="inv_p")
    for thinned in (dropped.data, found):
        kept = thinned != 0
        assert abs(float(kept.double().mean()) - 0.3) < 4 * (0.21 / delta.numel()) ** 0.5
        assert_close(thinned[kept], delta[kept] / 0.3)


def test_emr():
    deltas = drawn((9, 8))
    elected, _, _ = theirs("emr_merging.utils", "emr_merge")([{"w": d} for d in deltas])
    assert_close(ours("emr_max", deltas), elected["w"])


@pytest.mark.parametrize("tall", [0.2, 0.6])
@pytest.mark.parametrize("agree", [1, 2, 3])
def test_consensus(tall, agree):
    base, deltas = torch.randn(400), drawn((400,))
    flat = torch.stack(deltas)
    masks = theirs("tall_mask.utils", "generate_task_masks")(flat, base + flat, base, tall_mask_lambda=tall)
    wanted = torch.where(masks.sum(0) >= agree, flat.sum(0), 0.0)
    assert_close(ours("consensus", deltas, tall=tall, agree=agree), wanted)


def test_model_stock():
    base, deltas = torch.randn(12, 10), drawn((12, 10))
    shared = deltas[2]
    two = [shared + d for d in deltas[:2]]
    merge = theirs("model_stock.model_stock", "ModelStock")()
    merged = merge.run(pool(base, two)).encoder.weight.detach()
    assert_close(ours("model_stock", two, base, ids="ab"), merged - base)


def test_model_stock_of_three_whose_angles_are_equal():
    """With other angles, theirs are averaged before the cosine is taken, ours afterwards."""
    axes = torch.linalg.qr(torch.randn(120, 4, generator=torch.Generator().manual_seed(0))).Q.T.view(4, 12, 10)
    base, deltas = torch.randn(12, 10), [axes[3] + a for a in axes[:3]]
    merged = theirs("model_stock.model_stock", "ModelStock")().run(pool(base, deltas)).encoder.weight.detach()
    assert_close(ours("model_stock", deltas, base), merged - base)


# --- by directions


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_m(shape):
    deltas, vectors = drawn(shape), drawn((11,))
    merge = theirs("task_singular_vector.utils.TSVM_utils", "compute_and_sum_svd_mem_reduction")
    found = merge([{"w": d, "b": v} for d, v in zip(deltas, vectors, strict=True)], accelerator="cpu")
    assert_close(ours("tsv_m", deltas, rank_aware=False), found["w"])
    assert_close(ours("tsv_m", vectors, weight=1 / 3), found["b"])


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c(shape):
    deltas, vectors = drawn(shape), drawn((11,))
    merge = theirs("isotropic_merging.iso_utils", "iso_c")
    found = merge([{"w": d, "b": v} for d, v in zip(deltas, vectors, strict=True)], accelerator="cpu")
    assert_close(ours("iso_c", deltas, rank_aware=False), found["w"])
    assert_close(ours("iso_c", vectors, weight=1 / 3), found["b"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("common", [0.5, 0.8])
def test_iso_cts(shape, common):
    """Theirs widen or narrow the common part until the rest can be divided by the number of experts."""
    deltas, every = drawn(shape), min(shape)
    merge = theirs("isotropic_merging.iso_utils", "iso_cts")
    found = merge([{"w": d} for d in deltas], common, accelerator="cpu")["w"]
    rest = round((every - int(every * common)) / 3) * 3
    assert_close(ours("iso_cts", deltas, common=(every - rest) / every, rank_aware=False), found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_opcm(shape, alpha, monkeypatch):
    """Of a model of one tensor, whose norm is the model's."""
    # Their package imports models first that the newest transformers have no longer, and Ray changes the class where it
    # is installed. The file itself needs neither.
    package = types.ModuleType("fusion_bench.method.opcm")
    package.__path__ = [os.path.join(next(iter(library.__path__)), "method", "opcm")]
    monkeypatch.setattr("fusion_bench.utils.packages.is_ray_available", lambda: False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, package.__name__, package)
        found = theirs("opcm.opcm_general", "OPCM")
    base, deltas = torch.randn(shape), drawn(shape)
    merge = found(alpha=alpha, shuffle_order=False, save_on_every_step=False)
    merged = merge.run(pool(base, deltas)).encoder.weight.detach()
    assert_close(ours("opcm", deltas, base, alpha=alpha), merged - base)


@pytest.mark.parametrize("shape", SHAPES)
def test_knots(shape):
    deltas = drawn(shape)
    basis, strengths, rows = theirs("knots.knots_utils", "subspace_alignment")(deltas)
    coordinates = [strengths[:, None] * r for r in rows]
    assert_close(ours("knots", deltas, inner="linear"), basis @ sum(coordinates))
    flat = torch.stack([c.flatten() for c in coordinates])
    elected = theirs("ties_merging.ties_merging_utils", "ties_merging")(flat, 0.2, "mean")
    wanted = basis @ elected.view(coordinates[0].shape)
    assert_close(ours("knots", deltas, density=kept_by_them(0.2, flat.shape[1])), wanted)


# --- solved


def wudi_loss(merged, deltas):
    return sum(float(((merged - d) @ d.T).square().sum() / d.square().sum()) for d in deltas)


@pytest.mark.parametrize("shape", SHAPES)
def test_swudi_solves_the_problem_of_wudi(shape):
    deltas = [0.01 * d for d in drawn(shape)]
    merge = theirs("wudi.wudi", "wudi_merging")
    found = merge([{"w": d} for d in deltas], accelerator="cpu", iter_num=300)["w"].detach()
    start, solved = sum(deltas), ours("swudi", deltas, t=1e4, rho=1.0)
    assert wudi_loss(solved, deltas) < wudi_loss(found, deltas) < wudi_loss(start, deltas)
    step = ours("swudi", deltas, t=0.01, rho=1.0) - start
    assert float(torch.cosine_similarity(step.flatten(), (found - start).flatten(), dim=0)) > 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_doge_ta(shape):
    base, deltas = torch.randn(shape), [0.01 * d for d in drawn(shape)]
    merge = theirs("doge_ta.doge_ta", "DOGE_TA_Algorithm")(subspace=6, K=30, lamda=0.07)
    merged = merge.run(pool(base, deltas)).encoder.weight.detach()
    found = ours("doge_ta", deltas, base, density=kept_by_them(0.3, base.numel()))
    assert_close(found, merged - base, 2e-3)


# --- with statistics


@pytest.mark.parametrize("normalize", [False, True])
def test_fisher(normalize):
    base, deltas, weight = torch.randn(8, 9), drawn((8, 9)), [0.2, 0.5, 0.3]
    information = [torch.rand(8, 9) + 0.1 for _ in deltas]
    merge = theirs("fisher_merging.fisher_merging", "merging_with_fisher_weights")
    models, sharp = {"w": [base + d for d in deltas]}, [{"w": f} for f in information]
    merged = merge(models, sharp, torch.tensor(weight), normalize, minimal_fisher_weight=0.0)["w"]
    given = {"weight": weight, "normalize": normalize, "floor": 0.0}
    assert_close(ours("fisher", deltas, base, statistics={"information": information}, **given), merged - base)


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_regmean(a):
    base, deltas = torch.randn(8, 9), drawn((8, 9))
    inputs = [torch.randn(40, 9, dtype=torch.float64) for _ in deltas]
    grams, models = [x.T @ x for x in inputs], [(base + d).double() for d in deltas]
    merge = theirs("regmean.regmean", "merging_with_regmean_weights")
    merged = merge({"lin.weight": models}, [{"lin": g} for g in grams], a)["lin.weight"]
    layer = theirs("regmean_plusplus.regmean_plusplus", "regmean_params_merge")
    assert_close(layer(models, grams, a), merged)
    found = ours("regmean", deltas, base, statistics={"gram": grams}, a=a, ridge=1e-12)
    assert_close(found, merged - base)


# --- what AdaMerging descends


def test_entropy_of_predictions():
    logits = torch.randn(16, 5)
    wanted = theirs("adamerging.entropy_loss", "entropy_loss")(logits)
    assert_close(entropy(16)("task", types.SimpleNamespace(logits=logits), None), wanted)
