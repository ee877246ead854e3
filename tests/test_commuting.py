"""The page that says which merges commute, and what is known of some without a measurement."""

from __future__ import annotations

import pytest
import toys
from commuting import EQUAL, commuting_page, measured

from evolver.merging.methods import METHODS


def test_the_page_is_current():
    assert (toys.ROOT / "docs/commuting.md").read_text() == commuting_page(), "run: make docs"


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.takes != 1])
def test_methods_that_call_themselves_symmetric_commute(name):
    commutes, *_ = measured(name)
    assert commutes < EQUAL or not METHODS[name].symmetric


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("task_arithmetic", (True, True, True, False)),  # a sum
        ("simple", (True, False, False, True)),  # ((a + b)/2 + c)/2 is not (a + (b + c)/2)/2
        ("emr_max", (True, True, False, True)),  # in pairs the larger one
        ("slerp", (False, False, None, True)),
        ("wsm", (False, False, False, True)),
    ],
)
def test_what_is_known(name, known):
    assert tuple(None if d is None else d < EQUAL for d in measured(name)) == known
