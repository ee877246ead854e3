"""The committed ratios of speed and memory are whole, and a ratio that has grown is found. Nothing is timed here."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import toys


@pytest.fixture(scope="module")
def ratios():
    sys.path.insert(0, str(toys.ROOT / "tests" / "benchmarks"))
    try:
        return importlib.import_module("ratios")
    finally:
        sys.path.pop(0)


def test_for_each_kind_of_processor_all_ratios_are_kept(ratios):
    kept = json.loads(ratios.KEPT.read_text())
    assert kept
    for found in kept.values():
        assert found.keys() == ratios.FACTORS.keys()
        assert all(ratio > 0 for ratio in found.values())
        assert ratios.grown(found, found) == []


def test_a_ratio_that_grows_by_more_than_its_factor_is_named(ratios):
    kept = dict.fromkeys(ratios.FACTORS, 2.0)
    for name, factor in ratios.FACTORS.items():
        assert factor > 1
        assert ratios.grown(kept, kept | {name: 2.0 * factor}) == []
        (said,) = ratios.grown(kept, kept | {name: 2.02 * factor})
        assert said.startswith(f"{name}: it was 2.00, is {2.02 * factor:.2f}")


def test_ratios_that_are_on_one_side_only_are_named(ratios):
    kept = dict.fromkeys(ratios.FACTORS, 2.0)
    name = ratios.OFFSPRING
    less = {n: r for n, r in kept.items() if n != name}
    assert ratios.grown(kept, less) == [f"{name}: it is kept, but was not measured"]
    assert ratios.grown(less, kept) == [f"{name}: it is 2.00, and the file does not hold it"]
