"""Tensor primitives and the Evolver operators, against references of a few lines and against hand-made numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evolver.merging import operators
from evolver.merging.operators import (
    COMPILE_FROM,
    EAGER_SCALARS,
    STRATEGIES,
    cross,
    disjoint_merge,
    drop,
    rescale,
    trim,
    weighted_sum,
)
from evolver.merging.random import draws, threshold

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(operators, "can_compile", lambda device: False)


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
        "rand/2": lambda: p[0] + f * (p[1] - p[2]) + f * (p[3] - p[4]),
    }[strategy]()
    mask = (draws(seed, name, 0, x.numel()) < threshold(Cr)).view(x.shape)
    return torch.where(mask, mutant, x), mask


def partners(strategy):
    return STRATEGIES[strategy][1]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cross_is_its_definition(strategy, dtype, eager):
    """float32 rounds each of at most 7 steps on numbers below 50 by 2^-24 of them: 2e-5 in all; then the dtype does."""
    x, *p = members(1 + partners(strategy), (70, 131), dtype)
    child = cross(strategy, x, p, 0.3, 0.5, 11, "w")
    wanted, mask = reference(strategy, x, p, 0.3, 0.5, 11, "w")
    assert child.dtype == dtype
    assert torch.equal(child[~mask], x[~mask])  # exactly the parent
    assert (child[mask] != x[mask]).double().mean() > 0.9  # and the mutant in the other places
    assert torch.allclose(child.double(), wanted, rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3, 5), (8191,), (8193,), (2, 3, 4)])
def test_cross_keeps_shapes(shape, eager):
    x, p = members(2, shape)
    child = cross("evolver", x, [p], 0.5, 0.5, 1, "w")
    wanted, mask = reference("evolver", x, [p], 0.5, 0.5, 1, "w")
    assert child.shape == x.shape
    assert torch.equal(child[~mask], x[~mask])
    assert torch.allclose(child.double(), wanted, atol=1e-6)


def test_cross_of_an_empty_tensor_is_empty(eager):
    assert cross("evolver", torch.zeros(0, 4), [torch.zeros(0, 4)], 0.5, 0.5, 1, "w").shape == (0, 4)


def test_the_size_of_the_eager_pieces_changes_nothing(eager, monkeypatch):
    x, p = members(2, (5 * 8192 + 17,))
    whole = cross("evolver", x, [p], 0.5, 0.5, 1, "w")
    monkeypatch.setattr(operators, "EAGER_SCALARS", 8192)
    assert torch.equal(cross("evolver", x, [p], 0.5, 0.5, 1, "w"), whole)
    assert EAGER_SCALARS > 5 * 8192 + 17


def test_cross_over_with_certainty_gives_the_mutant(eager):
    x, p = members(2, (9000,))
    assert torch.equal(cross("evolver", x, [p], 0.25, 1.0, 1, "w"), x + 0.25 * (p - x))


def test_a_tiny_crossover_changes_few_scalars(eager):
    """Cr = 1/65536 on 200,000 scalars: 3 changes expected, 20 are far out of reach; below half a step none at all."""
    x, p = members(2, (200_000,))
    changed = (cross("evolver", x, [p], 0.5, 1 / 65536, 1, "w") != x).sum().item()
    assert changed == (draws(1, "w", 0, 200_000) < 1).sum().item()
    assert changed < 20
    assert torch.equal(cross("evolver", x, [p], 0.5, 1e-6, 1, "w"), x)


def test_every_tensor_and_seed_has_its_own_mask(eager):
    x, p = torch.zeros(1000), torch.ones(1000)
    children = [cross("evolver", x, [p], 1.0, 0.5, s, n) for s, n in ((1, "w"), (1, "v"), (2, "w"))]
    assert not torch.equal(children[0], children[1])
    assert not torch.equal(children[0], children[2])
    assert torch.equal(children[0], cross("evolver", x, [p], 1.0, 0.5, 1, "w"))


def test_cross_leaves_its_inputs_alone(eager):
    x, p = members(2, (100,))
    before = [x.clone(), p.clone()]
    cross("evolver", x, [p], 0.5, 0.5, 1, "w")
    assert torch.equal(x, before[0])
    assert torch.equal(p, before[1])


# The strategies that differ in kind: the released one, and the longest one.
@pytest.mark.parametrize(("strategy", "dtype"), [("evolver", torch.bfloat16), ("rand/2", torch.float32)])
def test_the_compiled_kernel_gives_the_bits_of_the_plain_one(strategy, dtype, monkeypatch):
    if not operators.can_compile(torch.device("cpu")):
        pytest.fail("no C++ compiler: the fused kernel cannot be built here, so nothing would be tested")
    torch.compiler.reset()  # a process compiles a function eight times at most; what went before shall not count
    x, *p = members(1 + partners(strategy), (COMPILE_FROM + 8191,), dtype)
    compiled = cross(strategy, x, p, 0.3, 0.5, 5, "w")
    monkeypatch.setattr(operators, "can_compile", lambda device: False)
    assert torch.equal(cross(strategy, x, p, 0.3, 0.5, 5, "w"), compiled)


def test_trim_keeps_the_largest():
    """int(0.5 · 4) = 2 of [1, -3, 2, 0.5]: -3 and 2; of [4, 4, 4, 1] three, since the second largest has equals."""
    deltas = torch.tensor([[1.0, -3.0, 2.0, 0.5], [4.0, 4.0, -4.0, 1.0]])
    assert trim(deltas, 0.5).tolist() == [[0.0, -3.0, 2.0, 0.0], [4.0, 4.0, -4.0, 0.0]]
    assert torch.equal(trim(deltas, 1.0), deltas)
    assert trim(deltas, 0.01).tolist() == [[0.0, -3.0, 0.0, 0.0], [4.0, 4.0, -4.0, 0.0]]  # one stays


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=30), st.floats(0.01, 1.0))
@settings(deadline=None)
def test_trim_properties(row, density):
    deltas = torch.tensor([row], dtype=torch.float32)
    kept = trim(deltas, density)
    stays = kept != 0
    assert torch.equal(kept[stays], deltas[stays])
    dropped = deltas[~stays].abs()
    if stays.any() and len(dropped):
        assert dropped.max() < deltas[stays].abs().min()
    nonzero = int((deltas != 0).sum())
    assert stays.sum() >= min(nonzero, max(1, int(density * len(row))))


def test_drop_keeps_by_its_draws():
    deltas = torch.ones(2, 5000)
    kept = drop(deltas, 0.25, 9, "w")
    for e in range(2):
        assert torch.equal(kept[e].bool(), draws(9, f"w#{e}", 0, 5000) < 16384)
    assert not torch.equal(kept[0], kept[1])
    assert drop(deltas, 1.0, 9, "w") is deltas


def test_rescale_by_hand():
    """Full [2, -2, 4, 0] has L1 norm 8, kept [2, 0, 0, 0] has 2: factor 4; at density 0.25 the paper's is 4 as well."""
    full = torch.tensor([[2.0, -2.0, 4.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    kept = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert rescale(kept, full, "l1", 0.5).tolist() == [[8.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert rescale(kept, full, "inv_p", 0.5).tolist() == [[4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert torch.equal(rescale(kept, full, "none", 0.5), kept)
    assert torch.equal(rescale(kept, full, "l1", 1.0), kept)


def test_disjoint_merge_by_hand():
    """Weights 1 and 3 on deltas [1, -1, 2, 0] and [1, 1, -1, 0].

    Weighted: [1, -1, 2, 0] and [3, 3, -3, 0]; sums 4, 2, -1, 0, so the signs elected are +, +, -, + (zero is positive).
    Agreeing: 1 + 3 = 4; 3; -3; none. Divided by the weights that agree, 4, 3, 3, (1): 1, 1, -1, 0.
    """
    deltas = torch.tensor([[1.0, -1.0, 2.0, 0.0], [1.0, 1.0, -1.0, 0.0]])
    assert disjoint_merge(deltas, [1.0, 3.0], False).tolist() == [4.0, 3.0, -3.0, 0.0]
    assert disjoint_merge(deltas, [1.0, 3.0], True).tolist() == [1.0, 1.0, -1.0, 0.0]


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=9))
@settings(deadline=None)
def test_disjoint_merge_stays_among_the_deltas_that_agree(columns):
    deltas = torch.tensor(columns, dtype=torch.float32).T
    merged = disjoint_merge(deltas, [1.0, 1.0, 1.0], True)
    for got, column in zip(merged.tolist(), columns, strict=True):
        same = [c for c in column if (c > 0 if sum(column) >= 0 else c < 0)]
        assert got == pytest.approx(sum(same) / len(same) if same else 0.0, abs=1e-5)


def test_weighted_sum_by_hand():
    """1·[1, 2] + 3·[3, 4] = [10, 14], over 4: [2.5, 3.5]. Weights that cancel count as a sum of 1."""
    stack = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert weighted_sum(stack, [1.0, 3.0], False).tolist() == [10.0, 14.0]
    assert weighted_sum(stack, [1.0, 3.0], True).tolist() == [2.5, 3.5]
    assert weighted_sum(stack, [1.0, -1.0], True).tolist() == [-2.0, -2.0]


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4), st.lists(st.integers(-9, 9), min_size=1, max_size=5)
)  # fmt: skip
@settings(deadline=None)
def test_a_normalised_sum_of_equals_is_the_equal(weights, row):
    stack = torch.tensor([row] * len(weights), dtype=torch.float32)
    assert torch.allclose(weighted_sum(stack, [float(w) for w in weights], True), stack[0], atol=1e-5)
