"""The counter-based random function: against published answers and a second implementation in plain integers."""

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evolver.kernels import random
from evolver.kernels.random import BLOCK, HALVES, LANES, draws, philox4x32, threshold


def philox(counter, key):
    """Philox4x32-10 in Python's own integers (Salmon et al. 2011, section 3.3)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def one_draw(seed, name, offset):
    """The draw of one scalar, by the documented layout: eight runs of 1,024 scalars to a block, low half first."""
    stream = hashlib.sha256(name.encode()).digest()
    words = int.from_bytes(stream[:4], "little"), int.from_bytes(stream[4:8], "little")
    block, within = divmod(offset, 8192)
    half, lane = divmod(within, 1024)
    place = block * 1024 + lane
    out = philox((place & 0xFFFFFFFF, place >> 32, *words), (seed & 0xFFFFFFFF, seed >> 32))
    return (out[half // 2] >> 16 * (half % 2)) & 0xFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(counter, key, answer):
    words = philox4x32(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(w.item() for w in words) == answer
    assert tuple(philox(counter, key)) == answer


@given(st.integers(0, 2**64 - 1), st.text(max_size=8), st.integers(0, 2**33), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_draws_follow_the_documented_layout(seed, name, start, count):
    assert draws(seed, name, start, count).tolist() == [one_draw(seed, name, start + i) for i in range(count)]


def test_the_layout_is_as_documented():
    assert (HALVES, LANES, BLOCK) == (8, 1024, 8192)
    assert random.LEVELS == 1 << 16


@given(st.integers(0, 30_000), st.integers(1, 30_000))
@settings(max_examples=25, deadline=None)
def test_a_part_of_a_tensor_draws_what_the_whole_does(start, count):
    whole = draws(3, "w", 0, 60_000)
    assert torch.equal(draws(3, "w", start, count), whole[start : start + count])


def test_threads_change_nothing():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = draws(3, "w", 0, 200_000)
        torch.set_num_threads(4)
        assert torch.equal(draws(3, "w", 0, 200_000), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("seed", "name"), [(4, "w"), (3 + (1 << 32), "w"), (3, "v")])
def test_other_seeds_and_names_give_other_draws(seed, name):
    """Two independent streams agree at a scalar with probability 2^-16: 0.15 of 10,000 are expected to."""
    agree = (draws(seed, name, 0, 10_000) == draws(3, "w", 0, 10_000)).sum().item()
    assert agree < 10


def test_the_mean_is_that_of_the_uniform_distribution():
    """Mean 32767.5, standard deviation 65536 / √12 of one draw, by √n less of their mean: 5 of those are allowed."""
    n = 500_000
    mean = draws(1, "w", 0, n).double().mean().item()
    assert abs(mean - 32767.5) < 5 * 65536 / math.sqrt(12 * n)


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_a_threshold_is_passed_at_its_rate(probability):
    n = 500_000
    rate = (draws(2, "w", 0, n) < threshold(probability)).double().mean().item()
    assert abs(rate - probability) < 5 * math.sqrt(probability * (1 - probability) / n) + 2**-17


def test_thresholds_at_the_ends():
    assert threshold(0.0) == 0
    assert threshold(1.0) == 65536
    assert threshold(0.5) == 32768
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            threshold(bad)
