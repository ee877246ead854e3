"""Merge methods with statistics: slow references in float64 written from the formulas, and exact identities."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_methods import _statistic, experts_of, merge

from evolver.merging.engine.apply import AllTensors, apply
from evolver.merging.engine.pieces import InputTensors
from evolver.merging.methods import METHODS

NAMES = ["0", "1", "2"]
WEIGHTS = [0.2, 0.3, 0.5]


def asked(name, shape, base=False):
    """The statistics that the tests of laws give to a method, of one parameter of it."""
    (of,) = (of for of in METHODS[name].statistics.values() if of.base == base)
    return _statistic(of, shape, NAMES)


def scalars(experts, base, *stacks):
    """Scalar by scalar: its place, the E deltas there, and the E of every other stack there, as numbers."""
    for place in itertools.product(*(range(n) for n in base.shape)):
        deltas = [float(e[place].double() - base[place].double()) for e in experts]
        yield place, deltas, *([float(t[place]) for t in stack] for stack in stacks)


@pytest.mark.parametrize("shape", [(9, 7), (33,), ()], ids=str)
@pytest.mark.parametrize(("floor", "power", "normalize"), [(1e-10, 1.0, False), (0.05, 0.5, False), (1e-6, 0.7, True)])
def test_fisher_is_the_formula(shape, floor, power, normalize):
    base, experts = experts_of("fisher", shape)
    information = asked("fisher", shape)
    given = {"weight": WEIGHTS, "lambda": 0.8, "floor": floor, "power": power, "normalize": normalize}
    merged = merge("fisher", experts, base, NAMES, **given)
    norms = [float(f.double().square().sum().sqrt()) if normalize else 1.0 for f in information]
    for place, deltas, sharp in scalars(experts, base, information):
        shares = [w / n * max(f, floor) ** power for w, n, f in zip(WEIGHTS, norms, sharp, strict=True)]
        wanted = 0.8 * sum(s * d for s, d in zip(shares, deltas, strict=True)) / sum(shares)
        assert float(merged[place] - base[place]) == pytest.approx(wanted, abs=2e-7)


def test_equal_information_gives_the_mean():
    base, experts = experts_of("fisher")
    (one, *_) = asked("fisher", base.shape)
    equal = {"information": [one] * 3}
    mean = merge("task_arithmetic", experts, base, weight=1 / 3)
    assert torch.allclose(merge("fisher", experts, base, statistics=equal), mean, atol=1e-7)
    weighed = merge("task_arithmetic", experts, base, weight=WEIGHTS)
    assert torch.allclose(merge("fisher", experts, base, statistics=equal, weight=WEIGHTS), weighed, atol=1e-7)
    assert torch.allclose(merge("fisher", experts, base, statistics={}), mean, atol=1e-7)
    assert torch.allclose(merge("fisher", experts, base, power=0.0), mean, atol=1e-7)
    none = {"information": [torch.zeros_like(one)] * 3}
    assert torch.allclose(merge("fisher", experts, base, statistics=none), mean, atol=1e-7)
    assert torch.equal(merge("fisher", experts, base, statistics=none, floor=0.0), base)


def test_an_expert_that_alone_is_informed_wins_and_scales_cancel():
    base, experts = experts_of("fisher")
    one, other, _ = asked("fisher", base.shape)
    alone = {"information": [one + 1, one * 0, one * 0]}
    assert torch.allclose(merge("fisher", experts, base, statistics=alone), experts[0], atol=1e-7)
    scaled = {"information": [one * 1000, other, one]}
    plain = {"information": [one, other, one]}
    by_norm = [merge("fisher", experts, base, statistics=s, normalize=True, floor=0.0) for s in (plain, scaled)]
    assert torch.allclose(*by_norm, atol=1e-7)


def test_parts_of_a_tensor_do_not_show(monkeypatch):
    from evolver.merging.methods import curvature

    for name in ("fisher", "ota"):
        base, experts = experts_of(name)
        whole = merge(name, experts, base)
        with monkeypatch.context() as patch:
            patch.setattr(curvature, "CHUNK", 777)
            assert torch.equal(merge(name, experts, base), whole)


@pytest.mark.parametrize(("density", "power"), [(0.3, 0.5), (1.0, 1.0), (0.6, 0.0)])
def test_ota_is_the_formula(density, power):
    base, experts = experts_of("ota", (9, 7))
    sharp = asked("ota", base.shape)
    merged = merge("ota", experts, base, NAMES, weight=WEIGHTS, density=density, power=power, **{"lambda": 1.7})
    scores = [f * (e - base).square() for f, e in zip(sharp, experts, strict=True)]
    kept = []
    for score in scores:
        best = sorted(score.flatten().tolist(), reverse=True)[: max(1, round(density * 63))]
        kept.append((score >= best[-1]).float())
        assert int(kept[-1].sum()) == len(best)
    for place, deltas, v, m in scalars(experts, base, sharp, kept):
        shares = [w * k * x**power for w, k, x in zip(WEIGHTS, m, v, strict=True)]
        wanted = 1.7 * sum(s * d for s, d in zip(shares, deltas, strict=True)) / (sum(shares) or 1.0)
        assert float(merged[place] - base[place]) == pytest.approx(wanted, abs=2e-7)


def test_the_masks_of_ota_are_shares_of_the_whole_model():
    """Three tensors, of which one has no statistics and is averaged; against one tensor that is the other two."""
    base, experts = experts_of("ota", (40, 60))
    sharp = asked("ota", base.shape)
    sharp = [torch.cat([f[:10] * 100, f[10:]]) for f in sharp]
    places = [slice(0, 10), slice(10, 40)]
    split = [
        InputTensors(
            f"t{k}", [e[p] for e in experts], base[p], NAMES, statistics={"information": [f[p] for f in sharp]}
        )
        for k, p in enumerate(places)
    ]
    bare = InputTensors("bare", [e[:10] for e in experts], base[:10], NAMES, statistics={"information": None})
    given = {"weight": WEIGHTS, "density": [0.2, 0.3, 0.1]}
    values = METHODS["ota"].complete(given, 3, "here")
    model = AllTensors(base.numel(), lambda: iter(split))
    merged = torch.cat([apply(METHODS["ota"], values, one, model) for one in split])
    whole = merge(
        "ota", experts, base, NAMES, statistics={"information": sharp}, weight=WEIGHTS, density=[0.2, 0.3, 0.1]
    )
    assert torch.equal(merged, whole)
    each = METHODS["ota"].complete({**given, "scope": "tensor"}, 3, "here")
    assert not torch.allclose(merged, torch.cat([apply(METHODS["ota"], each, one, model) for one in split]))
    more = AllTensors(base.numel() + bare.base.numel(), lambda: iter([bare, *split]))
    mean = merge("task_arithmetic", [e[:10] for e in experts], base[:10], weight=WEIGHTS)
    assert torch.allclose(apply(METHODS["ota"], values, bare, more), mean, atol=1e-7)


def test_ota_without_masks_and_powers_is_the_mean():
    base, experts = experts_of("ota")
    mean = merge("task_arithmetic", experts, base, weight=1 / 3)
    assert torch.allclose(merge("ota", experts, base, density=1.0, power=0.0), mean, atol=1e-7)


class TestBayes:
    def given(self):
        base, models = experts_of("bayes_mm", (9, 7))
        return base, models, asked("bayes_mm", base.shape)

    @pytest.mark.parametrize("name", ["bayes_mm", "bayes_mm_free"])
    @pytest.mark.parametrize(("mu", "a"), [(1e-3, 1.0), (0.5, 0.9), (20.0, 0.0)])
    def test_is_the_formula(self, name, mu, a):
        base, models, grams = self.given()
        merged = merge(name, models, base, NAMES, weight=WEIGHTS, mu=mu, a=a, **{"lambda": 0.7})
        taus = [(m.double() - base.double()) for m in models]
        grams = [t.T @ t for t in taus] if name == "bayes_mm_free" else [g.double() for g in grams]
        grams = [torch.where(torch.eye(7) > 0, g, a * g) for g in grams]
        anchor = sum(w * t for w, t in zip(WEIGHTS, taus, strict=True))
        total = sum(grams)
        prior = mu * total.trace() / 7
        left = sum(t @ g for t, g in zip(taus, grams, strict=True)) + prior * anchor
        wanted = base.double() + 0.7 * left @ torch.linalg.inv(total + prior * torch.eye(7))
        assert torch.allclose(merged.double(), wanted, atol=1e-6)

    def test_an_infinite_prior_is_the_anchor_and_none_is_regmean(self):
        base, models, _ = self.given()
        anchor = merge("task_arithmetic", models, base, weight=WEIGHTS)
        assert torch.allclose(merge("bayes_mm", models, base, weight=WEIGHTS, mu=1e9), anchor, atol=1e-7)
        regmean = merge("regmean", models, base, a=1.0, ridge=1e-9)
        assert torch.allclose(merge("bayes_mm", models, base, weight=WEIGHTS, mu=1e-9), regmean, atol=1e-6)
        assert not torch.allclose(regmean, anchor, atol=1e-4)

    def test_a_large_ridge_draws_regmean_to_the_mean(self):
        base, models, _ = self.given()
        far, near = (merge("regmean", models, base, a=1.0, ridge=r) for r in (1e-6, 1e9))
        assert torch.allclose(near, sum(models) / 3, atol=1e-7)
        assert not torch.allclose(far, near, atol=1e-4)


class TestAim:
    def test_is_the_formula(self):
        base, experts = experts_of("aim", (9, 7))
        used = asked("aim", base.shape, base=True)
        given = {"weight": WEIGHTS, "lambda": 1.3, "omega": 0.3, "power": 2.0}
        merged = merge("aim", experts, base, NAMES, **given)
        mean = [sum(float(u[c]) for u in used) / 3 for c in range(7)]
        for (row, column), deltas in scalars(experts, base):
            a = (mean[column] / max(mean)) ** 2
            wanted = 1.3 * sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True)) * (1 - a * 0.7)
            assert float(merged[row, column] - base[row, column]) == pytest.approx(wanted, abs=1e-7)

    def test_omega_of_one_is_the_identity_and_equal_inputs_scale_by_omega(self):
        base, experts = experts_of("aim", (9, 7))
        plain = merge("task_arithmetic", experts, base)
        assert torch.equal(merge("aim", experts, base, omega=1.0), plain)
        assert torch.equal(merge("aim", experts, base, statistics={}, omega=0.2), plain)
        equal = {"activation": [torch.ones(7)] * 3}
        found = merge("aim", experts, base, statistics=equal, omega=0.2)
        assert torch.allclose(found, merge("task_arithmetic", experts, base, **{"lambda": 0.2}), atol=1e-7)
        nothing = {"activation": [torch.zeros(7)] * 3}
        assert torch.equal(merge("aim", experts, base, statistics=nothing), plain)

    def test_over_a_merge_it_scales_that_merge(self):
        base, experts = experts_of("aim", (9, 7))
        inner = merge("ties", experts, base, density=0.5)
        one = {"activation": asked("aim", base.shape, base=True)[:1]}
        found = merge("aim", [inner], base, statistics=one, omega=0.0)
        a = one["activation"][0] / one["activation"][0].max()
        assert torch.allclose(found - base, (inner - base) * (1 - a), atol=1e-7)


class TestLed:
    def given(self, shape=(9, 7)):
        base, experts = experts_of("led", shape)
        return base, experts, asked("led", shape), asked("led", shape, base=True)

    @pytest.mark.parametrize("disjoint", ["drop", "keep"])
    def test_is_the_formula(self, disjoint):
        base, experts, own, old = self.given()
        density = [0.2, 0.5, 0.7]
        given = {"weight": WEIGHTS, "lambda": 2.0, "density": density, "disjoint": disjoint}
        merged = merge("led", experts, base, NAMES, **given)

        def located(scores, share):
            best = sorted(range(63), key=lambda place: -float(scores.flatten()[place]))
            return set(best[: round(share * 63)])

        elected = [located(o, r) & located(b, r) for o, b, r in zip(own, old, density, strict=True)]
        assert elected[1] & elected[2]
        for (row, column), deltas in scalars(experts, base):
            place, wanted = row * 7 + column, 0.0
            for i, delta in enumerate(deltas):
                others = set().union(*(e for j, e in enumerate(elected) if j != i))
                if place in elected[i] and (disjoint == "keep" or place not in others):
                    wanted += 2.0 * WEIGHTS[i] * delta
            assert float(merged[row, column] - base[row, column]) == pytest.approx(wanted, abs=1e-7)

    def test_everything_elected_and_kept_is_task_arithmetic_and_dropped_the_base(self):
        base, experts, *_ = self.given()
        plain = merge("task_arithmetic", experts, base)
        assert torch.equal(merge("led", experts, base, density=1.0, disjoint="keep"), plain)
        assert torch.equal(merge("led", experts, base, density=1.0), base)
        assert torch.equal(merge("led", experts, base, statistics={}), plain)
