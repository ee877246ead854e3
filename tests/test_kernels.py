"""Kernels of a GPU, as far as a machine without one can tell."""

import torch

from evolver.merging import kernels
from evolver.merging.kernels import OPTIONS, Kernels, can_compile


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
    before = kernels.ingredients.__wrapped__()
    for name in kernels.INGREDIENTS:
        source = (kernels.Path(kernels.__file__).with_name(name)).read_text()
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
    assert kernels.ingredients.__wrapped__() == before
    (tmp_path / "weights.py").write_text("changed")
    assert kernels.ingredients.__wrapped__() == before
    (tmp_path / "operators.py").write_text("changed")
    kernels.digest_of.cache_clear()
    assert kernels.ingredients.__wrapped__() != before
