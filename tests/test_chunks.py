"""Expert Merging++: how parts are given to tensors, what they begin with, and a run."""

from __future__ import annotations

from collections import Counter

import pytest
from test_classification import classify  # noqa: F401  # a fixture
from test_descent import TAUGHT, configured, slopes  # noqa: F401  # a fixture
from test_search import build, simulate
from toys import run_here

from evolver.runs.history import read_history
from evolver.storage import storage_at

PLUS = {**TAUGHT, "items": 4, "steps": 5, "anchor": 0.0, "lr": 0.2, "chunks": 1.0}
RISING = slopes(lambda numbers: [-1.0] * len(numbers))


def searched(changes=None, shape=(8, 2), **settings):
    """A search over 12 tensors in 4 layers, whose task vectors have these sizes."""
    search = build({**PLUS, **settings}, experts=2, candidates=400)
    maker = search.setup.maker
    maker.shapes = dict.fromkeys([*maker.shapes, "head.w"], shape)
    sizes = dict.fromkeys(maker.shapes, (1.0, 1.0)) | (changes or {})
    maker.changes = lambda: sizes
    return search


def places_of(candidate):
    return Counter(rule.place.contains for rule in candidate.recipe.rules)


def weights_of(candidate):
    return {(rule.place.contains, rule.place.part): dict(rule.values)["weight"] for rule in candidate.recipe.rules}


def test_equal_tensors_have_a_part_each_and_go_on_from_what_was_learnt():
    found = simulate(searched(), reply=RISING)
    assert len(found) == 11
    assert places_of(found[4]) == {"": 5}  # what is outside, and four layers
    assert set(places_of(found[5]).values()) == {1}
    learnt, begun, ended = (weights_of(found[n]) for n in (4, 5, 10))
    assert begun["head.w", None] == ended["head.w", None] == pytest.approx((0.1, 0.1))
    inside = [name for name, _ in begun if name != "head.w"]
    assert len(inside) == 12
    for name in inside:
        assert begun[name, None] > list(learnt.values())[-1]  # by the last step of the first half
        assert ended[name, None] > begun[name, None]


def test_parts_by_hand():
    """Importances 6, 2, and ten times 0.4, of which the sum is 12: of 12 parts 6, 2 and none."""
    sizes = {f"model.layers.{i}.{part}": (0.4, 0.0) for i in range(4) for part in ("self_attn.w", "mlp.w", "w")}
    sizes |= {"model.layers.0.mlp.w": (3.0, 3.0), "model.layers.3.self_attn.w": (0.0, 2.0)}
    found = simulate(searched(sizes, lr=1e-9), reply=RISING)
    parts = places_of(found[5])
    assert parts.pop("model.layers.0.mlp.w") == 6
    assert parts.pop("model.layers.3.self_attn.w") == 2
    assert set(parts.values()) == {1}


def test_what_has_no_part_keeps_what_it_has():
    sizes = {f"model.layers.{i}.w": (1e-9, 0.0) for i in range(4)}
    found = simulate(searched(sizes), reply=RISING)
    begun, ended = weights_of(found[5]), weights_of(found[-1])
    still = {name for (name, part), weight in begun.items() if ended[name, part] == weight}
    assert still == {"head.w", *sizes}


@pytest.mark.parametrize(("power", "wanted"), [(0.0, 1), (1.0, 4), (3.0, 11)])
def test_a_power_sharpens_importance(power, wanted):
    """One tensor that counts 5.5 times as much as each other: 12·5.5/16.5 = 4, and 12·5.5³/(5.5³ + 11) = 11.26."""
    sizes = {"model.layers.0.mlp.w": (5.5, 5.5)}
    found = simulate(searched(sizes, (30, 2), lr=1e-9, power=power), reply=RISING)
    assert places_of(found[5])["model.layers.0.mlp.w"] == wanted


def test_a_tensor_has_no_more_parts_than_rows():
    found = simulate(searched(None, (3, 2), chunks=5.0), reply=RISING)
    assert {count for name, count in places_of(found[-1]).items() if name != "head.w"} == {3}
    assert places_of(found[-1])["head.w"] == 1


@pytest.mark.whole
def test_a_run_learns_in_two_halves(configured, tmp_path):  # noqa: F811
    search = {**PLUS, "items": 12, "hidden": 0.5, "chunks": 3.0}
    folder = run_here(configured(search, budget={"candidates": 30}), tmp_path / "results")
    *steps, (chosen, result) = read_history(storage_at(folder)).stages["search"]
    assert [r.status for _, r in steps] == ["ok"] * 10
    assert result.complete
    assert steps[-1][1].loss < steps[0][1].loss
    assert any(rule.place.part for rule in chosen.recipe.rules)
