"""Data-free methods that work scalar by scalar, against slow float64 references written from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from test_methods import experts_of, merge, one

from evolver.errors import BadInput
from evolver.merging.engine.apply import AllTensors, apply
from evolver.merging.engine.pieces import InputTensors
from evolver.merging.methods import METHODS


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


# --- FRANK


def by_frank(deltas, weight, exponent, fading, alpha, floor, normalise, depth):
    """A loop over the experts, with the prior as a table of shares that sum to 1."""
    count, norms = len(deltas), [d.norm().item() for d in deltas]
    left = floor + (1 - floor) * math.exp(-alpha * depth)
    if normalise == "mean":  # the mean by the trapezoid rule
        steps = 20000
        points = [floor + (1 - floor) * math.exp(-alpha * k / steps) for k in range(steps + 1)]
        left /= (sum(points) - 0.5 * (points[0] + points[-1])) / steps
    freed = sum(f * (1 - left) for f in fading) / count
    takers = sum(1 - f for f in fading)
    prior = [(1 - f * (1 - left)) / count + (freed * (1 - f) / takers if takers else 0) for f in fading]
    raw = [w * max(0.0, p) * n**exponent for w, p, n in zip(weight, prior, norms, strict=True)]
    return sum(r / sum(raw) * d for r, d in zip(raw, deltas, strict=True))


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 0.5, 2.0])
@pytest.mark.parametrize("fading", [[0, 0, 0], [1, 0, 0], [0.7, 0.2, 0], [1, 1, 1]])
@pytest.mark.parametrize("normalise", ["max", "mean"])
def test_frank_is_the_formula(exponent, fading, normalise):
    base, experts = experts_of("frank", (12, 11))
    experts = [base + k * (e - base) for k, e in zip((1, 2, 5), experts, strict=True)]
    given = {"weight": [0.2, 0.3, 0.5], "exponent": exponent, "fading": fading, "floor": 0.1, "normalise": normalise}
    merged = merge("frank", experts, base, alpha=4.0, **given, **{"lambda": 0.7})  # a third of the way down
    wanted = by_frank(deltas_of(experts, base), given["weight"], exponent, fading, 4.0, 0.1, normalise, 1 / 3)
    assert torch.allclose(merged.double() - base.double(), 0.7 * wanted, atol=1e-7)


@pytest.mark.parametrize("normalise", ["max", "mean"])
def test_frank_without_exponent_and_decay_is_the_average(normalise):
    base, experts = experts_of("frank", (12, 11))
    merged = merge("frank", experts, base, exponent=0.0, alpha=0.0, fading=[1, 0, 0], normalise=normalise)
    assert torch.allclose(merged, sum(experts) / 3, atol=1e-7)


@pytest.mark.parametrize("given", [{}, {"exponent": -1.0}, {"fading": [0, 1, 0]}, {"fading": 1.0, "normalise": "mean"}])
def test_the_weights_of_frank_sum_to_one(given):
    """Along a direction in which all experts moved alike nothing is lost."""
    base, experts = experts_of("frank", (12, 11))
    common = [torch.cat([e, base + 0.3]) for e in experts]
    merged = merge("frank", common, torch.cat([base, base]), **given)
    assert torch.allclose(merged[12:], base + 0.3, atol=1e-6)


def test_at_minus_one_all_experts_move_a_tensor_equally_far():
    base, experts = experts_of("frank", (12, 11))
    experts = [base + k * (e - base) for k, e in zip((1, 20, 5), experts, strict=True)]
    merged = (merge("frank", experts, base, exponent=-1.0) - base).double()
    deltas = deltas_of(experts, base)
    parts = torch.linalg.lstsq(torch.stack([d.flatten() for d in deltas], 1), merged.flatten()).solution
    moves = [(p * d.norm()).item() for p, d in zip(parts, deltas, strict=True)]
    assert moves == pytest.approx([moves[0]] * 3, rel=1e-4)
    assert parts.sum().item() == pytest.approx(1.0, rel=1e-4)


def test_an_expert_that_did_not_move_a_tensor_has_no_part_in_it():
    base, experts = experts_of("frank", (12, 11), count=2)
    for exponent in (-1.0, 2.0):
        merged = merge("frank", [base, experts[0]], base, exponent=exponent)
        assert torch.allclose(merged, experts[0], atol=1e-7)


# --- Checkpoints of one run


def by_decay(models, weights):
    """The first checkpoint, and every step from one to the next times its own factor."""
    return models[0] + sum(w * (b - a) for w, a, b in zip(weights, models[:-1], models[1:], strict=True))


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_wsm_makes_every_step_count_as_the_decay_says(power, count):
    base, experts = experts_of("wsm", (20, 15), count)
    wanted = by_decay([e.double() for e in experts], [1 - (j / count) ** power for j in range(1, count)])
    assert torch.allclose(merge("wsm", experts, base, power=power).double(), wanted, atol=1e-7)


def test_wsm_at_one_is_the_mean_and_far_above_the_last_checkpoint():
    base, experts = experts_of("wsm", (20, 15), 5)
    assert torch.allclose(merge("wsm", experts, base, power=1.0), sum(experts) / 5, atol=1e-7)
    assert torch.allclose(merge("wsm", experts, base, power=500.0), experts[-1], atol=1e-7)
    assert torch.allclose(merge("wsm", [experts[0]] * 5, base), experts[0], atol=1e-7)


def test_the_base_of_wsm_does_not_matter_at_mass_one():
    base, experts = experts_of("wsm", (20, 15), 4)
    assert torch.allclose(merge("wsm", experts, base), merge("wsm", experts, torch.zeros_like(base)), atol=1e-7)


# --- Weights from what was measured

LOSSES = [0.5, 2.0, 1.0]


@pytest.mark.parametrize(
    ("name", "given", "raw"),
    [
        ("mwa", {}, [2.0, 0.5, 1.0]),
        ("mwa", {"power": 3.0}, [8.0, 0.125, 1.0]),
        ("mwa", {"kind": "score", "power": 2.0}, [0.25, 4.0, 1.0]),
        ("mwa", {"power": 0.0}, [1.0, 1.0, 1.0]),
        ("lm_cocktail", {}, [math.exp(-0.1), math.exp(-0.4), math.exp(-0.2)]),
        ("lm_cocktail", {"temperature": 0.5, "kind": "score"}, [math.exp(1), math.exp(4), math.exp(2)]),
    ],
)
def test_weights_follow_from_what_was_measured(name, given, raw):
    base, experts = experts_of(name, (20, 15))
    merged = merge(name, experts, base, measured=LOSSES, **given, **{"lambda": 0.7})
    wanted = 0.7 * sum(r / sum(raw) * d for r, d in zip(raw, deltas_of(experts, base), strict=True))
    assert torch.allclose(merged.double() - base.double(), wanted, atol=1e-7)


def test_a_loss_near_zero_and_a_great_power_take_one_model():
    base, experts = experts_of("mwa", (20, 15))
    merged = merge("mwa", experts, base, measured=[1e-300, 1.0, 1.0], power=20.0)
    assert torch.allclose(merged, experts[0], atol=1e-7)


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("mwa", {}, r"^here\.measured: missing; mwa has no default for it"),
        ("lm_cocktail", {"measured": [1.0, 2.0]}, r"^here\.measured: 2 numbers for 3 experts; write one for each"),
        ("mwa", {"measured": [1.0, 0.0, 2.0]}, r"^here\.measured: 0\.0 is not usable; write a number above 0\."),
        ("lm_cocktail", {"measured": 1.0, "temperature": 0}, r"^here\.temperature: 0 is not usable"),
    ],
)
def test_what_was_measured_has_to_be_written(name, given, says):
    with pytest.raises(BadInput, match=says):
        METHODS[name].complete(given, 3, "here")


# --- NeuroMerging


def by_neuron(deltas, base, weight, parallel):
    """Row by row through the singular value decomposition of the experts' rows, in the coordinates themselves."""
    out = torch.zeros_like(base)

    def voted(votes):  # one number an expert
        weighted = [w * v for w, v in zip(weight, votes, strict=True)]
        sign = 1 if sum(weighted) > 0 else -1
        agree = [(w, v) for w, v in zip(weight, votes, strict=True) if v * sign > 0]
        return sum(w * v for w, v in agree) / sum(w for w, _ in agree)

    for row in range(len(base)):
        origin = base[row] / base[row].norm()
        lengths = [(d[row] @ origin).item() for d in deltas]
        rest = torch.stack([d[row] - a * origin for d, a in zip(deltas, lengths, strict=True)])
        u, s, v = torch.linalg.svd(rest, full_matrices=False)
        coordinates = u * s
        across = sum(voted(coordinates[:, k].tolist()) * v[k] for k in range(len(s)))
        out[row] = across + parallel * voted(lengths) * origin
    return out


@pytest.mark.parametrize("parallel", [0.0, 0.8])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_neuro_is_the_formula(parallel, density):
    base, experts = experts_of("neuro", (10, 24))
    deltas = [trimmed(d, density) for d in deltas_of(experts, base)]
    weight = [0.2, 0.3, 0.5]
    given = {"weight": weight, "density": density, "parallel": parallel, "lambda": 1.5}
    wanted = 1.5 * by_neuron(deltas, base.double(), weight, parallel)
    merged = merge("neuro", experts, base, rescale="none", **given)
    assert torch.allclose(merged.double() - base.double(), wanted, atol=1e-6)
    shares = [t.abs().sum() / d.abs().sum() for t, d in zip(deltas, deltas_of(experts, base), strict=True)]
    restored = merge("neuro", experts, base, **given).double() - base.double()
    assert torch.allclose(restored, wanted / min(shares), atol=1e-6)


def test_neuro_merges_vectors_as_ties_does():
    base, experts = experts_of("neuro", (50,))
    given = {"density": 0.4, "lambda": 1.5}
    ours = merge("neuro", experts, base, rescale="none", **given)
    assert torch.equal(ours, merge("ties", experts, base, **given))


def test_opposite_rows_elect_nothing():
    """Of 2 and -2 no sign is elected, whichever sign the decomposition gives its basis."""
    base, (first, *_) = experts_of("neuro", (10, 24))
    base, first = ((t * 1024).round() / 1024 for t in (base, first))  # so that no difference is rounded
    given = {"density": 1.0, "parallel": 1.0}
    assert torch.equal(merge("neuro", [first, 2 * base - first], base, **given), base)


def test_experts_that_changed_other_inputs_of_a_neuron_add_up():
    """Rows without a common place are orthogonal: each is a coordinate of its own, and keeps its full length."""
    base = torch.zeros(6, 8)
    base[:, 7] = 1.0
    deltas = [torch.zeros(6, 8) for _ in range(3)]
    for k, d in enumerate(deltas):
        d[:, 2 * k : 2 * k + 2] = 1.0 + k
    merged = merge("neuro", [base + d for d in deltas], base, density=1.0)
    assert torch.allclose(merged - base, sum(deltas), atol=1e-6)


# --- Factors by size


def by_bins(delta, factors, density):
    order = delta.abs().flatten().argsort()
    count, parts = delta.numel(), len(factors)
    ends = [count - round(k * count / parts) for k in range(parts - 1, 0, -1)]
    out = delta.flatten().clone()
    for factor, start, end in zip(factors, [0, *ends], [*ends, count], strict=True):
        out[order[start:end]] *= factor
    return trimmed(out, density).view(delta.shape)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("factors", [[1] * 6, [0, 0.5, 1, 1.5, 2, 0.2]])
def test_nps_is_the_formula(factors, density):
    base, experts = experts_of("nps", (20, 17))
    given = {f"bin_{k}": float(f) for k, f in enumerate(factors, 1)} | {"weight": [0.2, 0.3, 0.5], "lambda": 1.5}
    merged = merge("nps", experts, base, density=density, **given)
    parts = [w * by_bins(d, factors, density) for w, d in zip(given["weight"], deltas_of(experts, base), strict=True)]
    assert torch.allclose(merged.double() - base.double(), 1.5 * sum(parts), atol=1e-7)


def test_nps_with_factors_of_one_is_task_arithmetic():
    base, experts = experts_of("nps", (20, 17))
    assert torch.equal(merge("nps", experts, base), merge("task_arithmetic", experts, base))


def test_nps_without_the_small_is_trimming():
    base, experts = experts_of("nps", (20, 18), count=1)
    small = {f"bin_{k}": 0.0 for k in range(1, 5)}
    wanted = trimmed(deltas_of(experts, base)[0], 1 / 3)
    assert torch.allclose(merge("nps", experts, base, **small).double() - base.double(), wanted, atol=1e-7)


# --- Questions about the model as a whole


@pytest.mark.parametrize("name", ["neuro", "nps", "ties_slack"])
def test_the_scope_global_is_that_of_all_tensors_together(name):
    """Two tensors of one row each, against one tensor that is both: the same thresholds, norms and edges."""
    given = {"neuro": {"density": 0.4}, "nps": {"bin_6": 0.3, "bin_2": 2.0, "density": 0.4}}.get(name, {"density": 0.4})
    given = given | {"trim_scope": "global", "weight": [0.2, 0.3, 0.5]}
    base, experts = experts_of(name, (2, 60))
    values = METHODS[name].complete(given, 3, "here")
    split = [InputTensors(f"t{k}", [e[k] for e in experts], base[k], "abc") for k in range(2)]
    model = AllTensors(base.numel(), lambda: iter(split))
    parts = [apply(METHODS[name], values, one, model) for one in split]
    # As one vector, which neuro merges as it merges these.
    whole = merge(name, [e.flatten() for e in experts], base.flatten(), list("abc"), **given)
    if name != "ties_slack":  # whose deviations are those of a tensor
        assert torch.allclose(torch.cat(parts), whole, atol=1e-7)
    assert not torch.allclose(torch.cat(parts), torch.cat([apply(METHODS[name], values, one) for one in split]))


def test_settings_that_differ_by_place_ask_the_model_anew():
    base, experts = experts_of("nps", (2, 60))
    split = [InputTensors(f"t{k}", [e[k] for e in experts], base[k], "abc") for k in range(2)]
    model = AllTensors(base.numel(), lambda: iter(split))
    some, other = (METHODS["nps"].complete({"bin_6": f, "density": 0.5}, 3, "here") for f in (1.0, 0.1))
    first = apply(METHODS["nps"], some, split[0], model)
    second = apply(METHODS["nps"], other, split[0], model)
    alone = apply(METHODS["nps"], other, split[0], AllTensors(base.numel(), lambda: iter(split)))
    assert torch.equal(second, alone)
    assert not torch.equal(first, second)
