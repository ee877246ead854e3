"""Order statistics, against sorting."""

import pytest
import torch

from evolver.merging.engine import order


def wanted(row, rank):
    if rank <= 0:
        return torch.inf
    return 0.0 if rank >= len(row) else row.sort(descending=True).values[rank - 1].item()


class Stream:
    """Scores (C, n) in pieces."""

    def __init__(self, scores, step, sampled=slice(None)):
        self.scores, self.step, self.sampled, self.size = scores, step, sampled, scores.shape[1]

    def sample(self, count):
        part = self.scores[:, self.sampled]
        return part[:, order.spread(count, part.shape[1])]

    def pieces(self):
        return (piece.unbind(0) for piece in self.scores.split(self.step, dim=1))

    def taken(self, edges):
        return (order.take(piece, edges) for piece in self.pieces())


CONTENTS = {
    "random": lambda n: torch.rand(2, n, generator=torch.Generator().manual_seed(1)),
    "wide": lambda n: torch.randn(2, n, generator=torch.Generator().manual_seed(2)).mul(9).exp(),
    "equal": lambda n: torch.full((2, n), 0.25),
    "zeros": lambda n: torch.zeros(2, n),
    "few values": lambda n: torch.randint(0, 3, (2, n), generator=torch.Generator().manual_seed(3)).float(),
    "tiny": lambda n: torch.rand(2, n, generator=torch.Generator().manual_seed(4)) * 1e-41,
}


RANKS = [[0, 1, 2500, 4999, 5000, 5005], [1, 1, 2, 1666, 5000, 0]]


def check(stream, ranks):
    found = order.kth_largest(stream, ranks)
    for row, line, got in zip(stream.scores, ranks, found, strict=True):
        assert got.tolist() == [wanted(row, rank) for rank in line]


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("size", [1, 2, 17, 5000])
def test_it_is_what_sorting_finds(kind, size):
    check(Stream(CONTENTS[kind](size), 700), [[min(r, size + 5) for r in row] for row in RANKS])


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("few", [1 << 20, 10], ids=["between edges", "counted by bits"])
@pytest.mark.parametrize("sampled", [slice(None), slice(0, 40)], ids=["fair sample", "misleading sample"])
def test_it_is_what_sorting_finds_without_holding_all(kind, few, sampled, monkeypatch):
    monkeypatch.setattr(order, "DIRECT", 0)
    monkeypatch.setattr(order, "SAMPLE", 900)
    monkeypatch.setattr(order, "FEW", few)
    scores = CONTENTS[kind](5000).sort(dim=1).values  # so that the first ones say nothing about the rest
    check(Stream(scores, 700, sampled), RANKS)


def test_with_a_fair_sample_few_are_held(monkeypatch):
    monkeypatch.setattr(order, "_counted", lambda scores, ranks, wanted: {} if not wanted else pytest.fail("missed"))
    monkeypatch.setattr(order, "DIRECT", 0)
    monkeypatch.setattr(order, "FEW", 25_000)  # of a million each
    monkeypatch.setattr(order, "SIGMAS", 4.0)
    stream = Stream(torch.rand(2, 10**6, generator=torch.Generator().manual_seed(5)), 1 << 16)
    check(stream, [[300_000], [999_000]])


def test_places_are_spread_over_all():
    places = order.spread(1000, 64_000)
    assert torch.equal(places // 64, torch.arange(1000))
    assert len((places % 64).unique()) > 60
    assert torch.equal(order.spread(9, 5), torch.arange(5))
