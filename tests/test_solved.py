"""Methods that solve a quadratic problem or share a basis: against float64 formulas written from the papers."""

import math

import pytest
import torch

from evolver.merging.engine.apply import AllTensors, apply
from evolver.merging.engine.pieces import InputTensors
from evolver.merging.methods import METHODS
from evolver.merging.methods.bases import basis
from evolver.merging.methods.decoupled import pushed_apart
from evolver.merging.methods.lowrank import low_rank, root_of
from evolver.merging.methods.quadratic import Term, directions, flow, gram_merge, ridge

QUADRATIC = ["swudi", "optmerge", "ace"]
SOLVED = [*QUADRATIC, "drm", "knots", "core_space", "doge_ta", "do_merging"]
SHAPES = [(9, 7), (7, 9), (5, 40), (40, 5)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path))


def drawn(shape, count=3, rank=None, seed=0, size=0.01):
    """Task vectors, of low rank where one is given."""
    draw = torch.Generator().manual_seed(seed)
    if rank is None:
        return [size * torch.randn(shape, generator=draw) for _ in range(count)]
    sides = ((shape[0], rank), (rank, shape[1]))
    return [size * torch.randn(sides[0], generator=draw) @ torch.randn(sides[1], generator=draw) for _ in range(count)]


def merged(name, deltas, weight=None, **given):
    """The merged task vector in float64, equal weights unless others are given."""
    weight = [1.0] * len(deltas) if weight is None else weight
    values = METHODS[name].complete({"weight": weight, **given}, len(deltas), "here")
    before = [d.clone() for d in deltas]
    ids = [str(n) for n in range(len(deltas))]
    out = apply(METHODS[name], values, InputTensors("w", deltas, torch.zeros_like(deltas[0]), ids))
    assert out.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(before, deltas, strict=True))
    return out.double()


def close(one, other, rtol=1e-4):
    """Whether two matrices are the same but for a small part of their size."""
    return float((one - other).norm()) <= rtol * float(other.norm()) + 1e-12


def wide(deltas):
    return [d.double() for d in deltas]


def inner(tau):
    """WUDI's Gram matrix of a task vector, divided by its squared norm."""
    return tau.T @ tau / tau.square().sum()


def by_spectral_filter(start, targets, grams, t, count):
    """SWUDI as its paper writes it: θ = start (1 - V f Vᵀ) + D V (f/λ) Vᵀ with the largest ``count`` eigenvalues."""
    values, vectors = torch.linalg.eigh(sum(grams))
    f = -torch.expm1(-values * t)
    f[: len(values) - count] = 0
    ratio = torch.where(values * t > 1e-9, f / values, torch.where(f > 0, float(t), 0.0))
    pulled = sum(target @ gram for target, gram in zip(targets, grams, strict=True))
    return start - start @ (vectors * f) @ vectors.T + pulled @ (vectors * ratio) @ vectors.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("init", ["sum", "mean", "zero"])
def test_swudi_is_the_formula(shape, rank, init):
    deltas = drawn(shape, rank=rank)
    taus, width = wide(deltas), shape[1]
    starts = {"sum": sum(taus), "mean": sum(taus) / 3, "zero": torch.zeros(shape, dtype=torch.float64)}
    for t, rho in ((3.0, 1.0), (30.0, 0.4)):
        wanted = by_spectral_filter(starts[init], taus, [inner(x) for x in taus], t, math.ceil(rho * width))
        assert close(merged("swudi", deltas, t=t, rho=rho, init=init), wanted), (t, rho)


def test_swudi_is_what_many_small_steps_of_gradient_descent_find():
    """WUDI's loss is Σ ‖(θ - τ)τᵀ‖²/‖τ‖²; half of its gradient is followed for the time 3 in steps of 1/2000."""
    deltas = drawn((8, 6))
    taus = wide(deltas)
    theta, step = sum(taus), 1 / 2000
    for _ in range(int(3 / step)):
        theta = theta - step * sum((theta - x) @ inner(x) for x in taus)
    assert close(merged("swudi", deltas, t=3.0, rho=1.0), theta, 1e-3)


def test_swudi_goes_from_its_start_to_the_exact_solution():
    deltas = drawn((30, 7))
    taus = wide(deltas)
    assert torch.equal(merged("swudi", deltas, t=0.0), (deltas[0] + deltas[1] + deltas[2]).double())
    solution = sum(x @ inner(x) for x in taus) @ torch.linalg.inv(sum(inner(x) for x in taus))
    for init in ("sum", "mean", "zero"):
        assert close(merged("swudi", deltas, t=1e6, rho=1.0, init=init), solution), init


def test_nothing_is_nearer_than_the_solution():
    deltas = drawn((12, 7))
    taus = wide(deltas)

    def loss(theta):
        return sum(((theta - x) @ x.T).square().sum() / x.square().sum() for x in taus)

    best = merged("swudi", deltas, t=1e6, rho=1.0)
    for step in wide(drawn((12, 7), 20, seed=5, size=1e-4)):
        assert loss(best + step) > loss(best)


def test_experts_on_inputs_of_their_own_are_added():
    """Rows in orthogonal spaces do not disturb each other: the solution is the sum, and each expert is kept."""
    deltas = [torch.zeros(9, 12) for _ in range(3)]
    for n, part in enumerate(drawn((9, 4))):
        deltas[n][:, 4 * n : 4 * n + 4] = part
    for init in ("sum", "mean", "zero"):
        assert close(merged("swudi", deltas, t=1e6, rho=1.0, init=init), sum(wide(deltas))), init


@pytest.mark.parametrize("init", ["mean", "zero"])
def test_one_expert_is_itself_on_its_row_space(init):
    (delta,) = drawn((5, 20), 1)
    assert close(merged("swudi", [delta], t=1e6, rho=1.0, init=init), delta.double())


def test_weights_say_how_much_an_expert_counts_in_the_problem():
    deltas = drawn((9, 7))
    taus, shares = wide(deltas), [0.6, 0.9, 1.5]
    grams = [share * inner(x) for x, share in zip(taus, shares, strict=True)]
    start = sum(share * x for x, share in zip(taus, shares, strict=True))
    wanted = by_spectral_filter(start, taus, grams, 5.0, 7)
    simplex = {"weight": [0.2, 0.3, 0.5], "t": 5.0, "rho": 1.0}
    assert close(merged("swudi", deltas, **simplex, **{"lambda": 3.0}), wanted)
    assert close(merged("swudi", deltas, **simplex), wanted / 3)


def test_a_negative_weight_merges_the_negated_task_vector():
    one, other = drawn((9, 7), 2)
    given = {"t": 5.0, "rho": 1.0}
    assert close(
        merged("swudi", [one, other], weight=[1, -1], **given), merged("swudi", [one, -other], weight=[1, 1], **given)
    )


def sigmas(values):
    return torch.tensor(values, dtype=torch.float64).sort().values.square()


RANKS = [
    ("share", [4, 3, 2, 1], 0.3, 2),  # ⌈0.3·4⌉
    ("variance", [4, 3, 2, 1], 0.8, 2),  # 16 + 9 of 30 are 0.83
    ("participation", [1, 1, 1, 0], 0.5, 3),
    ("participation", [4, 3, 2, 1], 0.5, 4),  # 100/30 = 3.3
    ("stable", [2, 1, 1, 0], 0.5, 2),  # 6/4
    ("entropy", [1, 1, 0, 0], 0.5, 2),
    # ω(1) = 2.858 times the median 1 of 9, 1, 1, 1: one is above
    ("gavish_donoho", [9, 1, 1, 1], 0.5, 1),
]


@pytest.mark.parametrize(("rank", "values", "rho", "count"), RANKS)
def test_how_many_directions_are_used(rank, values, rho, count):
    assert directions(rank, rho, 4)(sigmas(values), 4) == count


def test_a_spectrum_of_zeros_has_no_directions():
    for rank, *_ in RANKS[1:]:
        assert directions(rank, 0.5, 4)(torch.zeros(4, dtype=torch.float64), 4) == 0


def test_both_ways_to_solve_agree():
    """The stacked roots have 12 rows: the small product serves 40 columns, the Gram matrix 6."""
    for shape in ((4, 40), (4, 6)):
        targets, roots = drawn(shape, 3), drawn(shape, 3, seed=1)
        start = torch.zeros(shape)
        terms = [Term(a, b, w) for a, b, w in zip(targets, roots, (0.5, 1.0, 2.0), strict=True)]
        for shrink in (flow(1e5, directions("share", 1.0, 12)), ridge(0.01)):
            small, full = gram_merge(terms, 0, start, shrink), gram_merge(terms, 10**6, start, shrink)
            assert close(small, full)


def test_a_ridge_is_a_pull_towards_the_start():
    targets, start = drawn((6, 5)), drawn((6, 5), 1, seed=9)[0]
    terms = [Term(t, t, 1.0) for t in targets]
    gram = sum(t.double().T @ t.double() for t in targets)
    mu = 0.3 * gram.trace() / 5
    right = sum(t.double() @ t.double().T @ t.double() for t in targets) + mu * start.double()
    wanted = right @ torch.linalg.inv(gram + mu * torch.eye(5))
    assert close(gram_merge(terms, 18, start, ridge(0.3)).double(), wanted)


def best_of_rank(matrix, count):
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :count] * s[:count]) @ vt[:count], s[:count, None] * vt[:count]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centre", [True, False])
def test_optmerge_is_the_formula(shape, centre):
    deltas = drawn(shape, 2)
    taus = wide(deltas)
    mean = sum(taus) / 2 if centre else torch.zeros(shape, dtype=torch.float64)
    count = min(shape) // 2
    cut = [best_of_rank(x - mean, count) for x in taus]
    grams = [root.T @ root / x.square().sum() for (_, root), x in zip(cut, taus, strict=True)]
    targets = [mean + part for part, _ in cut]
    for init, start in (("sum", sum(taus)), ("mean", sum(taus) / 2)):
        wanted = by_spectral_filter(start, targets, grams, 20.0, shape[1])
        assert close(merged("optmerge", deltas, t=20.0, centre=centre, init=init), wanted), init


def test_optmerge_of_lora_experts_is_wudi_from_the_mean():
    """Rank 2 is below ⌊20/3⌋: nothing is cut off."""
    deltas = drawn((20, 30), rank=2)
    one = merged("optmerge", deltas, t=50.0, centre=False, init="mean")
    assert close(one, merged("swudi", deltas, t=50.0, rho=1.0, init="mean"), 1e-3)


@pytest.mark.parametrize("traces", ["equal", "own"])
@pytest.mark.parametrize("shape", SHAPES)
def test_ace_is_the_formula(shape, traces):
    deltas = [d * s for d, s in zip(drawn(shape), (1, 3, 0.2), strict=True)]
    taus = wide(deltas)
    grams = [(x - x.mean(0)).T @ (x - x.mean(0)) for x in taus]
    grams = [g / g.trace() for g in grams] if traces == "equal" else grams
    mu = 0.05 * sum(grams).trace() / shape[1] / 3 * torch.eye(shape[1], dtype=torch.float64)
    wanted = sum(x @ (g + mu) for x, g in zip(taus, grams, strict=True)) @ torch.linalg.inv(sum(grams) + 3 * mu)
    assert close(merged("ace", deltas, ridge=0.05, traces=traces), wanted)


def test_ace_makes_traces_equal_where_they_differ_much():
    """log tr of 1 and e⁴: variance 8, mean 2, and 8/4 is above 0.3; of e² and e²·1.1 it is not."""
    one, other = (d / d.norm() for d in drawn((9, 7), 2))
    for sizes, like in (((1.0, math.exp(2)), "equal"), ((math.exp(1), 1.05 * math.exp(1)), "own")):
        pair = [one * sizes[0], other * sizes[1]]
        assert torch.equal(merged("ace", pair), merged("ace", pair, traces=like))
        assert not close(merged("ace", pair), merged("ace", pair, traces="own" if like == "equal" else "equal"), 1e-3)


@pytest.mark.parametrize("shape", [(64, 100), (100, 64), (300, 40)])
def test_a_matrix_of_low_rank_is_two_thin_ones(shape):
    (matrix,) = drawn(shape, 1, rank=3)
    found = low_rank(matrix)
    assert found.columns.shape == (shape[0], 3)
    assert torch.allclose(found.columns @ found.rows, matrix, atol=1e-7)
    assert torch.allclose(found.columns.T @ found.columns, torch.eye(3), atol=1e-5)
    assert len(root_of(matrix)) == 3


def test_what_is_not_of_low_rank_is_left_as_it_is():
    (full,) = drawn((64, 100), 1)
    hidden = torch.zeros(64, 100)
    hidden[1:40:2, 1:40:2] = drawn((20, 20), 1)[0]  # no rank shows in a part of every second row
    for matrix in (full, hidden, torch.zeros(64, 100), full[:4, :4]):
        assert low_rank(matrix) is None
        assert root_of(matrix) is matrix


@pytest.mark.parametrize("name", SOLVED)
def test_an_expert_that_moved_nowhere_is_one_of_them_all_the_same(name):
    """It has no Gram matrix and disturbs nobody, but it counts among the N experts."""
    deltas = [*drawn((9, 7), 2), torch.zeros(9, 7)]
    assert merged(name, deltas).isfinite().all()
    assert not merged(name, [torch.zeros(9, 7)] * 3).any()


@pytest.mark.parametrize("name", QUADRATIC)
def test_vectors_are_averaged(name):
    deltas = drawn((11,))
    mean = sum(deltas).double() / 3
    assert close(merged(name, deltas), mean, 1e-6)
    assert close(merged(name, deltas, weight=[1 / 3] * 3, **{"lambda": 3.0}), mean, 1e-6)


@pytest.mark.parametrize("name", SOLVED)
def test_what_is_not_finite_is_an_error(name):
    deltas = drawn((9, 7))
    deltas[1][2, 3] = math.inf
    with pytest.raises(FloatingPointError):
        merged(name, deltas)


def stacked_svd(taus, vertical=False):
    """Shared directions of the task vectors, and each expert's block: U, S, [V] or S, V, [U]."""
    if vertical:
        v, s, blocks = stacked_svd([x.T for x in taus])
        return v, s, blocks
    u, s, vt = torch.linalg.svd(torch.cat(taus, dim=1), full_matrices=False)
    return u, s, list(vt.split(taus[0].shape[1], dim=1))


def disjoint_mean(parts):
    """Of the scalars that have the sign of their sum, the mean."""
    stack = torch.stack(parts)
    sign = torch.where(stack.sum(0) < 0, -1.0, 1.0)
    agree = stack.sign() == sign
    return (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


def largest_of(stack, share):
    sizes = stack.abs().reshape(-1).sort(descending=True).values
    return torch.where(stack.abs() >= sizes[max(1, round(share * len(sizes))) - 1], stack, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
@pytest.mark.parametrize("renorm", [True, False])
def test_drm_is_the_formula(shape, direction, renorm):
    deltas = drawn(shape)
    u, s, blocks = stacked_svd(wide(deltas), direction == "vertical")
    keep = s > 0.01 * s[0]
    u, s, blocks = u[:, keep], s[keep], [b[keep] for b in blocks]
    lengths = [b.norm(dim=1) if renorm else torch.ones_like(s) for b in blocks]
    kept = largest_of(torch.stack([b / r[:, None] for b, r in zip(blocks, lengths, strict=True)]), 0.3)
    wanted = u @ disjoint_mean([(s * r)[:, None] * v for v, r in zip(kept, lengths, strict=True)])
    wanted = wanted.T if direction == "vertical" else wanted
    assert close(merged("drm", deltas, drop=0.7, direction=direction, renorm=renorm), wanted)


def test_drm_without_dropping_is_the_mean():
    deltas = drawn((9, 7))
    assert close(merged("drm", deltas, drop=0.0), sum(wide(deltas)) / 3, 1e-6)
    weighted = sum(w * x for w, x in zip((0.2, 0.3, 0.5), wide(deltas), strict=True))
    assert close(merged("drm", deltas, weight=[0.2, 0.3, 0.5], drop=0.0, **{"lambda": 2.0}), 2 * weighted, 1e-6)


@pytest.mark.parametrize("shape", [*SHAPES, (64, 100)])
@pytest.mark.parametrize("rank", [None, 2])
def test_sums_survive_a_shared_basis(shape, rank):
    deltas = drawn(shape, rank=rank)
    for name, given in (("knots", {"inner": "linear"}), ("core_space", {"inner": "task_arithmetic"})):
        assert torch.allclose(merged(name, deltas, **given), sum(wide(deltas)), atol=1e-6), name
        assert close(merged(name, deltas, **given), sum(wide(deltas)), 1e-5), name


@pytest.mark.parametrize("shape", SHAPES)
def test_knots_with_ties_is_the_formula(shape):
    deltas = drawn(shape)
    u, s, blocks = stacked_svd(wide(deltas))
    parts = [largest_of(s[:, None] * b, 0.4) for b in blocks]
    assert close(merged("knots", deltas, density=0.4), u @ disjoint_mean(parts))


def test_knots_with_dare_adds_on_average():
    deltas = drawn((9, 7))
    mean = sum(merged("knots", deltas, inner="dare", density=0.5, seed=s) for s in range(400)) / 400
    assert close(mean, sum(wide(deltas)), 0.15)
    assert not close(merged("knots", deltas, inner="dare", density=0.5), sum(wide(deltas)), 0.3)
    assert torch.equal(merged("knots", deltas, inner="dare", seed=3), merged("knots", deltas, inner="dare", seed=3))


@pytest.mark.parametrize("inner", ["ties", "tsv", "iso"])
def test_core_space_is_the_method_on_small_matrices(inner):
    """Experts of rank 2: the small matrices are (6, 6), and nothing leaves the ranges of the experts."""
    deltas = drawn((40, 30), rank=2)
    taus = wide(deltas)
    u, s, _ = stacked_svd(taus)
    v, _, _ = stacked_svd(taus, vertical=True)
    assert int((s > 1e-6 * s[0]).sum()) == 6
    u, v = u[:, :6], v[:, :6]
    small = [u.T @ x @ v for x in taus]
    if inner == "ties":
        wanted = disjoint_mean([largest_of(m, 0.4) for m in small])
    elif inner == "iso":
        left, sigma, right = torch.linalg.svd(sum(small))
        count = 1 + int((sigma.square().cumsum(0) < 0.999 * sigma.square().sum()).sum())
        sigma[:count] = sigma[:count].mean()
        wanted = (left * sigma) @ right
    else:
        found = [torch.linalg.svd(m) for m in small]
        left, right = (torch.cat(x, dim=1) for x in ([f[0][:, :2] for f in found], [f[2][:2].T for f in found]))
        strength = torch.cat([f[1][:2] for f in found])
        (a, _, b), (c, _, d) = (torch.linalg.svd(x, full_matrices=False) for x in (left, right))
        wanted = (a @ b * strength) @ (c @ d).T
    got = merged("core_space", deltas, inner=inner, density=0.4)
    assert close(got, u @ wanted @ v.T, 1e-3)
    assert close(u @ u.T @ got @ v @ v.T, got, 1e-5)


def test_a_shared_basis_leaves_out_rounding_only():
    for shape in ((30, 4), (4, 30)):
        found = basis(drawn(shape, 2))
        assert found.shape == (shape[0], min(shape[0], 2 * shape[1]))
        assert torch.allclose(found.T @ found, torch.eye(found.shape[1]), atol=1e-4)
    assert basis(drawn((40, 30), 3, rank=2)).shape == (40, 6)
    assert basis([torch.zeros(9, 7)] * 2).shape == (9, 0)


def doge_reference(taus, eta, share, density, rate, steps):
    """DOGE step by step, with the gradient from autograd and Adam as its paper writes it."""
    scale = [eta / x.norm() for x in taus]
    rank = min(taus[0].shape)
    left = torch.cat([torch.linalg.svd(x)[0][:, : rank // len(taus)] for x in taus], dim=1)
    shared = torch.linalg.svd(left)[0][:, : int(share * rank)]
    delta, first, second = torch.zeros_like(taus[0]), 0.0, 0.0
    for step in range(1, steps + 1):
        free = delta.clone().requires_grad_()
        merge = sum(s * (x + free) for s, x in zip(scale, taus, strict=True))
        loss = sum((x * (x - merge)).sum(1).square().sum() for x in taus)
        (gradient,) = torch.autograd.grad(loss, free)
        gradient = gradient - shared @ shared.T @ gradient
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
        delta = delta - rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    parts = (s * (x + delta) * (largest_of(x, density) != 0) for s, x in zip(scale, taus, strict=True))
    return sum(parts), delta


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_doge_is_the_formula(shape):
    deltas = drawn(shape, size=1.0)
    given = {"eta": 0.5, "shared": 0.25, "density": 0.4, "rate": 1e-3, "steps": 30}
    wanted, delta = doge_reference(wide(deltas), 0.5, 0.25, 0.4, 1e-3, 30)
    assert close(merged("doge_ta", deltas, **given), wanted)
    assert float(delta.norm()) > 0.1


def test_doge_without_steps_moves_every_matrix_by_one_length():
    deltas = [d * s for d, s in zip(drawn((9, 7)), (1, 10, 100), strict=True)]
    units = sum(x / x.norm() for x in wide(deltas))
    assert close(merged("doge_ta", deltas, steps=0, density=1.0, eta=0.2), 0.2 * units)
    some = merged("doge_ta", deltas[:1], steps=0, density=0.3)
    assert int((some != 0).sum()) == round(0.3 * 63)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_doge_keeps_what_is_largest_in_the_whole_model_or_in_each_tensor(scope):
    """A matrix of small task vectors and one of large ones, with so many scalars that they are not ordered at once."""
    small, large = drawn((200, 300), 2), [10 * d for d in drawn((220, 300), 2, seed=1)]
    base = [torch.zeros_like(stack[0]) for stack in (small, large)]
    tensors = [
        InputTensors(f"w{k}", stack, b, "01") for k, (stack, b) in enumerate(zip((small, large), base, strict=True))
    ]
    size = sum(b.numel() for b in base)
    given = {"weight": 1.0, "steps": 0, "density": 0.3, "scope": scope}
    values, model = METHODS["doge_ta"].complete(given, 2, "here"), AllTensors(size, lambda: iter(tensors))
    for stack, of in zip((small, large), tensors, strict=True):
        found = apply(METHODS["doge_ta"], values, of, model)
        wanted = torch.zeros_like(found)
        for k, delta in enumerate(stack):
            compared = torch.cat([small[k].flatten(), large[k].flatten()]) if scope == "global" else delta.flatten()
            cut = compared.abs().sort(descending=True).values[round(0.3 * len(compared)) - 1]
            wanted += 0.07 / delta.norm() * torch.where(delta.abs() >= cut, delta, 0.0)
        assert torch.allclose(found, wanted, atol=1e-6 * float(wanted.abs().max()))


def test_doge_spares_the_directions_that_are_shared():
    """What is added to the sum lies outside of the strongest common left singular vectors."""
    deltas = drawn((12, 8), size=1.0)
    moved, still = (merged("doge_ta", deltas, density=1.0, shared=0.25, steps=n) for n in (20, 0))
    count = min(12, 8) // 3
    left = torch.cat([torch.linalg.svd(x)[0][:, :count] for x in wide(deltas)], dim=1)
    strongest = torch.linalg.svd(left)[0][:, :2]
    # Adam divides scalar by scalar, and so turns a little of its way into the space; a free step has more there.
    free = merged("doge_ta", deltas, density=1.0, shared=0.0, steps=20)
    assert (strongest.T @ (moved - still)).norm() < (strongest.T @ (free - still)).norm()


def test_do_merging_splits_lengths_and_directions():
    """Columns (3, 4), (0, 2) and (5, 0), (0, 0): lengths 5, 2 and 5, 0, averaged 5 and 1."""
    deltas = [torch.tensor([[3.0, 0.0], [4.0, 2.0]]), torch.tensor([[5.0, 0.0], [0.0, 0.0]])]
    given = {"weight": [0.5, 0.5], "steps": 0}
    wanted = torch.tensor([[4.0, 0.0], [2.0, 0.5]], dtype=torch.float64)
    assert close(merged("do_merging", deltas, **given), wanted)
    unit = torch.tensor([[0.8, 0.0], [0.4, 1.0]], dtype=torch.float64)
    unit = unit / unit.norm(dim=0) * torch.tensor([5.0, 1.0])
    assert close(merged("do_merging", deltas, renorm=1.0, **given), unit)


def overlap(sides):
    return sum((a.T @ b).square().sum() for i, a in enumerate(sides) for j, b in enumerate(sides) if i != j)


def test_factors_are_pushed_apart_as_the_loss_says():
    """Against gradient descent by autograd on Σ ‖A Aᵀ‖² + γ Σ ‖change‖², from the same start with the same step."""
    sides = drawn((12, 3), size=1.0)
    scale = (sum(x.double().square().sum() for x in sides) / 3).sqrt()
    start = [x.double() / scale for x in sides]
    all_of = torch.cat(start, dim=1)
    step = 1 / (12 * torch.linalg.matrix_norm(all_of.T @ all_of, 2) + 2 * 0.1)
    moved = start
    for _ in range(20):
        free = [x.clone().requires_grad_() for x in moved]
        loss = overlap(free) + 0.1 * sum((x - y).square().sum() for x, y in zip(free, start, strict=True))
        moved = [x - step * g for x, g in zip(moved, torch.autograd.grad(loss, free), strict=True)]
    for got, wanted in zip(pushed_apart(sides, 0.1, 20), moved, strict=True):
        assert close(got.double(), scale * wanted)
    assert overlap(moved) < 0.7 * overlap(start)


def test_do_merging_makes_experts_overlap_less_and_keeps_one():
    deltas = drawn((20, 30), rank=2)
    ways = [merged("do_merging", deltas, steps=n, gamma=0.01) for n in (0, 200)]
    assert not close(*ways, 1e-2)
    still = merged("do_merging", deltas, steps=200, gamma=1e6)
    assert close(still, ways[0], 1e-3)
    assert close(merged("do_merging", deltas[:1]), deltas[0].double(), 1e-6)


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("shape", [(9, 7), (64, 100)])
def test_degenerate_experts_merge(name, shape):
    """Equal experts, opposite ones, one with a single row, one of rank 1, in every choice of a method."""
    one, other = drawn(shape, 2)
    row = torch.zeros(shape)
    row[2] = 0.01
    thin_one = drawn(shape, 1, rank=1)[0]
    for settings in METHODS[name].settings.values():
        for option in settings.options or [None]:
            more = {} if option is None else {settings.name: option}
            for stack in ([one, one], [one, -one], [one, row], [thin_one, other], [thin_one, row], [row, row]):
                assert merged(name, stack, **more).isfinite().all(), more


@pytest.mark.parametrize("name", SOLVED)
def test_tensors_of_more_dimensions_are_merged_matrix_by_matrix(name):
    deltas = drawn((2, 9, 20))
    given = {"density": 1.0} if "scope" in METHODS[name].settings else {}  # what is trimmed is a share of all matrices
    wanted = torch.stack([merged(name, [d[n] for d in deltas], **given) for n in range(2)])
    assert close(merged(name, deltas, **given), wanted, 1e-6)
