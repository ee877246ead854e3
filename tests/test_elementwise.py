"""Data-free methods that work scalar by scalar, against slow float64 references written from the formulas."""

from __future__ import annotations

import pytest
import torch
from test_methods import experts_of, merge, one


def deltas_of(experts, base):
    return [e.double() - base.double() for e in experts]


def trimmed(delta, density):
    """Zero but for the largest share; ties stay."""
    count = max(1, int(density * delta.numel()))
    return torch.where(delta.abs() >= delta.abs().flatten().sort(descending=True).values[count - 1], delta, 0.0)


# --- TIES with slack


def by_slack(deltas, weight, density, slack, protected):
    """Scalar by scalar, as the reading in docs/methods-elementwise.md says."""
    kept = [trimmed(d, density).flatten().tolist() for d in deltas]
    deviations = [d.std(correction=0).item() for d in deltas]
    out = []
    for scalars in zip(*kept, strict=True):
        sign = 1 if sum(w * v for w, v in zip(weight, scalars, strict=True)) >= 0 else -1
        winners = sum(abs(v) for v in scalars if v * sign > 0)
        stays = [
            v != 0 and (v * sign > 0 or (slack * p > 0 and abs(v) + slack * p * d >= winners))
            for v, p, d in zip(scalars, protected, deviations, strict=True)
        ]
        own = [(w, v) for w, v, s in zip(weight, scalars, stays, strict=True) if s]
        out.append(sum(w * v for w, v in own) / (sum(w for w, _ in own) or 1.0))
    return torch.tensor(out, dtype=torch.float64).view(deltas[0].shape)


@pytest.mark.parametrize("slack", [0.0, 0.05, 1.0, 100.0])
@pytest.mark.parametrize("protected", [[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
def test_slack_is_the_reading(slack, protected):
    base, experts = experts_of("ties_slack", (20, 15))
    weight = [0.2, 0.3, 0.5]
    given = {"weight": weight, "density": 0.6, "slack": slack, "protected": protected, "lambda": 0.7}
    merged = merge("ties_slack", experts, base, **given)
    wanted = 0.7 * by_slack(deltas_of(experts, base), weight, 0.6, slack, protected)
    assert torch.allclose(merged.double() - base.double(), wanted, atol=1e-7)


@pytest.mark.parametrize("more", [{}, {"density": 0.3, "trim_scope": "global", "elect": "raw"}, {"sign": "count"}])
@pytest.mark.parametrize("off", [{"slack": 0.0}, {"protected": 0.0}])
def test_without_slack_it_is_ties(more, off):
    base, experts = experts_of("ties_slack", (70, 50))
    more = more | {"weight": [0.2, 0.3, 0.5], "lambda": 1.3}
    assert torch.equal(merge("ties_slack", experts, base, **off, **more), merge("ties", experts, base, **more))


def test_a_protected_expert_with_much_slack_is_never_outvoted():
    """-1 loses against 3 and stays, and so the two are averaged; a trimmed scalar of it does not come back."""
    given = {"weight": 1.0, "protected": [0, 1], "slack": 1000.0}
    assert one("ties_slack", [[3, 3, 1], [-1, 1, 2]], **given) == [1, 2, 1.5]
    assert one("ties_slack", [[3, 3, 1], [-1, 1, 2]], density=0.4, **given) == [3, 3, 2]
