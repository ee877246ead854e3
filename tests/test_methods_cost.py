"""The benchmark of what merge methods cost: its models, its kinds and limits, and its page."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
import toys
from safetensors.torch import save_file

from evolver.merging.methods import METHODS

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(toys.ROOT / "tests" / "benchmarks"))
    import methods_cost

SHAPES = {"embed": (40, 8), "a.weight": (8, 8), "b.weight": (12, 8), "c.weight": (8, 8), "norm": (8,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pool of a base and three experts, one file for each tensor."""
    pool, found = tmp_path_factory.mktemp("pool"), tmp_path_factory.mktemp("tensors")
    torch.manual_seed(0)
    for name in ("base", "x", "y", "z"):
        (pool / name).mkdir()
        more = {"head": torch.randn(3, 8)} if name == "x" else {}  # which the others lack
        save_file({n: torch.randn(s) for n, s in SHAPES.items()} | more, pool / name / "model.safetensors")
    methods_cost.write_pool(found, pool)
    return found


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_parts_are_of_methods_on_whole_tensors():
    assert all(METHODS[name].whole for name in methods_cost.PARTS)


def test_models_are_read_tensor_by_tensor(folder):
    models = methods_cost.Models(folder, METHODS["ties"], one_of_each_shape=False)
    assert (models.count, models.largest, models.size) == (3, 4 * 320, 320 + 64 + 96 + 64 + 8)
    assert {t.name: t.base.shape for t in models} == SHAPES
    assert len(list(methods_cost.Models(folder, METHODS["ties"], one_of_each_shape=True))) == 4
    assert methods_cost.Models(folder, METHODS["slerp"], one_of_each_shape=False).count == 2


@pytest.mark.parametrize("name", ["fisher", "regmean", "aim", "led"])
def test_methods_get_the_statistics_that_they_ask_for(folder, name):
    for tensors in methods_cost.Models(folder, METHODS[name], one_of_each_shape=False):
        assert tensors.statistics.keys() == METHODS[name].statistics.keys()
        assert all(s is None or len(s) == 3 for s in tensors.statistics.values())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("linear", "one pass"), ("nearswap", "one pass"), ("ties", "several passes"), ("fisher", "whole tensors"),
        ("tsv_m", "decompositions"), ("drm", "decompositions"), ("regmean", "decompositions"),
        ("do_merging", "gradient steps"),
    ],
)  # fmt: skip
def test_a_method_is_measured(folder, name, kind):
    found = methods_cost.measured(name, folder, large=False)
    count = METHODS[name].takes or 3
    assert found["kind"] == kind
    assert found["limit"] == 1280 * (count + 4) + (1 << 29)
    assert found["time"] == found["first"] / found["copy"] > 0
    assert ("torch" in found) == (name in methods_cost.PARTS)
    assert len(methods_cost.row(name, found)) == len(methods_cost.COLUMNS)
    large = methods_cost.measured(name, folder, large=True)
    assert ("time" in large) == (not METHODS[name].whole)


def test_passes_are_counted_without_holding_tensors(folder):
    models = methods_cost.Models(folder, METHODS["ties"], one_of_each_shape=False)
    merge, held = methods_cost.merging(METHODS["ties"], models.count), []
    with methods_cost.passes() as asked:
        for tensors in models:
            merge(tensors, None)
            held.append(weakref.ref(tensors.base))
    del tensors
    gc.collect()
    assert asked == ["order"] * len(SHAPES)
    assert not any(tensor() is not None for tensor in held)


def test_the_page_names_what_exceeds_a_limit():
    fine = {"kind": "one pass", "copy": 1.0, "first": 1.9, "again": 1.9, "time": 1.9, "peak": 5e6, "limit": 6e6}
    slow = fine | {"first": 2.1, "time": 2.1}
    wide = {"kind": "whole tensors", "peak": 7e6, "limit": 6e6}
    parted = fine | {"kind": "decompositions", "torch": 1.0, "time": 99.0}
    assert [methods_cost.broken(f) for f in (fine, slow, wide)] == [[], ["time"], ["memory"]]
    assert methods_cost.broken(parted) == ["time"]
    assert methods_cost.broken(parted | {"torch": 1.9}) == []
    text = methods_cost.page({"small": {"fine": fine, "slow": slow, "wide": wide}}, {"small": "Four models."})
    assert "## small\n\nFour models.\n\nOver a limit: `slow` (time), `wide` (memory)." in text
    assert "| `fine` | one pass | 1 | 1.9 | 1.9 |  | 1.9 |  | 2 | 5 | 6 |" in text
    assert "| `wide` | whole tensors |  |  |  |  |  |  |  | 7 | 6 |" in text


def test_the_large_model_has_three_gigabytes():
    assert sum(4 * math.prod(s) for s in methods_cost.shapes().values()) == pytest.approx(3e9, rel=0.03)


def test_the_large_model_is_written_and_measured(tmp_path, monkeypatch):
    for name, size in {"WIDTH": 8, "INNER": 12, "LAYERS": 2, "VOCABULARY": 20}.items():
        monkeypatch.setattr(methods_cost, name, size)
    methods_cost.write_large(tmp_path)
    models = methods_cost.Models(tmp_path, METHODS["linear"], one_of_each_shape=False)
    assert {t.name: t.base.shape for t in models} == methods_cost.shapes()
    assert all(0 < (i - t.base).abs().max() < 0.01 for t in models for i in t.inputs)
    found = {name: methods_cost.measured(name, tmp_path, large=True) for name in ("linear", "tsv_m")}
    assert found["linear"].keys() - found["tsv_m"].keys() == {"time", "first", "copy"}
    text = methods_cost.page(
        {methods_cost.LARGE: found}, {methods_cost.LARGE: methods_cost.said_of(methods_cost.LARGE, tmp_path)}
    )
    assert "A base and 3 experts" in text
    assert "only the memory, with one tensor of each shape" in text
