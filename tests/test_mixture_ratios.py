"""Weights of a merge as the ratio of a mixture."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolver.commands.explain import table
from evolver.records.recipe import Expert, Merge, Place, Rule
from evolver.report.mixture import mixture, mixtures_of


@pytest.mark.parametrize(
    ("settings", "ratio"),
    [
        ({"weight": (0.4, 0.3, 0.2, 0.1)}, "40 : 30 : 20 : 10"),
        ({"weight": (2.0, 1.0, 1.0), "normalize": True}, "50 : 25 : 25"),
        ({"weight": (1 / 3, 1 / 3, 1 / 3)}, "33.3 : 33.3 : 33.3"),
        ({"weight": (0.996, 0.004)}, "99.6 : 0.4"),
        ({"weight": (1.0, 0.0)}, "100 : 0"),
        ({"weight": (2.0, 1.0)}, None),
        ({"weight": (2.0, 1.0), "normalize": False}, None),
        ({"weight": (1.5, -0.5)}, None),
        ({"weight": 0.5, "normalize": True}, None),
        ({"weight": (0.0, 0.0), "normalize": True}, None),
        ({"weight": "tuned"}, None),
        ({"lambda": 1.0}, None),
    ],
)
def test_ratios(settings, ratio):
    assert mixture(settings) == ratio


@given(st.lists(st.floats(0.001, 1.0), min_size=2, max_size=12))
def test_percentages_are_rounded_ones(weights):
    shown = mixture({"weight": tuple(weights), "normalize": True}).split(" : ")
    near = 0.0500001 if "." in shown[0] else 0.5000001
    assert all(abs(float(p) - 100 * w / sum(weights)) <= near for p, w in zip(shown, weights, strict=True))
    assert "." in shown[0] or sum(map(int, shown)) == 100


def test_a_model_says_its_mixtures_by_place():
    a, b, base = Expert("a", "1"), Expert("b", "2"), Expert("base", "0")
    rules = (
        Rule.of({"weight": (0.25, 0.75), "lambda": 0.5}, Place(outside=True)),
        Rule.of({"weight": (0.5, 0.5)}, Place((0, 2), contains="mlp")),
        Rule.of({"density": 0.5}),
    )
    assert list(mixtures_of(Merge("ties", (a, b), base, rules))) == [
        "Its mixture outside the layers is a : b = 25 : 75.",
        "Its mixture in layers 0 to 1 for tensors with `mlp` is a : b = 50 : 50.",
    ]
    assert list(mixtures_of(a)) == []


def test_explain_prints_them():
    rows = [("w", "linear", {"weight": (3.0, 1.0), "normalize": True}), ("embed", "linear", {"weight": (3.0, 1.0)})]
    assert table(rows).splitlines() == [
        "w      linear  weight=[3, 1]  normalize=True  mixture=75 : 25",
        "embed  linear  weight=[3, 1]",
    ]
