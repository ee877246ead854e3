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
    return [
        (u[:, at] * strengths[at]) @ v[:, at].T for at in (slice(i * rank, (i + 1) * rank) for i in range(count))
    ]


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
