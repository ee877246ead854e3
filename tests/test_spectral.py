"""Methods on the directions of task vectors: against their formulas in float64, and what the papers promise."""

import pytest
import torch

from evolver.merging.engine.apply import apply
from evolver.merging.engine.pieces import InputTensors
from evolver.merging.methods import METHODS

SHAPE = (24, 18)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path))


def drawn(shape=SHAPE, count=3, rank=None, seed=0):
    """Task vectors of so many experts."""
    draw = torch.Generator().manual_seed(seed)

    def one():
        if rank is None:
            return torch.randn(shape, generator=draw)
        return torch.randn(shape[0], rank, generator=draw) @ torch.randn(rank, shape[1], generator=draw)

    return [one() for _ in range(count)]


def orthogonal(count=3, rank=4, shape=SHAPE, seed=0):
    """Task vectors of that rank whose directions are orthogonal to those of the others, on both sides."""
    draw = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(size, count * rank, generator=draw)).Q for size in shape)
    strengths = torch.rand(count * rank, generator=draw) + 0.5
    return [(u[:, at] * strengths[at]) @ v[:, at].T for at in (slice(i * rank, (i + 1) * rank) for i in range(count))]


def merged(name, deltas, base=None, weight=1.0, lambda_=1.0, **given):
    """The merged task vector in float64, of experts that are the base (zeros by default) and their task vectors."""
    base = torch.zeros_like(deltas[0]) if base is None else base
    values = METHODS[name].complete({"weight": weight, "lambda": lambda_, **given}, len(deltas), "here")
    whole = InputTensors("w", [base + d for d in deltas], base, [str(i) for i in range(len(deltas))], None, {})
    return apply(METHODS[name], values, whole).double() - base.double()


def close(one, other, tolerance=2e-5):
    """Up to a share of the largest number."""
    other = torch.as_tensor(other).double()
    return torch.allclose(one.double(), other, rtol=0, atol=tolerance * float(other.abs().max()) + 1e-12)


def svd(matrix):
    """U (m, m), the singular values, and V (n, n) of a matrix in float64."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=True)
    return u, s, vt.T


def cut(matrix, count):
    """The nearest matrix of that rank."""
    u, s, v = svd(matrix)
    return (u[:, :count] * s[:count]) @ v[:, :count].T


def rank_of(matrix, energy=0.999):
    """The directions that hold that share of the squares."""
    squares = svd(matrix)[1].square()
    shares = squares.cumsum(0) / squares.sum()
    return next(k for k in range(1, len(squares) + 1) if shares[k - 1] >= energy - 1e-12)


def whitened(columns):
    """P Qᵀ of the decomposition P D Qᵀ of columns."""
    p, d, q = svd(columns)
    return p[:, : len(d)] @ q[:, : len(d)].T


def side_by_side(deltas, counts, weights):
    """The first directions of the weighted matrices: U, the singular values, V."""
    found = [svd(w * d) for d, w in zip(deltas, weights, strict=True)]
    columns = [(u[:, :k], s[:k], v[:, :k]) for (u, s, v), k in zip(found, counts, strict=True)]
    return tuple(torch.cat(of, -1) for of in zip(*columns, strict=True))


def tsv_by_formula(deltas, counts, weights):
    u, s, v = side_by_side(deltas, counts, weights)
    return whitened(u) @ torch.diag(s) @ whitened(v).T


WEIGHTS = [0.5, 1.2, 0.7]


class TestTSV:
    @pytest.mark.parametrize("shape", [SHAPE, (18, 24), (90, 9)], ids=str)
    @pytest.mark.parametrize("share", [0.4, 1.0])
    def test_is_the_formula(self, shape, share):
        deltas = drawn(shape)
        counts = [max(1, int(min(shape) // 3 * share))] * 3
        found = merged("tsv_m", deltas, weight=WEIGHTS, lambda_=1.5, share=share)
        assert close(found, 1.5 * tsv_by_formula(deltas, counts, WEIGHTS))

    def test_of_low_rank_it_is_the_formula_with_that_rank(self):
        deltas = drawn(rank=2)
        assert close(merged("tsv_m", deltas, weight=WEIGHTS), tsv_by_formula(deltas, [2] * 3, WEIGHTS))

    @pytest.mark.parametrize("rank", [4, 6])
    def test_orthogonal_experts_are_added(self, rank):
        deltas = orthogonal(rank=rank)
        assert close(merged("tsv_m", deltas), sum(deltas))

    @pytest.mark.parametrize("rank", [None, 3])
    def test_one_expert_is_cut_to_its_rank(self, rank):
        (delta,) = drawn(count=1, rank=rank)
        assert close(merged("tsv_m", [delta]), cut(delta, rank_of(delta)))
        assert close(merged("tsv_m", [delta], share=1 / 9), cut(delta, 2))
        assert close(merged("tsv_m", [delta], rank_aware=False), delta)

    def test_directions_without_strength_change_nothing(self):
        """The published method lets them turn the others: k of them are taken whatever the rank."""
        deltas = drawn(rank=3)
        padded = [torch.nn.functional.pad(d, (0, 12, 0, 12)) for d in deltas]
        found = merged("tsv_m", padded)
        assert close(found[: SHAPE[0], : SHAPE[1]], merged("tsv_m", deltas))
        assert not found[SHAPE[0] :].any()
        assert not found[:, SHAPE[1] :].any()

    def test_an_expert_that_is_there_twice_counts_once(self):
        (delta,) = drawn(count=1, rank=3)
        assert close(merged("tsv_m", [delta, delta]), delta)


def outliers_and_zeros(delta):
    """Scalar by scalar, as the reading says."""
    numbers = delta.double().flatten().tolist()
    mean = sum(numbers) / len(numbers)
    spread = (sum((x - mean) ** 2 for x in numbers) / len(numbers)) ** 0.5
    outliers = sum(abs(x) for x in numbers if abs(x - mean) > 3 * spread)
    return outliers, sum(abs(x) < 0.01 * spread for x in numbers) / len(numbers)


class TestRTSVM:
    def sparse(self):
        """Of three experts one has outliers, and one is zero in half of its scalars."""
        first, second, third = drawn()
        first[2, 3], second[0, 0], third[1, 1] = 9.0, 5.0, -7.0
        return [
            first,
            torch.where(torch.rand(SHAPE, generator=torch.Generator().manual_seed(5)) < 0.5, 0.0, second),
            third,
        ]

    @pytest.mark.parametrize(("outlier", "gamma"), [(1.0, 1.0), (0.5, 0.0), (0.0, 2.0)])
    def test_is_the_formula(self, outlier, gamma):
        deltas = self.sparse()
        far, near = zip(*map(outliers_and_zeros, deltas), strict=True)
        assert all(far)
        more = [3 * o**outlier / sum(x**outlier for x in far) for o in far]
        counts = [int(6 * (1 - q) ** gamma) for q in near]
        wanted = tsv_by_formula(deltas, counts, [w * m for w, m in zip(WEIGHTS, more, strict=True)])
        found = merged("r_tsvm", deltas, weight=WEIGHTS, lambda_=2.0, outlier=outlier, gamma=gamma)
        assert close(found, 2 * wanted)
        assert gamma == 0 or counts[1] < counts[0]

    def test_with_both_off_it_is_tsv_m(self):
        deltas = self.sparse()
        for more in ({}, {"share": 0.5}, {"rank_aware": False}):
            plain = merged("tsv_m", deltas, weight=WEIGHTS, **more)
            assert torch.equal(merged("r_tsvm", deltas, weight=WEIGHTS, outlier=0.0, gamma=0.0, **more), plain)
            assert not close(merged("r_tsvm", deltas, weight=WEIGHTS, **more), plain, 1e-3)

    def test_without_outliers_all_weigh_the_same(self):
        deltas = [torch.sign(d) for d in drawn()]
        assert close(merged("r_tsvm", deltas), merged("tsv_m", deltas))


class TestSTF:
    def system(self, deltas, energy=0.8):
        counts = [min(SHAPE[1] // 3, rank_of(d, energy)) for d in deltas]
        return side_by_side(deltas, counts, WEIGHTS)

    def test_bilinear_is_the_formula(self):
        deltas = drawn()
        u, s, v = self.system(deltas)
        overlap = (u.T @ u) * (v.T @ v)
        strength = torch.linalg.solve(overlap + 1e-3 * torch.eye(len(s)).double(), s)
        wanted = sum(a * torch.outer(left, right) for a, left, right in zip(strength, u.T, v.T, strict=True))
        assert close(merged("stf", deltas, weight=WEIGHTS, lambda_=1.5, energy=0.8, ridge=1e-3), 1.5 * wanted)

    def test_vector_is_the_formula(self):
        """The smallest M with M V = U diag(σ)."""
        deltas = drawn()
        u, s, v = self.system(deltas)
        wanted = u @ torch.diag(s) @ torch.linalg.pinv(v)
        found = merged("stf", deltas, weight=WEIGHTS, energy=0.8, ridge=1e-9, constraint="vector")
        assert close(found, wanted, 1e-4)

    @pytest.mark.parametrize("rank", [2, None])
    def test_every_kept_direction_is_as_strong_as_in_its_expert(self, rank):
        deltas = drawn(rank=rank)
        u, s, v = self.system(deltas, 0.99)
        found = merged("stf", deltas, weight=WEIGHTS, ridge=1e-9)
        assert torch.allclose((u.T @ found @ v).diagonal(), s, atol=1e-4 * float(s.max()))
        found = merged("stf", deltas, weight=WEIGHTS, ridge=1e-9, constraint="vector")
        assert torch.allclose(found @ v, u * s, atol=1e-4 * float(s.max()))

    @pytest.mark.parametrize("constraint", ["bilinear", "vector"])
    def test_orthogonal_experts_are_added(self, constraint):
        deltas = orthogonal(rank=6)
        assert close(merged("stf", deltas, energy=1.0, constraint=constraint), sum(deltas))

    def test_experts_that_want_one_direction_differently_strong_do_not_blow_up(self):
        (delta,) = drawn(count=1, rank=3)
        found = merged("stf", [delta, 1.001 * delta], weight=[0.5, 1.0])
        assert torch.linalg.norm(found) < 1.5 * torch.linalg.norm(delta)


def smoothed(s, kind, rho):
    if kind == "none":
        return s
    first = min(rho, s[0] / s[-1]) if kind == "linear" else 1
    line = [first + (1 - first) * i / (len(s) - 1) for i in range(len(s))]
    return torch.tensor([float(s.sum()) * x / sum(line) for x in line], dtype=torch.float64)


def dc_by_formula(deltas, counts, weights, keep, kind, rho):
    """As the paper's pages put it: whole matrices in the basis of all directions, then a mask of blocks."""
    u, _, v = side_by_side(deltas, counts, weights)
    left, right = whitened(u), whitened(v)
    kept = []
    for delta, k, w in zip(deltas, counts, weights, strict=True):
        u_i, s_i, v_i = svd(delta)
        task = (u_i[:, :k] * smoothed(s_i[:k], kind, rho)) @ v_i[:, :k].T * w
        inner = left.T @ task @ right
        edge = inner.abs().flatten().sort(descending=True).values[max(1, int(keep * inner.numel())) - 1]
        kept.append(torch.where(inner.abs() >= edge, inner, 0.0))
    sign = torch.where(sum(kept) < 0, -1.0, 1.0)
    agree = [(k * sign > 0).double() for k in kept]
    mean = sum(k * a for k, a in zip(kept, agree, strict=True)) / sum(agree).clamp(min=1)
    mask = torch.block_diag(*[torch.ones(k, k) for k in counts])
    return left @ (mask * mean) @ right.T


class TestDCMerge:
    @pytest.mark.parametrize("kind", ["none", "avg", "linear"])
    @pytest.mark.parametrize("keep", [0.05, 1.0])
    def test_is_the_formula(self, kind, keep):
        deltas = drawn()
        found = merged("dc_merge", deltas, weight=WEIGHTS, lambda_=1.5, keep=keep, smoothing=kind, rho=1.3)
        assert close(found, 1.5 * dc_by_formula(deltas, [6] * 3, WEIGHTS, keep, kind, 1.3))

    def test_of_low_rank_it_is_the_formula_with_that_rank(self):
        deltas = drawn(rank=2)
        wanted = dc_by_formula(deltas, [2] * 3, WEIGHTS, 0.5, "linear", 5.0)
        assert close(merged("dc_merge", deltas, weight=WEIGHTS, keep=0.5, smoothing="linear"), wanted)

    def test_orthogonal_experts_are_added(self):
        deltas = orthogonal()
        assert close(merged("dc_merge", deltas, keep=1.0), sum(deltas))

    @pytest.mark.parametrize("kind", ["avg", "linear"])
    def test_smoothing_keeps_the_sum_of_the_singular_values(self, kind):
        (delta,) = drawn(count=1)
        found = svd(merged("dc_merge", [delta], keep=1.0, smoothing=kind, rho=3.0, rank_aware=False))[1]
        assert found.sum() == pytest.approx(float(svd(delta)[1].sum()), rel=1e-5)
        assert found[0] / found[-1] == pytest.approx(1.0 if kind == "avg" else 3.0, rel=1e-4)


class TestIso:
    def test_iso_c_is_the_formula(self):
        deltas = drawn()
        u, s, v = svd(sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True)))
        wanted = 1.5 * s.mean() * u[:, : len(s)] @ v.T
        assert close(merged("iso_c", deltas, weight=WEIGHTS, lambda_=1.5, rank_aware=False), wanted)

    def test_the_mean_is_over_the_directions_that_count(self):
        deltas = drawn()
        summed = sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True))
        (u, s, v), rank = svd(summed), rank_of(summed)
        assert rank < len(s)
        flat = torch.cat([s[:rank].mean() ** 0.3 * s[:rank] ** 0.7, s[rank:]])
        assert close(merged("iso_c", deltas, weight=WEIGHTS, flatten=0.3), (u[:, : len(s)] * flat) @ v.T)

    @pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
    @pytest.mark.parametrize("rank", [2, None])
    def test_not_flattened_it_is_task_arithmetic(self, name, rank):
        deltas = drawn(rank=rank)
        wanted = merged("task_arithmetic", deltas, weight=WEIGHTS, lambda_=1.5)
        assert torch.equal(merged(name, deltas, weight=WEIGHTS, lambda_=1.5, flatten=0.0), wanted)

    @pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
    def test_of_low_rank_it_stays_within_what_the_experts_changed(self, name):
        """The published method puts most of the energy elsewhere."""
        deltas = drawn((60, 50), rank=3)
        span = torch.linalg.qr(torch.cat([cut(d, 3) for d in deltas], 1) @ torch.randn(150, 9).double()).Q

        def outside(found):
            return torch.linalg.norm(found - span @ (span.T @ found)) / torch.linalg.norm(found)

        assert outside(merged(name, deltas)) < 1e-5
        assert outside(merged("iso_c", deltas, rank_aware=False)) > 0.5

    def test_singular_vectors_stay(self):
        deltas = drawn()
        u, s, v = svd(sum(deltas))
        inner = u.T[: len(s)] @ merged("iso_c", deltas) @ v
        assert torch.allclose(inner, torch.diag(inner.diagonal()), atol=1e-4)

    def cts_by_formula(self, deltas, common, own):
        summed = sum(w * d.double() for w, d in zip(WEIGHTS, deltas, strict=True))
        u, s, v = svd(summed)
        parts = [(u[:, :common], s[:common], v[:, :common])]
        project = torch.eye(len(u)).double() - u[:, :common] @ u[:, :common].T
        for w, delta in zip(WEIGHTS, deltas, strict=True):
            u_i, s_i, v_i = svd(project @ (w * delta.double()))
            parts.append((u_i[:, :own], s_i[:own], v_i[:, :own]))
        u, s, v = (torch.cat(of, -1) for of in zip(*parts, strict=True))
        return summed, whitened(u), s, whitened(v)

    @pytest.mark.parametrize(("share", "common", "own"), [(0.5, 9, 3), (0.8, 14, 1), (1.0, 18, 0)])
    def test_iso_cts_is_the_formula(self, share, common, own):
        deltas = drawn()
        summed, u, s, v = self.cts_by_formula(deltas, common, own)
        given = {"weight": WEIGHTS, "common": share, "rank_aware": False}
        assert close(merged("iso_cts", deltas, lambda_=1.5, **given), 1.5 * s.mean() * u @ v.T)
        partly = 0.4 * (summed - u @ torch.diag(s) @ v.T) + (u * (s.mean() ** 0.6 * s**0.4)) @ v.T
        assert close(merged("iso_cts", deltas, flatten=0.6, **given), partly)

    def test_all_directions_in_common_are_iso_c(self):
        deltas = drawn()
        given = {"weight": WEIGHTS, "rank_aware": False}
        assert close(merged("iso_cts", deltas, common=1.0, **given), merged("iso_c", deltas, **given))


class TestSubspaceBoosting:
    @pytest.mark.parametrize("beta", [0.0, 0.2, 0.7, 1.0])
    def test_is_the_formula(self, beta):
        deltas = drawn()
        u, s, v = svd(sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True)))
        at = next(j for j in range(len(s)) if s[: j + 1].sum() >= beta * s.sum() - 1e-9)
        wanted = (u[:, : len(s)] * s.clamp(min=float(s[at]))) @ v.T
        assert close(merged("subspace_boosting", deltas, weight=WEIGHTS, lambda_=0.7, beta=beta), 0.7 * wanted)

    def test_at_0_all_are_as_the_largest_and_at_1_nothing_changes(self):
        deltas = drawn()
        s = svd(sum(deltas))[1]
        assert torch.allclose(svd(merged("subspace_boosting", deltas, beta=0.0))[1], s[0].expand(len(s)), rtol=1e-5)
        assert close(merged("subspace_boosting", deltas, beta=1.0), sum(deltas))

    def test_the_released_codes_default_raises_everything(self):
        deltas = drawn()
        raised = merged("subspace_boosting", deltas, beta=0.01)
        assert torch.equal(raised, merged("subspace_boosting", deltas, beta=0.0))

    def test_over_a_merge_it_boosts_that_merge(self):
        deltas = drawn()
        thinned = merged("ties", deltas, density=0.3).float()
        u, s, v = svd(thinned)
        at = next(j for j in range(len(s)) if s[: j + 1].sum() >= 0.3 * s.sum())
        wanted = (u[:, : len(s)] * s.clamp(min=float(s[at]))) @ v.T
        assert close(merged("subspace_boosting", [thinned], beta=0.3), wanted)

    def test_rank_aware_it_fills_nothing_in(self):
        (delta,) = drawn(count=1, rank=3)
        assert rank_of(merged("subspace_boosting", [delta], beta=0.0, rank_aware=True)) == 3
        assert rank_of(merged("subspace_boosting", [delta], beta=0.0)) == SHAPE[1]


def opcm_by_formula(deltas, weights, alpha):
    """With the full matrices U (m, m) and V (n, n), as the reference code has them."""
    tasks = [w * d.double() for w, d in zip(weights, deltas, strict=True)]
    merge, length = tasks[0], 1.0
    for count, task in enumerate(tasks[1:], 2):
        u, s, v = svd(merge)
        r = int((s.cumsum(0) / s.sum() > alpha).double().argmax())
        inner = u.T @ task @ v
        inner[:r, :r] = 0
        for i in range(len(s)):
            inner[i, i] = 0
        added = length * merge + u @ inner @ v.T
        length = torch.linalg.norm(added) / (sum(torch.linalg.norm(t) for t in tasks[:count]) / count)
        merge = added / length
    return merge


class TestOPCM:
    @pytest.mark.parametrize("shape", [(8, 12), (12, 8), (9, 9)], ids=str)
    @pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
    def test_is_the_formula_with_full_matrices(self, shape, alpha):
        deltas = drawn(shape)
        found = merged("opcm", deltas, weight=WEIGHTS, lambda_=1.5, alpha=alpha)
        assert close(found, 1.5 * opcm_by_formula(deltas, WEIGHTS, alpha))

    @pytest.mark.parametrize("shape", [(8, 12), (12,)], ids=str)
    def test_after_each_step_the_norm_is_the_mean_norm(self, shape):
        deltas = drawn(shape, count=4)
        for count in range(1, 5):
            wanted = sum(d.norm() for d in deltas[:count]) / count
            assert merged("opcm", deltas[:count]).norm() == pytest.approx(float(wanted), rel=1e-5)

    def test_vectors_are_added_and_scaled(self):
        one, other = drawn((12,), count=2)
        wanted = (one + other) / (one + other).norm() * (one.norm() + other.norm()) / 2
        assert close(merged("opcm", [one, other]), wanted)

    def test_the_order_matters(self):
        deltas = drawn()
        assert not close(merged("opcm", deltas), merged("opcm", deltas[::-1]), 1e-2)

    def test_experts_that_changed_nothing_are_passed_over(self):
        deltas = drawn()
        wanted = merged("opcm", deltas)
        assert torch.equal(merged("opcm", [torch.zeros(SHAPE), *deltas, torch.zeros(SHAPE)]), wanted)
        assert torch.equal(merged("opcm", [deltas[2], *deltas], weight=[0.0, 1.0, 1.0, 1.0]), wanted)

    def test_of_low_rank_only_directions_of_the_merge_are_dropped(self):
        """Directions of strength zero are arbitrary, and a new expert is not to lose anything in them."""
        one, other = orthogonal(count=2, rank=3)
        longer = one + other
        wanted = longer / longer.norm() * (one.norm() + other.norm()) / 2
        assert close(merged("opcm", [one, other], alpha=0.95), wanted)


EVERY = pytest.mark.parametrize(
    "name", ["tsv_m", "r_tsvm", "stf", "dc_merge", "iso_c", "iso_cts", "subspace_boosting", "opcm"]
)


@EVERY
def test_one_expert_of_weight_0_is_as_if_it_had_not_changed_anything(name):
    deltas = drawn()
    without = merged(name, [deltas[0], torch.zeros(SHAPE), deltas[2]])
    assert close(merged(name, deltas, weight=[1.0, 0.0, 1.0]), without) or name == "r_tsvm"
    assert without.isfinite().all()


@EVERY
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_the_task_vectors_is_that_of_the_merge(name, scale):
    deltas = drawn()
    assert close(merged(name, [scale * d for d in deltas]), scale * merged(name, deltas), 1e-4)


@EVERY
def test_weights_and_mass_are_scales(name):
    """So that weights that sum to 1 at λ = N are the paper's weights of 1 at its scale of 1."""
    deltas = drawn()
    assert close(merged(name, deltas, weight=1 / 3, lambda_=3.0), merged(name, deltas), 1e-4)
    assert close(merged(name, [-d for d in deltas]), merged(name, deltas, weight=-1.0), 1e-4)


@EVERY
@pytest.mark.parametrize("shape", [(2, 2), (2, 40), (1, 30), (30,), ()], ids=str)
def test_what_is_too_small_to_have_directions_is_task_arithmetic(name, shape):
    """Where there are fewer rows than experts, for the methods that give each expert directions of its own."""
    deltas = drawn(shape)
    found = merged(name, deltas, weight=WEIGHTS)
    if name == "opcm" or (min(shape, default=0) > 1 and name in ("iso_c", "subspace_boosting")):
        assert found.isfinite().all()
    else:
        assert torch.equal(found, merged("task_arithmetic", deltas, weight=WEIGHTS))


@EVERY
def test_a_tensor_that_nobody_changed_stays(name):
    base = torch.randn((300, 280), generator=torch.Generator().manual_seed(3))
    assert not merged(name, [torch.zeros(300, 280)] * 3, base).any()


@EVERY
def test_models_in_bfloat16_are_merged_as_what_they_are(name):
    """The rounding of stored weights is part of the task vectors."""
    base = drawn(count=1, seed=9)[0].bfloat16()
    models = [(base + 0.1 * d).bfloat16() for d in drawn()]
    values = METHODS[name].complete({}, 3, "here")
    found = apply(METHODS[name], values, InputTensors("w", models, base, ["a", "b", "c"], None, {}))
    wanted = merged(name, [m.double().sub(base.double()).float() for m in models])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (base.double() + wanted).bfloat16())


@EVERY
def test_fused_experts_are_a_matrix_each(name):
    deltas = drawn((2, 24, 18))
    wanted = torch.stack([merged(name, [d[i] for d in deltas], weight=WEIGHTS) for i in range(2)])
    assert torch.equal(merged(name, deltas, weight=WEIGHTS), wanted)


@EVERY
def test_what_is_not_finite_is_named(name):
    deltas = drawn()
    deltas[1][2, 2] = torch.inf
    with pytest.raises(FloatingPointError, match=f"^{name} of w: "):
        merged(name, deltas)
