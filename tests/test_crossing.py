"""The Evolver operators on weights, against references of a few lines and against hand-made numbers."""

import pytest
import torch

from evolver.kernels import native, random
from evolver.kernels.random import draws, threshold
from evolver.merging import crossing
from evolver.merging.crossing import STRATEGIES, cross

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def members(count, shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def reference(strategy, x, p, F, Cr, seed, name):
    """The operators in float64, from their definitions, with the mask of the documented draws."""
    x, p, f = x.double(), [t.double() for t in p], torch.tensor(F).double()
    mutant = {
        "evolver": lambda: (1 - f) * x + f * p[0],
        "rand/1": lambda: p[0] + f * (p[1] - p[2]),
        "best/1": lambda: p[0] + f * (p[1] - p[2]),
        "current-to-best/1": lambda: x + f * (p[0] - x) + f * (p[1] - p[2]),
        "current-to-pbest/1": lambda: x + f * (p[0] - x) + f * (p[1] - p[2]),
        "rand/2": lambda: p[0] + f * (p[1] - p[2]) + f * (p[3] - p[4]),
    }[strategy]()
    mask = (draws(seed, name, 0, x.numel()) < threshold(Cr)).view(x.shape)
    return torch.where(mask, mutant, x), mask


def partners(strategy):
    return STRATEGIES[strategy][1]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cross_is_its_definition(strategy, dtype):
    """float32 rounds each of at most 7 steps on numbers below 50 by 2^-24 of them: 2e-5 in all; then the dtype does."""
    x, *p = members(1 + partners(strategy), (70, 131), dtype)
    child = cross(strategy, x, p, 0.3, 0.5, 11, "w")
    wanted, mask = reference(strategy, x, p, 0.3, 0.5, 11, "w")
    assert child.dtype == dtype
    assert torch.equal(child[~mask], x[~mask])  # exactly the parent
    assert (child[mask] != x[mask]).double().mean() > 0.9  # and the mutant in the other places
    assert torch.allclose(child.double(), wanted, rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3, 5), (8191,), (8193,), (2, 3, 4)])
def test_cross_keeps_shapes(shape):
    x, p = members(2, shape)
    child = cross("evolver", x, [p], 0.5, 0.5, 1, "w")
    wanted, mask = reference("evolver", x, [p], 0.5, 0.5, 1, "w")
    assert child.shape == x.shape
    assert torch.equal(child[~mask], x[~mask])
    assert torch.allclose(child.double(), wanted, atol=1e-6)


def test_cross_of_an_empty_tensor_is_empty():
    assert cross("evolver", torch.zeros(0, 4), [torch.zeros(0, 4)], 0.5, 0.5, 1, "w").shape == (0, 4)


def test_the_size_of_the_pieces_changes_nothing(monkeypatch):
    x, p = members(2, (5 * 8192 + 17,))
    whole = cross("evolver", x, [p], 0.5, 0.5, 1, "w")
    monkeypatch.setattr(crossing, "CROSSING_PIECE", 8192)
    assert torch.equal(cross("evolver", x, [p], 0.5, 0.5, 1, "w"), whole)


def test_cross_over_with_certainty_gives_the_mutant():
    x, p = members(2, (9000,))
    assert torch.equal(cross("evolver", x, [p], 0.25, 1.0, 1, "w"), x + 0.25 * (p - x))


def test_a_tiny_crossover_changes_few_scalars():
    """Cr = 1/65536 on 200,000 scalars: 3 changes expected, 20 are far out of reach; below half a step none at all."""
    x, p = members(2, (200_000,))
    changed = (cross("evolver", x, [p], 0.5, 1 / 65536, 1, "w") != x).sum().item()
    assert changed == (draws(1, "w", 0, 200_000) < 1).sum().item()
    assert changed < 20
    assert torch.equal(cross("evolver", x, [p], 0.5, 1e-6, 1, "w"), x)


def test_every_tensor_and_seed_has_its_own_mask():
    x, p = torch.zeros(1000), torch.ones(1000)
    children = [cross("evolver", x, [p], 1.0, 0.5, s, n) for s, n in ((1, "w"), (1, "v"), (2, "w"))]
    assert not torch.equal(children[0], children[1])
    assert not torch.equal(children[0], children[2])
    assert torch.equal(children[0], cross("evolver", x, [p], 1.0, 0.5, 1, "w"))


def test_cross_leaves_its_inputs_alone():
    x, p = members(2, (100,))
    before = [x.clone(), p.clone()]
    cross("evolver", x, [p], 0.5, 0.5, 1, "w")
    assert torch.equal(x, before[0])
    assert torch.equal(p, before[1])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_loop_in_c_gives_the_bits_of_the_plain_code(strategy, dtype, monkeypatch):
    if native.library() is None:
        pytest.fail("no C compiler: the loop cannot be built here, so nothing would be tested")
    x, *p = members(1 + partners(strategy), (7 * random.BLOCK + 191,), dtype)
    looped = cross(strategy, x, p, 0.3, 0.5, 5, "w")
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.equal(cross(strategy, x, p, 0.3, 0.5, 5, "w"), looped)


def test_blocks_made_in_one_go_are_the_pieces():
    """What a GPU does, on the CPU."""
    x, p = (t.flatten() for t in members(2, (3 * random.BLOCK + 5,)))
    child, words = torch.full_like(x, 9.0), random.key_words(5, "w", x.device)
    numbers = [torch.tensor(float(threshold(0.3))), torch.tensor(0.5)]
    mutation = STRATEGIES["evolver"][0]
    assert crossing._blockwise(mutation, words, numbers, [child, x, p], None, "") == 3 * random.BLOCK
    assert torch.equal(child[:-5], cross("evolver", x, [p], 0.5, 0.3, 5, "w")[:-5])
    assert crossing._blockwise(mutation, words, numbers, [child[:100], x[:100], p[:100]], None, "") == 0
