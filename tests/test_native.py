"""The loops in C against their plain twins."""

import pytest
import torch

from evolver.errors import BadInput
from evolver.kernels import native, random
from evolver.merging.engine import order
from evolver.merging.methods import operators

SIZES = [0, 1, 15, 16, 17, 1000, 50_000]


@pytest.fixture(autouse=True)
def _compiled():
    if native.library() is None:
        pytest.fail("no C compiler: the loops cannot be built here, so nothing would be tested")


def both(monkeypatch, work):
    """What ``work`` returns with the compiled loops and without."""
    compiled = work()
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return compiled, work()


@pytest.mark.parametrize("start", [0, 5, 8192, (1 << 42) + 3])
def test_draws(start, monkeypatch):
    ours, plain = both(monkeypatch, lambda: random.draws((9 << 32) + 7, "w", start, 20_000))
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["spread", "few values", "zeros"])
def test_taking_what_lies_between(size, kind, monkeypatch):
    generator = torch.Generator().manual_seed(size)
    row = torch.rand(size, generator=generator)
    row = {"spread": row, "few values": (row * 4).floor() / 4, "zeros": row * 0}[kind]
    one = torch.tensor(0.5)
    below = torch.nextafter(one, torch.tensor(0.0)).item()
    edges = torch.tensor(
        [
            [[0.2, 0.3], [below, 0.5], [-1.0, 0.0]],
            [[0.25, torch.inf], [0.4, 0.4], [0.7, 0.9]],
        ]
    )
    ours, plain = both(monkeypatch, lambda: order.take([row, row.flip(0)], edges))
    assert torch.equal(ours.above, plain.above)
    assert torch.equal(ours.inside, plain.inside)
    assert all(torch.equal(a, b) for a, b in zip(ours.scores, plain.scores, strict=True))
    assert ours.above[0, 0] == (row > 0.3).sum()
    assert ours.inside[0, 1] == (row == 0.5).sum()
    assert len(ours.scores[0]) == (((row > 0.2) & (row <= 0.3)) | (row == 0)).sum()  # 0.5 is alone in its pair


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 40), (70, 576), (2, 9000)])
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.3), (1.0, 0.0), (0.2, 0.0)])
def test_keeping_by_rank(shape, density, epsilon, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(shape, generator=generator).bfloat16().float()  # with equals
    draws = torch.randint(0, random.LEVELS, shape, generator=generator).float()
    numbers = [torch.tensor(n, dtype=torch.float64) for n in (density, epsilon)]
    ours, plain = both(monkeypatch, lambda: operators.kept_by_rank(delta, draws, *numbers))
    assert torch.equal(ours, plain)


def test_threads_change_nothing():
    before, row = torch.get_num_threads(), torch.rand(100_000, generator=torch.Generator().manual_seed(2))
    edges = torch.tensor([[[0.3, 0.6]]])
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append((order.take([row], edges), random.draws(1, "w", 3, 100_000)))
    finally:
        torch.set_num_threads(before)
    (one, few), (other, many) = results
    assert torch.equal(one.scores[0], other.scores[0])
    assert torch.equal(one.above, other.above)
    assert torch.equal(few, many)


def test_without_a_compiler_there_are_the_loops_that_were_compiled_before_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native.library.__wrapped__() is not None
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path))
    assert native.library.__wrapped__() is None


def test_a_cache_that_cannot_be_written_leaves_the_plain_code(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path / "file"))  # no folder can be made in it, not even by root
    with pytest.warns(UserWarning, match="The loops in C were not compiled, the plain code runs"):
        assert native.library.__wrapped__() is None


def test_preparing_compiles_once_and_says_why_it_cannot(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path / "cache"))
    assert native.compile_loops() > 0
    assert native.library_file().exists()
    assert native.compile_loops() == 0
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "--no-such-flag"))
    with pytest.raises(BadInput, match=r"^CC: .* does not compile the loops \(.*no-such-flag"):
        native.compile_loops()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path / "file"))
    with pytest.raises(BadInput, match=r"^EVOLVER_CACHE: .* set it to a folder that can be written"):
        native.compile_loops()
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match=r"^CC: there is no C compiler"):
        native.compile_loops()


@pytest.mark.parametrize("size", [1, 2, 17, 5000])
@pytest.mark.parametrize("kind", ["spread", "few values", "wide"])
def test_the_score_of_a_rank(size, kind):
    row = torch.rand(size, generator=torch.Generator().manual_seed(size))
    row = {"spread": row, "few values": (row * 4).floor() - 0.0, "wide": (row * 200 - 100).exp()}[kind].numpy()
    ordered = sorted(row.tolist())
    for rank in {0, size // 3, size - 1}:
        assert native.select_rank(native.library(), row, rank) == ordered[rank]


@pytest.mark.parametrize("dtype", list(native.EXPONENTS), ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_none(dtype, value):
    tensor = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)
    assert native.all_finite(native.library(), tensor)
    tensor[77] = value
    assert not native.all_finite(native.library(), tensor)
