"""Thinning and merging of task vectors against ``peft.utils.merge_utils``, which follows the papers.

What is dropped at random differs by nature: there PEFT's own merge is given our thinned deltas, so that all but the
mask is compared exactly, and the mask is held to what the paper says of it.
"""

import math

import pytest
import torch
from peft.utils import merge_utils

from evolver.merging.engine.apply import apply
from evolver.merging.engine.pieces import InputTensors
from evolver.merging.methods import METHODS

pytestmark = pytest.mark.whole

DENSITY = 0.3
WEIGHTS = (0.5, 0.8, 0.3)
IDS = ("one", "two", "three")
SHAPES = [(257,), (64, 96), (300, 301), (1,)]
CLOSE = 2e-7


def deltas(shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) * scale for scale in (1.0, 0.4, 2.5)]


def ours(name, vectors, weight=WEIGHTS, density=DENSITY, ids=IDS, **settings):
    """Our method on a base of zeros, where a model is its own task vector."""
    base = torch.zeros_like(vectors[0])
    numbers = {"weight": tuple(weight)} | ({} if density is None else {"density": (density,) * len(vectors)})
    method = METHODS[name]
    values = method.complete(numbers | settings, len(vectors), name)
    return apply(method, values, InputTensors("model.layers.0.mlp.up_proj.weight", vectors, base, ids))


def assert_close(found, wanted):
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) <= CLOSE * float(wanted.norm())


def thinned(vectors, seed=0):
    """Our own thinned and rescaled deltas, one model at a time: what an expert loses depends on its id alone."""
    return [
        ours("dare_linear", [v], (1.0,), ids=(i,), rescale="inv_p", seed=seed)
        for v, i in zip(vectors, IDS, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_task_arithmetic(shape):
    vectors = deltas(shape)
    wanted = merge_utils.task_arithmetic(vectors, torch.tensor(WEIGHTS))
    assert_close(ours("task_arithmetic", vectors, density=None, normalize=False), wanted)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_magnitude_prune(shape):
    """Trimming by itself: breadcrumbs that lose none of the largest."""
    vectors = deltas(shape)
    wanted = merge_utils.magnitude_prune(vectors, torch.tensor(WEIGHTS), DENSITY)
    assert_close(ours("breadcrumbs", vectors, gamma=(0.0,) * 3), wanted)


@pytest.mark.parametrize("sign", [("mass", "total"), ("count", "frequency")])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_ties(shape, sign):
    """The paper's: signs are elected on deltas as they are, and the mean of those that agree is taken.

    PEFT divides the weighted sum by the number of those that agree, the paper (with equal weights) too; ours divides
    by the sum of their weights. They are the same at weights of 1.
    """
    vectors = deltas(shape)
    wanted = merge_utils.ties(vectors, torch.ones(3), DENSITY, sign[1])
    settings = {"trim_scope": "tensor", "rescale": "none", "elect": "raw", "normalize": True, "sign": sign[0]}
    assert_close(ours("ties", vectors, (1.0,) * 3, **settings), wanted)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_ties_with_weights(shape):
    """Without the division, weights mean the same to both."""
    vectors = deltas(shape)
    kept = torch.stack([merge_utils.prune(v, DENSITY, "magnitude") for v in vectors])
    agree = merge_utils.calculate_majority_sign_mask(kept)
    weighted = kept * torch.tensor(WEIGHTS).view(3, *[1] * len(shape))
    wanted = merge_utils.disjoint_merge(weighted, agree) * agree.sum(0).clamp(min=1)
    found = ours("ties", vectors, rescale="none", elect="raw", normalize=False)
    assert_close(found, wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_dare_linear(shape):
    vectors = deltas(shape)
    wanted = merge_utils.task_arithmetic(thinned(vectors), torch.tensor(WEIGHTS))
    found = ours("dare_linear", vectors, rescale="inv_p", normalize=False)
    assert float((found - wanted).norm()) <= CLOSE * max(float(wanted.norm()), 1e-30)


@pytest.mark.parametrize("sign", [("mass", "total"), ("count", "frequency")])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_dare_ties(shape, sign):
    vectors = deltas(shape)
    kept = torch.stack(thinned(vectors))
    agree = merge_utils.calculate_majority_sign_mask(kept, sign[1])
    wanted = merge_utils.disjoint_merge(kept, agree)
    settings = {"rescale": "inv_p", "elect": "raw", "normalize": True, "sign": sign[0]}
    assert_close(ours("dare_ties", vectors, (1.0,) * 3, **settings), wanted)


def test_what_is_kept_is_divided_by_its_probability():
    """Every scalar is 0 or the delta over the density, in PEFT and here."""
    vectors = deltas((300, 301))
    for delta, kept in zip(vectors, thinned(vectors), strict=True):
        there = kept != 0
        assert_close(kept[there], delta[there] / DENSITY)
    theirs = merge_utils.prune(vectors[0], DENSITY, "random", rescale=True)
    assert_close(theirs[theirs != 0], vectors[0][theirs != 0] / DENSITY)


@pytest.mark.parametrize("seed", range(5))
def test_the_mask_is_what_the_paper_says(seed):
    """Each scalar is kept by itself with the density as probability, apart from what it is worth.

    Bounds are four standard deviations: a right mask breaks one of them in 16,000 tries, and the seeds are fixed.
    """
    vectors = deltas((300, 301), seed)
    size, spread = vectors[0].numel(), math.sqrt(DENSITY * (1 - DENSITY))
    masks = torch.stack([(t != 0).double().flatten() for t in thinned(vectors, seed)])
    for mask, delta in zip(masks, vectors, strict=True):
        assert abs(float(mask.mean()) - DENSITY) <= 4 * spread / math.sqrt(size)
        sizes = delta.abs().double().flatten()
        assert abs(float(((mask - DENSITY) * (sizes - sizes.mean())).mean())) <= 4 * spread * float(sizes.std()) / math.sqrt(size)  # fmt: skip
        shifted = (mask[1:] - DENSITY) * (mask[:-1] - DENSITY)
        assert abs(float(shifted.mean())) <= 4 * spread**2 / math.sqrt(size)
        rescaled = delta.double().flatten() * mask / DENSITY
        expected, noise = float(delta.double().mean()), spread / DENSITY * float(delta.double().square().mean().sqrt())
        assert abs(float(rescaled.mean()) - expected) <= 4 * noise / math.sqrt(size)
    for i in range(3):
        for k in range(i):
            together = (masks[i] - DENSITY) * (masks[k] - DENSITY)
            assert abs(float(together.mean())) <= 4 * spread**2 / math.sqrt(size)


def test_peft_and_we_keep_equally_many():
    """Two masks of one law: their counts differ by no more than four standard deviations."""
    vectors = deltas((300, 301))
    torch.manual_seed(0)
    counts = [int((merge_utils.prune(v, DENSITY, "random", rescale=True) != 0).sum()) for v in vectors]
    own = [int((t != 0).sum()) for t in thinned(vectors)]
    bound = 4 * math.sqrt(2 * vectors[0].numel() * DENSITY * (1 - DENSITY))
    assert all(abs(a - b) <= bound for a, b in zip(counts, own, strict=True))


def test_a_density_of_one_keeps_all():
    vectors = deltas((64, 96))
    assert_close(ours("dare_linear", vectors, density=1.0, rescale="inv_p"), ours("task_arithmetic", vectors, density=None))  # fmt: skip
    with pytest.warns(UserWarning, match="no pruning"):
        wanted = merge_utils.ties(vectors, torch.ones(3), 1.0)
    assert_close(ours("ties", vectors, (1.0,) * 3, density=1.0, elect="raw"), wanted)
