"""Crossover by rows, tensors and layers, against references of a few lines and draws in plain integers."""

from typing import get_args

import pytest
import torch
from test_crossing import FLOATS, members, partners
from test_crossing import reference as by_scalars
from test_random import one_draw

from evolver.kernels import native
from evolver.merging import crossing
from evolver.merging.crossing import STRATEGIES, cross, cross_units
from evolver.records.recipe import Cross, Expert, MaskUnit

A, B = Expert("a", "aa"), Expert("b", "bb")


def row_mask(shape, seed, unit, Cr):
    """Row r is replaced where draw r of its stream is below Cr · 65536; rows are vectors along the last dimension."""
    mask = torch.zeros(shape, dtype=torch.bool).reshape(-1, shape[-1] if shape else 1)
    for row in range(len(mask)):
        mask[row] = one_draw(seed, unit, row) < Cr * 65536
    return mask.reshape(shape)


def reference(strategy, x, p, F, Cr, seed, unit, by_row):
    mutant, _ = by_scalars(strategy, x, p, F, 1.0, seed, unit)  # in float64, of all scalars
    mask = row_mask(x.shape, seed, unit, Cr) if by_row else torch.tensor(one_draw(seed, unit, 0) < Cr * 65536)
    return torch.where(mask, mutant, x.double()), mask.expand(x.shape)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_are_replaced_whole(strategy, dtype):
    """The bounds are those of ``test_cross_is_its_definition``."""
    x, *p = members(1 + partners(strategy), (70, 131), dtype)
    child = cross_units(strategy, x, p, 0.3, 0.5, 11, "w", by_row=True)
    wanted, mask = reference(strategy, x, p, 0.3, 0.5, 11, "w", by_row=True)
    assert child.dtype == dtype
    assert 20 < mask[:, 0].sum() < 50  # 5 standard deviations of 70 draws at one half are 21
    assert torch.equal(child[~mask], x[~mask])
    assert (child[mask] != x[mask]).double().mean() > 0.9
    assert torch.allclose(child.double(), wanted, rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3, 5), (40, 8), (8193,), (2, 30, 4), (9000, 3)])
@pytest.mark.parametrize("by_row", [True, False])
def test_every_shape_has_its_rows(shape, by_row):
    x, p = members(2, shape)
    for seed in range(4):
        child = cross_units("evolver", x, [p], 0.5, 0.5, seed, "w", by_row)
        wanted, mask = reference("evolver", x, [p], 0.5, 0.5, seed, "w", by_row)
        assert child.shape == x.shape
        assert torch.equal(child[~mask], x[~mask])
        assert torch.allclose(child.double(), wanted, atol=1e-6)


def test_a_vector_is_one_row():
    x, p = torch.zeros(1000), torch.ones(1000)
    found = {float(cross_units("evolver", x, [p], 1.0, 0.5, seed, "w", by_row=True).mean()) for seed in range(20)}
    assert found == {0.0, 1.0}


def test_an_empty_tensor_stays_empty():
    assert cross_units("evolver", torch.zeros(0, 4), [torch.zeros(0, 4)], 0.5, 0.5, 1, "w", True).shape == (0, 4)


@pytest.mark.parametrize("columns", [64, 67])
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_c_and_plain_code_and_all_pieces_give_the_same_bits(dtype, columns, by_row, monkeypatch):
    if native.library() is None:
        pytest.fail("no C compiler: the loop cannot be built here, so nothing would be tested")
    x, *p = members(4, (411, columns), dtype)
    looped = cross_units("rand/1", x, p, 0.3, 0.7, 5, "w", by_row)
    assert not torch.equal(looped, x)
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.equal(cross_units("rand/1", x, p, 0.3, 0.7, 5, "w", by_row), looped)
    monkeypatch.setattr(crossing, "CROSSING_PIECE", 1000)
    assert torch.equal(cross_units("rand/1", x, p, 0.3, 0.7, 5, "w", by_row), looped)


def test_where_all_is_replaced_masks_do_not_differ():
    x, p = members(2, (90, 100))
    mutant = cross("evolver", x, [p], 0.25, 1.0, 1, "w")
    for by_row in (True, False):
        assert torch.equal(cross_units("evolver", x, [p], 0.25, 1.0, 1, "w", by_row), mutant)


def test_a_parent_of_which_nothing_is_replaced_is_not_copied():
    x, p = members(2, (90, 100))
    assert cross_units("evolver", x, [p], 0.5, 1e-6, 1, "w", by_row=True) is x


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.up.weight", "model.layers.3"),
        ("encoder.block.0.layer.1.wi.weight", "encoder.block.0"),
        ("decoder.block.0.layer.1.wi.weight", "decoder.block.0"),
        ("transformer.h.11.ln_1.bias", "transformer.h.11"),
        ("model.embed_tokens.weight", "before the layers"),
        ("lm_head.weight", "after the layers"),
        ("model.norm.weight", "after the layers"),
    ],
)
def test_what_draws_together(name, layer):
    """Tensors of one layer draw once, so do all embeddings, and all that comes after the layers."""
    by = {mask: Cross(A, (B,), "evolver", 0.5, 0.5, 1, mask) for mask in get_args(MaskUnit)}
    assert by["layer"].unit(name) == layer
    assert {by[mask].unit(name) for mask in ("scalar", "row", "tensor")} == {name}


def test_people_read_which_mask_it_is():
    coarse = Cross(A, (B,), "evolver", 0.5, 0.25, 1, "row")
    assert coarse.describe() == "crossover by rows (evolver, F 0.5, Cr 0.25, seed 1)"
    assert coarse.operations == ("mutation evolver", "crossover by rows Cr 0.25")
    assert Cross(A, (B,), "evolver", 0.5, 0.25, 1).operations == ("mutation evolver", "crossover Cr 0.25")
