"""Merge methods: the laws that all of them keep, and numbers that were worked out by hand."""

import itertools
import math
import re
import warnings
import zlib
from typing import Annotated

import pytest
import torch

from evolver.errors import BadInput
from evolver.merging import methods
from evolver.merging.engine import order
from evolver.merging.engine.apply import apply
from evolver.merging.engine.pieces import InputTensors
from evolver.merging.methods import METHODS, Of, Range, method, number
from evolver.merging.methods.here import Stack
from evolver.merging.settings.genome import genome
from evolver.records.recipe import Expert

EVERY = pytest.mark.parametrize("name", list(METHODS))
SHAPES = [(), (1,), (33,), (70, 50), (3, 4, 5)]
# How many models a method takes, where that is not any number; and settings without a default.
TAKES = {name: found.takes for name, found in METHODS.items() if found.takes}
REQUIRED = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.005}, "mwa": {"measured": 0.7}, "lm_cocktail": {"measured": 0.7}}
RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}


def experts_of(name, shape=(70, 50), count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator) * 0.05
    count = TAKES.get(name, count)
    return base.to(dtype), [(base + torch.randn(shape, generator=generator) * 0.01).to(dtype) for _ in range(count)]


def statistics_of(name, inputs, ids):
    """What a method asks for beside weights, one an expert's id; None where such a tensor has none."""
    asked = METHODS[name].statistics
    return {parameter: _statistic(of, inputs[0].shape, ids) for parameter, of in asked.items()}


def _statistic(of, shape, ids):
    seeds = [f"{of} {i}" for i in ids]
    if of.statistic in ("fisher", "importance"):
        return [torch.rand(shape, generator=_seeded(seed)).pow(4) for seed in seeds]
    if len(shape) != 2:
        return None
    drawn = [torch.randn((2 * shape[1], shape[1]), generator=_seeded(seed)) for seed in seeds]
    return [{"gram": x.T @ x, "activation": x.abs().mean(0)}[of.statistic] for x in drawn]


def _seeded(word):
    return torch.Generator().manual_seed(zlib.crc32(word.encode()))


def same(name, one, other):
    """Bit for bit, but for methods that say that they are not exact."""
    return torch.equal(one, other) if METHODS[name].exact else torch.allclose(one, other, atol=1e-6)


def merge(name, inputs, base, ids=None, piece=None, kernels=None, statistics=None, **given):
    """A method on one tensor, weights that sum to 1 unless others are given. A list begins anew after its end."""
    known = METHODS[name].settings
    given = {k: (v * len(inputs))[: len(inputs)] if isinstance(v, list) else v for k, v in given.items()}
    weight = {"weight": 1 / len(inputs)} if "weight" in known and "weight" not in given else {}
    values = METHODS[name].complete({**REQUIRED.get(name, {}), **weight, **given}, len(inputs), "here")
    ids = ids or [str(i) for i in range(len(inputs))]
    statistics = statistics_of(name, inputs, ids) if statistics is None else statistics
    whole = InputTensors("model.layers.1.w", inputs, base, ids, 1 / 3, statistics)
    return apply(METHODS[name], values, whole, piece=piece, kernels=kernels)


def variants(name):
    """The defaults, and settings under which a method does more."""
    known = METHODS[name].settings
    yield {}
    if "density" in known:
        yield {"density": 0.5}
    if "rescale" in known and "l2" in known["rescale"].choices:
        yield {"density": 0.3, "rescale": "l2"}
        yield {"density": 0.3, "rescale": "linf"}
    if "slack" in known:
        yield {"slack": 0.1, "density": 0.4}
        yield {"slack": 100.0, "trim_scope": "global", "sign": "count"}
    if "fading" in known:
        yield {"exponent": 0.7, "fading": [1.0, 0.2, 0.0], "floor": 0.2}
        yield {"exponent": -1.0, "fading": 1.0, "normalise": "mean"}
    if "bin_1" in known:
        yield {"bin_1": 0.0, "bin_3": 0.5, "bin_6": [2.0, 0.3, 1.0], "density": 0.3}
    if "parallel" in known:
        yield {"density": 0.5, "parallel": 0.7, "rescale": "none"}
        yield {"density": [0.3, 0.2, 1.0], "trim_scope": "tensor"}
    if "kind" in known:
        yield {"measured": [0.2, 0.4, 0.9], "kind": "score"}
    if "select_topk" in known:
        yield {"select_topk": 0.3}
        yield {"select_topk": 0.3, "mask_delta": False}
    if "match" in known:
        yield {"match": "l1", "beta": 0.5}
    if "clip" in known:
        yield {"clip": 0.05, "scope": "global", "inter": "sum"}
    if "filter_wise" in known:
        yield {"filter_wise": True}
    if "a" in known:
        yield {"a": 0.0}
        yield {"a": 1.0}
    if METHODS[name].whole:
        yield from ({s.name: option} for s in known.values() for option in s.options)
    if "flatten" in known:
        yield {"flatten": 0.5}
    if "smoothing" in known:
        yield {"smoothing": "linear", "keep": 0.3}
    if "nuslerp_flatten" in known:
        yield {"nuslerp_flatten": False, "nuslerp_row_wise": True, "task_vectors": True}


# They ask about the other tensors of a model, which have tests of their own.
OF_MODELS = {"scope", "trim_scope"}
# What a setting needs of others before it can do something, where neither defaults nor variants have it.
NEEDS = {
    "ramplus_tl": {"epsilon": 1e-2, "r": 0.5, "alpha": 0.5}, "frank": {"fading": 1.0, "exponent": 0.5},
    "nuslerp": {"nuslerp_flatten": False}, "karcher": {"tol": 1e-12}, "split_slerp": {"t": 0.3},
    "mwa": {"measured": [0.2, 0.4, 0.9]}, "lm_cocktail": {"measured": [0.2, 0.4, 0.9]},
}  # fmt: skip


def ends_of(setting, count):
    """Values of a setting between which a search may choose, or as far apart."""
    if setting.options:
        return setting.options
    if isinstance(setting.search, Range):
        return [[end] * count if setting.kind is tuple else end for end in (setting.search.low, setting.search.high)]
    return [[0.7, 0.2, 0.3], [0.1, 0.5, 0.9]] if setting.search else []


@EVERY
def test_no_setting_is_without_effect(name):
    """On matrices of full or of low rank, with the defaults or with others, what a search may choose changes bits."""
    known, ways = METHODS[name].settings, [*variants(name), NEEDS.get(name, {})]
    base, experts = experts_of(name, (24, 18))
    thin = [base + ((e - base) @ torch.ones((18, 1))).expand(24, 18) + 0.02 * (e - base) for e in experts]
    if "weight" in known:
        ways.append({"weight": [0.7, 0.1, 0.4]})
    for setting in known.values():
        ends = ends_of(setting, len(experts))
        found = not ends or setting.name in OF_MODELS
        for models, way in itertools.product((experts, thin), ways):
            rest = {key: value for key, value in way.items() if key != setting.name}
            found = found or not torch.equal(
                *(merge(name, models, base, **rest, **{setting.name: e}) for e in ends[:2])
            )
        assert found, setting.name


@EVERY
def test_experts_that_moved_nowhere_give_the_base(name):
    base, experts = experts_of(name)
    for more in variants(name):
        merged = merge(name, [base.clone() for _ in experts], base, **more)
        assert torch.allclose(merged, base, atol=1e-7), more


def without_mass(name):
    """Settings at which no delta counts; none for methods that weigh the deltas by themselves."""
    known = METHODS[name].settings
    return {k: 0.0 for k in ("lambda", "weight") if k in known} if METHODS[name].on_deltas else {}


@pytest.mark.parametrize("name", filter(without_mass, METHODS))
def test_no_mass_gives_the_base(name):
    base, experts = experts_of(name)
    assert torch.equal(merge(name, experts, base, **without_mass(name)), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.identity is not None])
def test_one_expert_at_mass_one_is_that_expert(name, dtype):
    """In bfloat16 to the bit; in float32 up to the rounding of base + (expert - base)."""
    found = METHODS[name]
    base, (one, *_) = experts_of(name, dtype=dtype)
    mass = {"lambda": 1.0} if "lambda" in found.settings else {}
    merged = merge(name, [one] * (found.takes or found.least), base, **mass, **found.identity)
    assert torch.allclose(merged, one, atol=1e-7) if dtype == torch.float32 else torch.equal(merged, one)


def test_too_few_models_are_refused():
    with pytest.raises(BadInput, match=r"^here: model_stock takes 2 models and more, not 1"):
        METHODS["model_stock"].complete({}, 1, "here")


def test_a_checked_recipe_is_not_checked_again(monkeypatch):
    checked = METHODS["ties"].complete({"density": 0.3, "weight": 0.5}, 3, "here")
    monkeypatch.setattr(methods, "_checked", lambda *_: pytest.fail("checked again"))
    assert METHODS["ties"].in_force(checked, 3) == checked
    assert METHODS["ties"].in_force({"density": checked["density"], "weight": checked["weight"]}, 3) == checked


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.symmetric])
def test_the_order_of_the_experts_does_not_matter(name):
    base, experts = experts_of(name)
    weights, names = [0.2, 0.3, 0.5], ["a", "b", "c"]
    for more in variants(name):
        results = []
        for places in itertools.permutations(range(3)):
            given = {"weight": weights} if "weight" in METHODS[name].settings else {}
            own = {k: [v[i] for i in places] if isinstance(v, list) else v for k, v in {**given, **more}.items()}
            ids = [names[i] for i in places]
            results.append(merge(name, [experts[i] for i in places], base, ids, **own))
        for other in results[1:]:
            assert torch.allclose(results[0], other, atol=1e-6), more


@EVERY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_and_dtype_are_kept_and_nothing_is_changed(name, shape):
    for dtype in (torch.float32, torch.bfloat16):
        base, experts = experts_of(name, shape, dtype=dtype)
        before = [t.clone() for t in (base, *experts)]
        for more in variants(name):
            merged = merge(name, experts, base, **more)
            assert merged.shape == shape, more
            assert merged.dtype == dtype
            assert merged.isfinite().all(), more
        assert all(torch.equal(a, b) for a, b in zip(before, (base, *experts), strict=True))


@EVERY
def test_repeats_pieces_and_threads_change_no_bit(name, monkeypatch):
    """A sum over a tensor is one in float64, so that not even its rounding shows in float32."""
    base, experts = experts_of(name, (300, 70))
    for more in variants(name):
        merged = merge(name, experts, base, **more)
        assert torch.equal(merge(name, experts, base, **more), merged)
        assert torch.equal(merge(name, experts, base, piece=777, **more), merged), more
        assert torch.equal(merge(name, experts, base, piece=8192, **more), merged), more
        for few in (order.FEW, 0):  # order statistics from a sample's brackets, or by counting
            with monkeypatch.context() as patch:
                patch.setattr(order, "DIRECT", 0)
                patch.setattr(order, "FEW", few)
                assert torch.equal(merge(name, experts, base, piece=4096, **more), merged), more
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert same(name, merge(name, experts, base, **more), merged), more
        finally:
            torch.set_num_threads(threads)


@EVERY
def test_every_method_names_its_paper_and_its_settings(name):
    assert any(c.isdigit() for c in METHODS[name].paper) or "mergekit" in METHODS[name].paper
    assert METHODS[name].function.__doc__
    values = METHODS[name].complete(REQUIRED.get(name, {}), TAKES.get(name, 3), "here")
    assert list(values) == list(METHODS[name].settings)
    for setting in METHODS[name].settings.values():
        assert type(values[setting.name]) is setting.kind
        if isinstance(setting.search, Range) and not setting.required:
            default = setting.default[0] if setting.kind is tuple else setting.default
            assert not setting.search.refuses(default)
            assert not setting.search.refuses(setting.search.low)
            assert not setting.search.refuses(setting.search.high)


@EVERY
def test_an_unknown_setting_is_refused(name):
    with pytest.raises(BadInput, match=rf"^here: {name} has no setting 'wieght'"):
        METHODS[name].complete({"wieght": 1.0, **REQUIRED.get(name, {})}, TAKES.get(name, 2), "here")


def one(name, deltas, base=None, **given):
    """A method on one vector an expert, given as deltas: the merged delta as a list."""
    stack = torch.tensor(deltas, dtype=torch.float32)
    base = torch.zeros(stack.shape[1:]) if base is None else torch.tensor(base, dtype=torch.float32)
    return [round(v, 5) for v in (merge(name, list(stack + base), base, **given) - base).reshape(-1).tolist()]


GOLDENS = [
    # (3 + 1)/2, (-1 + 2)/2
    ("simple", [[3, -1], [1, 2]], {}, [2, 0.5]),
    # (3·3 + 1·1)/4, (3·-1 + 1·2)/4
    ("linear", [[3, -1], [1, 2]], {"weight": [3, 1]}, [2.5, -0.25]),
    # not divided: 0.5·3 + 0.5·1
    ("linear", [[3, -1], [1, 2]], {"weight": 0.5, "normalize": False}, [2, 0.5]),
    # 2·(0.5·3 + 1·1)
    ("task_arithmetic", [[3, -1], [1, 2]], {"weight": [0.5, 1], "lambda": 2.0}, [5, 3]),
    # halves stay: 4, 3 and -4, 2; signs of 4 - 4 = 0 (+), 3, 2: [4], [3], [2]
    ("ties", [[4, 3, 1], [-4, 1, 2]], {"weight": 1.0, "density": 0.67}, [4, 3, 2]),
    # weights 1, 3: 3·1 against 1·-2: positive, (3·1)/1; and of 1, 1: (1 + 3)/4
    ("ties", [[3, 1], [-0.5, 1]], {"weight": [1, 3]}, [3, 1]),
    # by heads two say minus, by mass plus wins
    ("ties", [[5], [-1], [-2]], {"weight": 1.0, "sign": "count"}, [-1.5]),
    ("ties", [[5], [-1], [-2]], {"weight": 1.0, "sign": "mass"}, [5]),
    # weighted 1·2 against 3·-1: minus wins; raw 2 against -1: plus wins
    ("ties", [[2], [-1]], {"weight": [1, 3], "elect": "weighted"}, [-1]),
    ("ties", [[2], [-1]], {"weight": [1, 3], "elect": "raw"}, [2]),
    # of 4, 3, 2, 1 a quarter is too large, the next half stays
    ("breadcrumbs", [[4, 3, 2, 1]], {"gamma": 0.25, "density": 0.5, "weight": 1.0}, [0, 3, 2, 0]),
    ("breadcrumbs_ties", [[4, 3, 2, 1], [1, -2, 3, 4]], {"gamma": 0.25, "density": 0.5, "weight": 1.0}, [0, 3, 5, 0]),
    # L1 norm 10 before, 5 after
    ("breadcrumbs", [[4, 3, 2, 1]], {"gamma": 0.25, "density": 0.5, "weight": 1.0, "rescale": "l1"}, [0, 6, 4, 0]),
    # variances 0.5, 2, 0: half of the two that vary is one, the second; energies 9 : 1, weights 0.9, 0.1;
    # 0.9·3 + 0.1·1 over 0.9 + 0.1
    ("sce", [[1, 3, 7], [2, 1, 7]], {"select_topk": 0.5}, [0, 2.8, 0]),
    # first scalar moved by one, second by both, third by none
    ("ram", [[4, 2, 0], [0, 4, 0]], {"epsilon": 0.5}, [4, 3, 0]),
    # shared 1, unique 1 for the first expert: 1 + 0.5·min(1, 0.2) = 1.1
    ("ramplus_tl", [[4, 2, 0], [0, 4, 0]], {"epsilon": 0.5, "r": 0.5, "alpha": 0.2}, [4.4, 3, 0]),
    # sums 5, 5: |4| > 0.5·1 and not |1| > 0.5·4; |3| > 0.5·2 and |2| > 0.5·3
    ("consensus", [[4, 3], [1, 2]], {"weight": 1.0, "tall": 0.5, "agree": 2}, [0, 5]),
    ("consensus", [[4, 3], [1, 2]], {"weight": 1.0, "agree": 0}, [5, 5]),
    # halves: 4, 3 of the first and 4, 3 of the second; the second scalar is kept by both
    ("localize_and_stitch", [[4, 3, 2, 1], [1, 3, 4, 2]], {"density": 0.5}, [4, 3, 4, 0]),
    # twice (3·4 + 1)/4 and (3·3 + 7)/4; the last scalar is the second expert's alone
    (
        "localize_and_stitch",
        [[4, 3, 0], [1, 7, 6]],
        {"lambda": 2.0, "weight": (0.75, 0.25), "density": 1.0},
        [6.5, 8, 3],
    ),
    (
        "localize_and_stitch",
        [[4, 3, 0], [1, 7, 6]],
        {"lambda": 2.0, "weight": (0.75, 0.25), "density": 0.7},
        [8, 8, 12],
    ),
    ("emr_max", [[3, -1], [1, -4], [-2, 2]], {"lambda": 0.5}, [1.5, -2]),
    # layer 1 of 4: 0.5 + 1.5/3
    ("lines", [[2.0, 4.0]], {"alpha": 0.5, "beta": 1.5, "weight": 1.0}, [2, 4]),
    ("nearswap", [[3, -1, -5]], {"t": 2.0}, [2, -1, -2]),
    ("passthrough", [[3, -1]], {"scale": 2.0}, [6, -2]),
]


@pytest.mark.parametrize(("name", "deltas", "given", "wanted"), GOLDENS)
def test_numbers_worked_out_by_hand(name, deltas, given, wanted):
    assert one(name, deltas, **given) == pytest.approx(wanted, abs=1e-5)


HALF = math.sqrt(0.5)
SPHERES = [
    ("slerp", [[1, 0], [0, 1]], {"t": 0.5}, [HALF, HALF]),
    # a third of a right angle: cos 30°, sin 30°
    ("slerp", [[1, 0], [0, 1]], {"t": 1 / 3}, [math.cos(math.pi / 6), 0.5]),
    # weights 2 : 1 are t = 1/3
    ("nuslerp", [[1, 0], [0, 1]], {"weight": [2, 1]}, [math.cos(math.pi / 6), 0.5]),
    # mean direction at 45°, mean norm (1 + 3)/2
    ("multislerp", [[1, 0], [0, 3]], {}, [2 * HALF, 2 * HALF]),
    ("karcher", [[1, 0], [0, 3]], {}, [2 * HALF, 2 * HALF]),
    # weights 3 : 1 on the arc: 22.5° from the first
    ("karcher", [[1, 0], [0, 1]], {"weight": [3, 1]}, [math.cos(math.pi / 8), math.sin(math.pi / 8)]),
    # orthogonal deltas: the base
    ("model_stock", [[1, 0], [0, 1]], {}, [0, 0]),
    # deltas at 60°: c = 0.5, t = 2·0.5/1.5 = 2/3; the mean is (0.75, 0.433)
    ("model_stock", [[1, 0], [0.5, math.sqrt(0.75)]], {}, [0.5, math.sqrt(0.75) / 3]),
]


@pytest.mark.parametrize(("name", "models", "given", "wanted"), SPHERES)
def test_arcs_worked_out_by_hand(name, models, given, wanted):
    assert one(name, models, **given) == pytest.approx(wanted, abs=1e-4)


def test_pcb_by_hand():
    """Equal experts 1, 2: n = 0.5, 1; β = exp(2·n²)·2·tanh(n²) = 0.808, 11.26; the larger half is the second one."""
    assert one("pcb", [[1, 2], [1, 2]], density=0.5, weight=1.0, **{"lambda": 1.5}) == [0, 3]


def test_widen_by_hand():
    """One expert, ratio 0: the columns that moved more than the least count in full; the least has softmax 1, too."""
    base = [[1.0, 1.0], [0.0, 1.0]]
    moved = [[1.0, 3.0], [0.0, 0.0]]
    assert one("widen", [moved], base, ratio=0.0, calibration=0.5) == pytest.approx([1, 1.5, 0, 0])


def test_arcee_fusion_keeps_outliers_only():
    base, (expert,) = experts_of("arcee_fusion", (40, 40))
    merged = merge("arcee_fusion", [expert], base)
    changed = merged != base
    assert 0 < changed.float().mean() < 0.2
    assert torch.allclose(merged[changed], expert[changed], atol=1e-7)


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_about_the_density_stays_and_the_norm_is_kept(name):
    base, experts = experts_of(name, (200, 100), count=1)
    delta = experts[0] - base
    merged = merge(name, experts, base, density=0.4, weight=1.0) - base
    kept = (merged.abs() > 1e-9).float().mean().item()
    assert abs(kept - 0.4) < 4 * math.sqrt(0.24 / delta.numel())
    assert merged.abs().sum().item() == pytest.approx(delta.abs().sum().item(), rel=1e-4)


def test_the_papers_rescaling_expects_task_arithmetic():
    """E[mask/p] = 1: over 300 seeds the mean is within five standard errors of the delta, scalar by scalar."""
    base, experts = experts_of("dare_linear", (40,), count=1)
    delta = experts[0] - base
    given = {"density": 0.5, "rescale": "inv_p", "weight": 1.0}
    mean = torch.stack([merge("dare_linear", experts, base, seed=s, **given) - base for s in range(300)]).mean(0)
    assert ((mean - delta).abs() <= 5 * delta.abs() / math.sqrt(300) + 1e-6).all()


def test_della_prefers_the_large():
    base, experts = experts_of("della_linear", (400, 100), count=1)
    kept = merge("della_linear", experts, base, density=0.5, epsilon=0.4, weight=1.0, rescale="none") != base
    size = (experts[0] - base).abs()
    large = size > size.median(dim=1, keepdim=True).values
    assert kept[large].float().mean() - kept[~large].float().mean() > 0.3


# Known defects of mergekit 0.1.5, each with our answer.
def test_breadcrumbs_keeps_small_tensors():
    """With gamma·n below 1 nothing is too large, and the rest is treated as always."""
    assert one("breadcrumbs", [[4, 3, 2, 1]], density=0.5, gamma=0.01, weight=1.0) == [4, 3, 0, 0]


def test_ties_keeps_one_scalar_of_a_tiny_tensor():
    assert one("ties", [[1, 4, 2]], density=0.05, weight=1.0) == [0, 4, 0]


def test_della_cuts_epsilon_to_what_the_density_allows():
    base, experts = experts_of("della", (20, 30))
    assert merge("della", experts, base, density=0.05, epsilon=0.3).isfinite().all()
    assert merge("della", experts, base, density=0.95, epsilon=0.3).isfinite().all()
    assert torch.equal(
        merge("della", experts, base, density=0.75, epsilon=0.3),
        merge("della", experts, base, density=0.75, epsilon=0.25),
    )


def test_sce_without_variance_keeps_its_shape_and_gives_the_common_delta():
    assert one("sce", [[1, 2], [1, 2]], select_topk=0.5) == [1, 2]


def test_a_method_of_that_name_or_the_nearest():
    assert methods.get("ties", "here") is METHODS["ties"]
    with pytest.raises(BadInput, match=r"^here: unknown merge method 'tise'; did you mean 'ties'"):
        methods.get("tise", "here")


def test_defaults_are_filled_in_one_weight_an_expert():
    values = METHODS["ties"].complete({}, 3, "here")
    assert values["weight"] == values["density"] == (1.0, 1.0, 1.0)
    assert METHODS["linear"].complete({"weight": 2}, 2, "here")["weight"] == (2.0, 2.0)


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("ties", {"densty": 1.0}, "did you mean 'density'"),
        ("linear", {"weight": [1, 2, 3]}, "here.weight: 3 numbers for 2 experts"),
        ("linear", {"weight": "much"}, "here.weight: 'much' is not usable"),
        ("ties", {"density": 0}, "here.density: 0 is not usable; write a number above 0 and up to 1"),
        ("ties", {"density": [0.5, 1.5]}, "here.density: 1.5 is not usable"),
        ("ties", {"rescale": "l3"}, "here.rescale: unknown choice 'l3'"),
        ("ties", {"normalize": 1}, "here.normalize: 1 is not usable; write a value of type bool"),
        ("slerp", {}, "here.t: missing; slerp has no default for it"),
        ("slerp", {"t": 1.5}, "here.t: 1.5 is not usable; write a number from 0 and up to 1"),
        ("slerp", {"t": -0.1}, "here.t: -0.1 is not usable; write a number from 0 and up to 1"),
        ("linear", {"weight": math.nan}, "here.weight: nan is not usable"),
    ],
)
def test_bad_settings_are_named(name, given, says):
    with pytest.raises(BadInput, match=says.replace("[", r"\[").replace("(", r"\(")):
        METHODS[name].complete(given, 2, "here")


def test_another_number_of_models_is_refused():
    with pytest.raises(BadInput, match=r"^here: slerp takes 2 models, not 3\."):
        METHODS["slerp"].complete({"t": 0.5}, 3, "here")


def test_a_new_method_takes_one_function_and_nothing_else():
    from evolver.commands.reference import reference_page

    @method("Nobody 2026, Half the way")
    def halfway(deltas: torch.Tensor, *, share: Annotated[torch.Tensor, Range(0.1, 0.9)] = number(0.5)) -> torch.Tensor:
        """A share of the first delta."""
        return deltas[0] * share

    try:
        assert one("halfway", [[4.0]]) == [2]
        base = Expert("base", "b")
        space = genome(
            METHODS["halfway"],
            [Expert("a", "1"), Expert("c", "2")],
            base,
            ["model.layers.3.w"],
            1,
            ["share"],
            {},
            "search",
        )
        assert [(k.name, k.low, k.high) for k in space.knobs] == [("share", 0.1, 0.9)]
        assert "### halfway" in reference_page()
    finally:
        del METHODS["halfway"]


@pytest.mark.parametrize(
    ("signature", "more", "says"),
    [
        ("(tensors: Tensor)", {}, "its first parameter is called 'tensors'; call it models for weights, or deltas"),
        ("(models: Tensor, mass: Tensor)", {}, "its parameter 'mass' is no setting; make it keyword-only"),
        ("(models: Tensor, *, mass)", {}, "its parameter 'mass' is no setting"),
        ("(models: Tensor, *, deltas: Stack)", {}, "its parameter 'deltas' is no setting"),
        ("(deltas: Tensor)", {"whole": True, "rows": True}, "whole tensors are not cut into rows"),
        (
            "(models: Tensor, *, g: Annotated[Stack, Of('gram')])",
            {},
            "methods on whole tensors only; declare whole=True",
        ),
    ],
)
def test_a_signature_that_does_not_say_what_is_what_is_refused(signature, more, says):
    names = {"Tensor": torch.Tensor, "Annotated": Annotated, "Of": Of, "Stack": Stack}
    exec(f"def mistaken{signature}: ...", names)
    with pytest.raises(TypeError, match=f"^merge method mistaken: .*{re.escape(says)}"):
        method("Nobody 2026", **more)(names["mistaken"])
    assert "mistaken" not in METHODS


def test_whole_tensors_come_in_their_own_shape_and_in_float32():
    seen = []

    @method("Nobody 2026, Turned round", whole=True)
    def turned(deltas: Stack, *, share: Annotated[torch.Tensor, Range(0.1, 0.9)] = number(0.5)) -> torch.Tensor:
        """A share of the first delta."""
        seen.extend(deltas)
        return share * deltas[0]

    try:
        base, experts = experts_of("turned", (3, 5), dtype=torch.bfloat16)
        merged = merge("turned", experts, base)
    finally:
        del METHODS["turned"]
    assert [(t.shape, t.dtype) for t in seen] == [((3, 5), torch.float32)] * 3
    assert torch.equal(merged, (base.float() + 0.5 * (experts[0].float() - base.float())).to(torch.bfloat16))


def by_formula(models, grams, a):
    """RegMean as the paper writes it, in float64 and in its own layout: W is (inputs, outputs)."""
    left, right = 0.0, 0.0
    for model, gram in zip(models, grams, strict=True):
        scaled = gram.double().clone()
        for i, j in itertools.permutations(range(len(gram)), 2):
            scaled[i, j] *= a
        left, right = left + scaled, right + scaled @ model.double().T
    return (torch.linalg.inv(left) @ right).T


class TestRegMean:
    def given(self, count=3):
        base, models = experts_of("regmean", (9, 7), count)
        return base, models, statistics_of("regmean", models, [str(n) for n in range(count)])["gram"]

    @pytest.mark.parametrize("a", [0.0, 0.3, 0.9, 1.0])
    def test_is_the_formula(self, a):
        base, models, grams = self.given()
        merged = merge("regmean", models, base, a=a)
        assert torch.allclose(merged.double(), by_formula(models, grams, a), atol=1e-6)
        assert not torch.allclose(merged, sum(models) / 3, atol=1e-4)

    def test_equal_grams_give_the_mean(self):
        base, models, grams = self.given()
        merged = merge("regmean", models, base, statistics={"gram": [grams[0]] * 3})
        assert torch.allclose(merged, sum(models) / 3, atol=1e-6)

    def test_without_grams_it_is_the_mean(self):
        base, models, _ = self.given()
        assert torch.equal(merge("regmean", models, base, statistics={}), merge("simple", models, base))

    def test_one_expert_is_that_expert(self):
        base, (one,), _ = self.given(1)
        assert torch.equal(merge("regmean", [one], base), one)

    def test_without_what_is_off_the_diagonal_it_weighs_every_input(self):
        base, models, grams = self.given()
        weights = torch.stack([g.diagonal() for g in grams])
        wanted = (torch.stack(models) * weights[:, None]).sum(0) / weights.sum(0)
        assert torch.allclose(merge("regmean", models, base, a=0.0), wanted, atol=1e-6)

    def test_nothing_is_nearer_to_what_the_layers_do(self):
        """Least squares: every step away from the merge raises Σ |X W' - X W|²."""
        base, models, grams = self.given()
        merged = merge("regmean", models, base, a=1.0).double()

        def error(w):
            moved = [w - m.double() for m in models]
            return sum(torch.trace(d @ g.double() @ d.T) for d, g in zip(moved, grams, strict=True))

        steps = torch.randn((50, *merged.shape), generator=_seeded("steps"), dtype=torch.float64) * 1e-3
        assert all(error(merged + step) > error(merged) for step in steps)

    def test_what_no_input_determines_is_averaged(self):
        """Inputs 0, 1 and 2 are seen by the first model, 3 by the second, the others by none."""
        base, models, _ = self.given(2)
        grams = [torch.diag(torch.tensor([1.0, 2, 3, 0, 0, 0, 0])), torch.diag(torch.tensor([0.0, 0, 0, 4, 0, 0, 0]))]
        merged = merge("regmean", models, base, statistics={"gram": grams})
        assert torch.allclose(merged[:, :3], models[0][:, :3], atol=1e-6)
        assert torch.allclose(merged[:, 3], models[1][:, 3], atol=1e-6)
        assert torch.allclose(merged[:, 4:], (models[0] + models[1])[:, 4:] / 2, atol=1e-7)
        nothing = merge("regmean", models, base, statistics={"gram": [torch.zeros(7, 7)] * 2})
        assert torch.equal(nothing, merge("simple", models, base))

    def test_grams_of_few_inputs_are_solved(self):
        base, models, _ = self.given()
        rows = [torch.randn((2, 7), generator=_seeded(str(n))) * 10**n for n in range(3)]
        merged = merge("regmean", models, base, a=1.0, statistics={"gram": [x.T @ x for x in rows]})
        assert merged.isfinite().all()
        assert torch.allclose(rows[2] @ merged.T, rows[2] @ models[2].T, atol=1e-2)

    @pytest.mark.parametrize("name", ["regmean", "regmean_plus_plus"])
    def test_a_ridge_that_does_not_suffice_is_raised_and_said_so(self, name):
        base, models = experts_of(name, (5, 300), 2)
        x = torch.randn((3, 300), generator=_seeded("few"))
        grams = {"gram": [x.T @ x] * 2}  # their rounding is larger than the ridge
        with pytest.warns(UserWarning, match=r"singular.*larger statistics\.items or ridge"):
            merged = merge(name, models, base, a=1.0, ridge=1e-9, statistics=grams)
        assert torch.allclose(merged, sum(models) / 2, atol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merge(name, models, base, a=1.0, ridge=1e-3, statistics=grams)

    def test_what_is_no_gram_is_an_error(self):
        base, models, grams = self.given()
        for bad in (grams[0] * math.nan, -grams[0]):
            with pytest.raises(FloatingPointError, match="are not Gram matrices"):
                merge("regmean", models, base, statistics={"gram": [bad] * 3})
