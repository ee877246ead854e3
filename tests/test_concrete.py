"""Concrete subspaces: the mask's slopes against torch, coefficients by hand, gradients by parts, and a run."""

from __future__ import annotations

import math

import pytest
import torch
import toys
from test_classification import classify  # noqa: F401  # a fixture
from test_descent import configured, ready_of, slopes  # noqa: F401  # a fixture
from test_search import build, simulate
from toys import run_here

from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.records import Candidate
from evolver.records.loss import UnlabelledLoss
from evolver.records.recipe import Merge, Place, Rule, layer_of
from evolver.runs.history import read_history
from evolver.search.descent.places import tensor_places
from evolver.storage import storage_at
from evolver.workers.worker import Worker

CONCRETE = {"algorithm": "concrete", "steps": 6, "items": 12, "lr": 0.1}


def masked(**more):
    """A search over 12 tensors of 3 rows, which is built but not begun."""
    return build({**CONCRETE, "items": 4, **more}, experts=2, candidates=400)


@pytest.mark.parametrize("parts", [1, 2])
def test_slopes_of_the_mask_are_those_of_torch(parts):
    search = masked(parts=parts, per="model")
    draw = torch.Generator().manual_seed(0)
    count = len(search.masked)
    assert count == 12 * parts
    search.logits = torch.randn(count, generator=draw, dtype=torch.float64).tolist()
    wanted = torch.randn(count, generator=draw, dtype=torch.float64)
    x = torch.tensor(search.logits, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([float(found.size) for found in search.masked], dtype=torch.float64)
    m = (x / 0.5).sigmoid()
    scaled = m / ((sizes * m).sum() / sizes.sum())
    (slope,) = torch.autograd.grad((scaled * wanted).sum(), x)
    mask = search.mask(None)
    assert mask == pytest.approx(m.tolist(), rel=1e-12)
    assert search.scaled(mask) == pytest.approx(scaled.tolist(), rel=1e-12)
    assert search.slopes(mask, wanted.tolist()) == pytest.approx(slope.tolist(), rel=1e-9, abs=1e-15)


def test_a_mask_that_knows_nothing_is_task_arithmetic():
    """All logits are 0 in the end, so that m/mean(m) is 1."""
    found = simulate(masked(), reply=slopes(lambda numbers: [0.0] * len(numbers)))
    assert len(found) == 7
    weights = [dict(rule.values)["weight"] for rule in found[-1].recipe.rules]
    assert [w for own in weights for w in own] == pytest.approx([0.3] * 24, abs=1e-8)


def test_steps_draw_masks_whose_mean_is_one():
    found = simulate(masked(parts=3), reply=slopes(lambda numbers: [0.0] * len(numbers)))
    drawn = [[dict(rule.values)["weight"][0] for rule in c.recipe.rules] for c in found[:-1]]
    for masks in drawn:
        assert math.fsum(masks) / len(masks) == pytest.approx(0.3, abs=1e-7)
        assert max(masks) > 1.3 * min(masks)
    assert len(set(map(tuple, drawn))) == 6


@pytest.mark.parametrize("learn", [False, True])
def test_a_mask_leaves_out_what_does_harm(learn):
    """Of two experts in four layers, the loss rises with every coefficient of the MLPs and falls with the others."""
    search = masked(steps=60, learn=learn, after=20, inner=0.001)
    harm = ["mlp" in found.name for found in search.masked for _ in range(2)]
    found = simulate(search, reply=slopes(lambda _: [1.0 if bad else -1.0 for bad in harm]))
    assert len(found) == (141 if learn else 61)
    for rule in found[-1].recipe.rules:
        bad = "mlp" in rule.place.contains
        assert all((w < 0.1) if bad else (w > 0.35) for w in dict(rule.values)["weight"])


def test_learnt_coefficients_go_down_by_the_slope_before_the_mask_moves():
    """By hand: λ ← 0.3 - inner·Σ m̂·g in the even steps, with the mask of the odd one that follows."""
    search = masked(learn=True, steps=1, after=0, inner=0.1, per="model")
    found = simulate(search, reply=slopes(lambda numbers: [0.02 * (1 + i % 2) for i in range(len(numbers))]))
    first, second = ([dict(rule.values)["weight"] for rule in c.recipe.rules] for c in found[:2])
    scaled = [own[0] / 0.3 for own in first]
    lowered = [0.3 - 0.1 * 0.02 * (1 + e) * math.fsum(scaled) for e in range(2)]
    for own, m in zip(second, scaled, strict=True):
        assert own == pytest.approx([m * x for x in lowered], abs=1e-7)


def test_gradients_of_parts_add_up_to_those_of_tensors_and_layers(configured):  # noqa: F811
    ready = ready_of(configured())
    worker, loss = Worker(ready.plan, "dev", tasks=ready.tasks), UnlabelledLoss("entropy")
    shapes = ready.maker.shapes

    def gradient(places):
        rules = tuple(Rule.of({"weight": (0.4, 0.2)}, place) for place in places)
        recipe = Merge("task_arithmetic", ready.experts, ready.base, rules)
        found = worker.evaluate(Candidate(0, recipe, "test").asking(limit=12, order="some", loss=loss))
        assert found.status == "ok", found.reason
        return [found.gradient[i : i + 2] for i in range(0, len(found.gradient), 2)]

    by_layer = gradient([Place(outside=True), *(Place(layers=(n, n + 1)) for n in range(2))])
    for parts in (1, 3):
        finer = tensor_places(shapes, dict.fromkeys(shapes, parts))
        found = gradient([one.place for one in finer])
        for expert in range(2):
            sums = [0.0] * 3
            for one, slope in zip(finer, found, strict=True):
                sums[0 if (layer := layer_of(one.name)) is None else 1 + layer] += slope[expert]
            assert sums == pytest.approx([slope[expert] for slope in by_layer], rel=1e-4, abs=1e-6)


def test_places_of_tensors_whose_names_hold_others_come_later():
    shapes = {"decoder.shared.w": (4, 2), "shared.w": (4, 2), "layers.1.w": (1,), "layers.11.w": ()}
    found = tensor_places(shapes, dict.fromkeys(shapes, 3))
    for name in shapes:
        covering = [one.name for one in found if one.place.covers(name, layer_of(name))]
        assert covering[-1] == name
        assert sum(one.size for one in found if one.name == name) == math.prod(shapes[name])
    assert [one.place.part for one in found if one.name == "shared.w"] == [(0, 3), (1, 3), (2, 3)]
    assert [one.place.part for one in found if one.name.startswith("layers")] == [None, None]


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"lr": 0}, "search.lr"), ({"parts": 0}, "search.parts"), ({"temperature": 0}, "search.temperature")],
)
def test_bad_settings_are_refused(configured, changes, said):  # noqa: F811
    toys.refused(lambda: prepare(config_at(configured({**CONCRETE, **changes}))), said)


@pytest.mark.whole
@pytest.mark.parametrize("changes", [{"parts": 2, "loss": "distillation"}, {"learn": True, "after": 4, "inner": 0.1}])
def test_a_run_leaves_a_recipe_of_fixed_numbers(configured, tmp_path, changes):  # noqa: F811
    search = {**CONCRETE, "redraw": False, **changes}
    folder = run_here(configured(search, budget={"candidates": 30}), tmp_path / "results")
    searched = read_history(storage_at(folder)).stages["search"]
    *steps, (chosen, result) = searched
    assert all(r.status == "ok" and r.loss is not None for _, r in steps)
    assert len(steps) == (16 if "learn" in changes else 6)
    assert result.complete
    assert chosen.recipe.method == "task_arithmetic"
    assert len(chosen.recipe.rules) >= 20
    again = run_here(configured(search, budget={"candidates": 30}), tmp_path / "again")
    assert read_history(storage_at(again)).stages["search"][-1][0].recipe.id == chosen.recipe.id
