"""Kernels of a GPU, as far as a machine without one can tell."""

import torch

from evolver.kernels import compiled
from evolver.kernels.compiled import OPTIONS, Kernels, can_compile


def test_a_cpu_has_none():
    """There the loop in C does the work."""
    x = torch.ones(10)
    assert not can_compile(torch.device("cpu"))
    assert Kernels().get(lambda x: (x,), [x], [True], "nowhere") is None


def test_options_are_what_the_exactness_of_kernels_rests_on():
    """No contraction of a product and a sum."""
    assert OPTIONS == {"emulate_precision_casts": True}


def test_a_kernel_is_made_anew_where_what_it_is_made_of_changes(tmp_path, monkeypatch):
    """And not where any other file does."""
    before = compiled.ingredients.__wrapped__()
    for name in compiled.INGREDIENTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((compiled.PACKAGE / name).read_text())
    monkeypatch.setattr(compiled, "PACKAGE", tmp_path)
    assert compiled.ingredients.__wrapped__() == before
    (tmp_path / "weights.py").write_text("changed")
    assert compiled.ingredients.__wrapped__() == before
    (tmp_path / "merging" / "methods" / "operators.py").write_text("changed")
    compiled.digest_of.cache_clear()
    assert compiled.ingredients.__wrapped__() != before
