"""Directions of task vectors: against torch's own decomposition, from the cache, and of odd shapes."""

import pytest
import torch

from evolver.merging.engine.apply import apply
from evolver.merging.engine.pieces import InputTensors
from evolver.merging.methods import METHODS, spectrum
from evolver.merging.methods.spectrum import Factors, decomposed, factors, matrix_by_matrix, polar

SHAPES = [(12, 12), (20, 8), (8, 20), (50, 6), (6, 50), (300, 280), (1200, 270)]


def matrix(shape, rank=None, seed=0):
    draw = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(shape, generator=draw)
    return torch.randn(shape[0], rank, generator=draw) @ torch.randn(rank, shape[1], generator=draw)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path))
    return tmp_path / spectrum.FOLDER


@pytest.mark.parametrize("shape", SHAPES)
def test_all_directions_are_those_of_a_decomposition_in_float64(shape):
    given = matrix(shape)
    found, values = factors(given), torch.linalg.svdvals(given.double())
    assert torch.allclose(found.product(), given, atol=2e-5 * float(values[0]))
    assert torch.allclose(found.s.double(), values, rtol=1e-4, atol=1e-4)
    for vectors in (found.u, found.v):
        assert torch.allclose(vectors.T @ vectors, torch.eye(min(shape)), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_strongest_directions_are_the_nearest_matrix_of_that_rank(shape):
    """What a truncation leaves has the norm of the values that it leaves out (Eckart and Young 1936)."""
    full = decomposed(matrix(shape))
    falling = Factors(full.u, 2.0 ** -torch.arange(len(full.s)), full.v)  # a spectrum with gaps
    given = falling.product()
    found = factors(given).first(5)
    left = torch.linalg.matrix_norm(given - found.product())
    assert torch.allclose(left, falling.s[5:].norm(), rtol=1e-3)
    assert found.u.shape == (shape[0], 5)
    assert found.v.shape == (shape[1], 5)


@pytest.mark.parametrize("shape", [(60, 40), (300, 280), (280, 300), (1200, 270)])
def test_a_low_rank_has_so_many_directions(shape):
    given = matrix(shape, rank=7)
    found = factors(given)
    assert found.s.shape == (7,)
    assert torch.allclose(found.product(), given, atol=1e-5 * float(found.s[0]))
    assert torch.allclose(found.s.double(), torch.linalg.svdvals(given.double())[:7], rtol=1e-5)
    for vectors in (found.u, found.v):
        assert torch.allclose(vectors.T @ vectors, torch.eye(7), atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 60), (300, 280), (1200, 270)])
def test_a_merge_has_all_directions_also_where_its_rank_is_low(shape):
    found = decomposed(matrix(shape, rank=7))
    assert found.s.shape == (min(shape),)
    for vectors in (found.u, found.v):
        assert torch.allclose(vectors.T @ vectors, torch.eye(min(shape)), atol=1e-4)


def test_the_rank_leaves_out_what_rounding_adds():
    given = matrix((64, 48), rank=5)
    assert factors(given).rank() == 5
    noisy = given + 1e-4 * matrix((64, 48), seed=1)
    assert factors(noisy).rank() == 5
    assert factors(torch.zeros(64, 48)).rank() == factors(torch.zeros(300, 280)).rank() == 0
    assert factors(torch.eye(10)).rank() == 10


def test_a_polar_factor_is_the_nearest_orthonormal_basis():
    given = matrix((30, 12))
    u, _, vt = torch.linalg.svd(given.double(), full_matrices=False)
    assert torch.allclose(polar(given).double(), u @ vt, atol=1e-5)


def test_columns_that_depend_on_each_other_bring_no_noise():
    """A direction that is there twice, or not at all, must not turn into an arbitrary one (part of TSV-M's defect)."""
    given = matrix((30, 3))
    found = polar(torch.cat([given, torch.zeros(30, 2)], dim=1))
    assert torch.allclose(found[:, :3], polar(given), atol=1e-6)
    assert not found[:, 3:].any()
    twice = polar(torch.cat([given, given], dim=1))
    assert torch.allclose(twice[:, :3], twice[:, 3:], atol=1e-6)


def test_a_large_matrix_is_decomposed_once(own_cache, monkeypatch):
    given = matrix((300, 280))
    first = factors(given)
    monkeypatch.setattr(spectrum, "decomposed", None)
    again = factors(given)
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    assert len(list(own_cache.iterdir())) == 1


def test_a_damaged_file_is_made_again(own_cache):
    given = matrix((300, 280))
    first = factors(given)
    file = next(own_cache.iterdir())
    data = bytearray(file.read_bytes())
    data[-8] ^= 255
    file.write_bytes(bytes(data))
    assert torch.allclose(factors(given).product(), first.product(), atol=1e-4)


def test_old_files_make_room(own_cache, monkeypatch):
    size = 4 * (300 + 281) * 280
    monkeypatch.setattr(spectrum, "ROOM", int(2.5 * size))
    for seed in range(4):
        factors(matrix((300, 280), seed=seed))
    assert len(list(own_cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path / "file"))
    given = matrix((300, 280))
    assert torch.allclose(factors(given).product(), given, atol=1e-3)


def test_what_is_not_finite_is_no_task_vector():
    given = matrix((20, 20))
    given[3, 4] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        factors(given)


@pytest.mark.parametrize(
    ("shape", "matrices", "rest"),
    [
        ((5,), 0, 1), ((), 0, 1), ((1, 7), 0, 1), ((4, 3), 1, 0), ((2, 20, 30), 2, 0), ((6, 3, 3, 3), 1, 0),
        ((8, 1, 4), 1, 0), ((2, 3, 20, 30), 6, 0),
    ],
)  # fmt: skip
def test_every_shape_is_merged(shape, matrices, rest):
    seen = []

    def merge(kind):
        def of(stack):
            seen.append((kind, stack[0].dim()))
            return stack[0] + stack[1]

        return of

    pair = [torch.randn(shape), torch.randn(shape)]
    assert torch.equal(matrix_by_matrix(pair, merge("matrix"), merge("rest")), pair[0] + pair[1])
    assert seen.count(("matrix", 2)) == matrices
    assert len(seen) == matrices + rest


def test_zeros_alone_are_not_looked_at():
    merged = matrix_by_matrix([torch.zeros(20, 30)] * 2, None, None)
    assert merged.shape == (20, 30)
    assert not merged.any()


class TestWhereNoDecompositionIsFound:
    """What torch does for matrices on which its iteration does not end, whichever they are on a machine."""

    def failing(self, monkeypatch, *dtypes):
        whole, tried = torch.linalg.svd, []

        def svd(given, **options):
            tried.append(given.dtype)
            if given.dtype in dtypes:
                raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")
            return whole(given, **options)

        monkeypatch.setattr(torch.linalg, "svd", svd)
        return tried

    def test_float64_is_tried(self, monkeypatch):
        given = matrix((20, 15))
        wanted, tried = decomposed(given), self.failing(monkeypatch, torch.float32)
        found = decomposed(given)
        assert tried == [torch.float32, torch.float64]
        assert torch.allclose(found.product(), given, atol=1e-5)
        assert torch.allclose(found.s, wanted.s, rtol=1e-5)

    @pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
    def test_the_tensor_is_named(self, monkeypatch, method):
        base = torch.zeros(20, 15)
        self.failing(monkeypatch, torch.float32, torch.float64)
        whole = InputTensors("layers.3.up.weight", [matrix((20, 15), seed=n) for n in range(2)], base, ["a", "b"])
        said = rf"{method} of layers\.3\.up\.weight: no singular value decomposition is found, in float64 neither"
        with pytest.raises(FloatingPointError, match=said):
            apply(METHODS[method], METHODS[method].in_force({}, 2), whole)
