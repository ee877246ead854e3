"""Order statistics by counting, against sorting."""

import pytest
import torch

from evolver.merging import order


def wanted(row, rank):
    if rank <= 0:
        return torch.inf
    return 0.0 if rank >= len(row) else row.sort(descending=True).values[rank - 1].item()


def pieces(scores, step):
    return lambda: iter(scores.split(step, dim=1))


CONTENTS = {
    "random": lambda n: torch.rand(2, n, generator=torch.Generator().manual_seed(1)),
    "wide": lambda n: torch.randn(2, n, generator=torch.Generator().manual_seed(2)).mul(9).exp(),
    "equal": lambda n: torch.full((2, n), 0.25),
    "zeros": lambda n: torch.zeros(2, n),
    "few values": lambda n: torch.randint(0, 3, (2, n), generator=torch.Generator().manual_seed(3)).float(),
    "tiny": lambda n: torch.rand(2, n, generator=torch.Generator().manual_seed(4)) * 1e-41,
}


@pytest.mark.parametrize("few", [1 << 22, 10], ids=["taken out", "counted again"])
@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("size", [1, 2, 17, 5000])
def test_it_is_what_sorting_finds(kind, size, few, monkeypatch):
    monkeypatch.setattr(order, "FEW", few)
    scores = CONTENTS[kind](size)
    ranks = [[0, 1, size // 2, size - 1, size, size + 5], [1, 1, 2, max(1, size // 3), size, 0]]
    found = order.kth_largest(pieces(scores, 700), ranks, size)
    for row, line, got in zip(scores, ranks, found, strict=True):
        assert got.tolist() == [wanted(row, rank) for rank in line]
