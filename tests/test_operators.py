"""The primitives by hand-made numbers, and those with a shortcut against their definition."""

import pytest
import torch

from evolver.kernels.random import LEVELS
from evolver.merging.methods import operators

T = torch.tensor


def numbers(*values):
    return T(values, dtype=torch.float64)


def test_a_weighted_sum_is_divided_where_it_can_be():
    pair = [T([1.0, 2.0]), T([3.0, 6.0])]
    assert operators.weighted_sum(pair, numbers(1, 3), False).tolist() == [10.0, 20.0]
    assert operators.weighted_sum(pair, numbers(1, 3), True).tolist() == [2.5, 5.0]
    assert operators.weighted_sum(pair, numbers(1, -1), True).tolist() == [-2.0, -4.0]


def test_trimming_keeps_equals_and_clipping_drops_them():
    delta = T([-4.0, 3.0, -2.0, 1.0])
    assert operators.trim(delta, T(2.0)).tolist() == [-4.0, 3.0, -2.0, 0.0]
    assert operators.clip_outliers(delta, T(3.0)).tolist() == [0.0, 0.0, -2.0, 1.0]


def test_a_scalar_is_dropped_from_its_level_on():
    draws = T([0.0, LEVELS / 2 - 1, LEVELS / 2, LEVELS - 1])
    assert operators.drop(torch.ones(4), draws, T(0.5, dtype=torch.float64)).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert operators.drop(torch.ones(4), draws, T(1.0, dtype=torch.float64)).tolist() == [1.0] * 4


def test_ranks_are_counts_of_smaller_ones_in_the_row():
    ranks = operators.rank_in_row(T([[3.0, 1.0, 3.0, 2.0], [0.0, 0.0, 5.0, 0.0]]))
    assert ranks.tolist() == [
        [2, 0, 2, 1],
        [0, 0, 3, 0],
    ]


def test_the_probability_of_a_rank_goes_from_end_to_end():
    ranks = operators.rank_probability(T([0, 1, 2]), 3, T(0.5, dtype=torch.float64), T(0.2, dtype=torch.float64))
    assert ranks.tolist() == pytest.approx([0.3, 0.5, 0.7])
    assert operators.rank_probability(T([0, 2]), 3, numbers(1)[0], numbers(0)[0]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.3), (0.1, 0.1), (0.9, 0.0), (1.0, 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("width", [1, 2, 7, 300])
def test_dropping_by_rank_needs_no_ranks(density, epsilon, width):
    generator = torch.Generator().manual_seed(width)
    delta = torch.randn(40, width, generator=generator)
    delta[:, ::3] = delta[:, :1].clone()  # equals share a rank
    delta[5] = 0.0
    draws = torch.randint(0, LEVELS, delta.shape, generator=generator).float()
    p, e = numbers(density)[0], numbers(epsilon)[0]
    chance = operators.rank_probability(operators.rank_in_row(delta.abs()), width, p, e)
    expected = torch.where(draws < (chance * LEVELS).round(), delta, 0.0)
    assert torch.equal(delta * operators.kept_by_rank(delta, draws, p, e), expected)


def test_norms_are_matched_where_there_are_any():
    kept = [T([1.0, 0.0]), T([2.0, 2.0]), T([0.0, 0.0])]
    scaled = operators.norm_match(kept, numbers(3, 4, 5), numbers(1, 4, 0))
    assert [s.tolist() for s in scaled] == [[3.0, 0.0], [2.0, 2.0], [0.0, 0.0]]


def test_signs_are_elected_by_mass_or_by_heads_and_a_tie_is_positive():
    deltas = [T([3.0, -1.0, 1.0]), T([-1.0, -1.0, -1.0]), T([-1.0, 1.0, 0.0])]
    assert operators.elected_sign(deltas, "mass").tolist() == [1.0, -1.0, 1.0]
    assert operators.elected_sign(deltas, "count").tolist() == [-1.0, -1.0, 1.0]


def test_a_disjoint_sum_counts_only_those_that_agree():
    deltas, sign = [T([3.0, -1.0, 0.0]), T([1.0, 2.0, 0.0])], T([1.0, -1.0, 1.0])
    assert operators.disjoint_sum(deltas, numbers(1, 3), deltas, sign, False).tolist() == [6.0, -1.0, 0.0]
    assert operators.disjoint_sum(deltas, numbers(1, 3), deltas, sign, True).tolist() == [1.5, -1.0, 0.0]


def test_inner_products_norms_and_cosines():
    products = operators.gram([T([3.0, 0.0]), T([3.0, 4.0]), T([0.0, 0.0])])
    assert products.tolist() == [[9.0, 9.0, 0.0], [9.0, 25.0, 0.0], [0.0, 0.0, 0.0]]
    norms, cosine = operators.unit(products)
    assert norms.tolist() == [3.0, 5.0, 0.0]
    assert cosine[0, 1].item() == pytest.approx(0.6)
    assert cosine[2].tolist() == [0.0, 0.0, 0.0]


def test_the_factors_of_an_arc_and_of_a_line():
    first, second = operators.slerp_factors(numbers(0.0)[0], numbers(0.5)[0], operators.nearly_parallel)
    assert [float(first), float(second)] == pytest.approx([0.5**0.5, 0.5**0.5])
    first, second = operators.slerp_factors(numbers(0.9999)[0], numbers(0.25)[0], operators.nearly_parallel)
    assert [float(first), float(second)] == [0.75, 0.25]
