"""Merge methods: the laws that all of them keep, and numbers that were worked out by hand."""

import itertools
from typing import Annotated

import pytest
import torch

from evolver.errors import BadInput
from evolver.merging import methods
from evolver.merging.genome import genome
from evolver.merging.methods import METHODS, Range, method
from evolver.merging.random import draws
from evolver.records import Expert

E = 3
EVERY = pytest.mark.parametrize("name", METHODS)
SHAPES = [(), (1,), (40,), (6, 9), (2, 3, 4)]


def equal_weights(name, **more):
    """The defaults of a method, with weights that sum to 1 where it has weights."""
    given = {"weight": 1 / E} if "weight" in METHODS[name].settings else {}
    return METHODS[name].complete({**given, **more}, E, "here")


def stack(shape=(6, 9), seed=0):
    return torch.randn(E, *shape, generator=torch.Generator().manual_seed(seed))


@EVERY
def test_equal_experts_give_that_expert(name):
    same = stack()[:1].expand(E, 6, 9).contiguous()
    assert torch.allclose(METHODS[name](same, equal_weights(name), "w"), same[0], atol=1e-6)


@EVERY
def test_nothing_gives_nothing(name):
    assert torch.equal(METHODS[name](torch.zeros(E, 6, 9), equal_weights(name), "w"), torch.zeros(6, 9))


@EVERY
def test_the_order_of_the_experts_does_not_matter(name):
    weights = [0.2, 0.3, 0.5]
    models = stack()
    results = []
    for order in itertools.permutations(range(E)):
        given = {"weight": [weights[i] for i in order]} if "weight" in METHODS[name].settings else {}
        values = METHODS[name].complete(given, E, "here")
        results.append(METHODS[name](models[list(order)], values, "w"))
    for other in results[1:]:
        assert torch.allclose(results[0], other, atol=1e-6)


@EVERY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_are_kept_and_nothing_is_changed(name, shape):
    models = stack(shape)
    before = models.clone()
    merged = METHODS[name](models, equal_weights(name), "w")
    assert merged.shape == shape
    assert merged.dtype == torch.float32
    assert merged.isfinite().all()
    assert torch.equal(models, before)


@EVERY
def test_the_same_again_gives_the_same_bits(name):
    more = {"density": 0.5} if "density" in METHODS[name].settings else {}
    one, two = (METHODS[name](stack(), equal_weights(name, **more), "w") for _ in range(2))
    assert torch.equal(one, two)


@EVERY
def test_elementwise_methods_may_be_cut_in_pieces(name):
    """And one that says it is not is treated as a whole, which the materialiser's tests look at."""
    if METHODS[name].elementwise:
        models, values = stack((100,)), equal_weights(name)
        pieces = [METHODS[name](models[:, a : a + 33], values, "w") for a in range(0, 100, 33)]
        assert torch.equal(torch.cat(pieces), METHODS[name](models, values, "w"))
    else:
        assert METHODS[name].on_deltas or METHODS[name].settings


@EVERY
def test_every_method_names_its_paper_and_its_settings(name):
    assert any(c.isdigit() for c in METHODS[name].paper)
    assert METHODS[name].function.__doc__
    values = METHODS[name].complete({}, E, "here")
    assert list(values) == list(METHODS[name].settings)
    for setting in METHODS[name].settings.values():
        assert type(values[setting.name]) is setting.kind


@EVERY
def test_an_unknown_setting_is_refused(name):
    with pytest.raises(BadInput, match=rf"^here: {name} has no setting 'wieght'"):
        METHODS[name].complete({"wieght": 1.0}, E, "here")


def test_a_method_of_that_name_or_the_nearest():
    assert methods.get("ties", "here") is METHODS["ties"]
    with pytest.raises(BadInput, match=r"^here: unknown merge method 'tise'; did you mean 'ties'"):
        methods.get("tise", "here")


def test_the_nearest_setting_is_named():
    with pytest.raises(BadInput, match="did you mean 'density'"):
        METHODS["ties"].complete({"densty": 1.0}, E, "here")


def test_defaults_are_filled_in_one_weight_an_expert():
    assert METHODS["ties"].complete({}, 3, "here") == {
        "weight": (1.0, 1.0, 1.0), "density": 1.0, "lambda": 1.0, "normalize": True,
    }  # fmt: skip
    assert METHODS["linear"].complete({"weight": 2}, 2, "here")["weight"] == (2.0, 2.0)
    assert METHODS["linear"].complete({"weight": [1, 2]}, 2, "here")["weight"] == (1.0, 2.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": "much"}, r"here\.weight: 'much' is not usable; write a number, or a list"),
        ({"weight": ["a", 1, 2]}, r"here\.weight: .* is not usable"),
        ({"weight": [1.0, 2.0]}, r"here\.weight: 2 numbers for 3 experts; write one for each"),
        ({"weight": []}, r"here\.weight: 0 numbers for 3 experts"),
        ({"density": 0.0}, r"here\.density: 0.0 is not usable; write a number above 0 and up to 1"),
        ({"density": 1.5}, r"here\.density: 1.5 is not usable"),
        ({"density": True}, r"here\.density: True is not usable"),
        ({"lambda": "1"}, r"here\.lambda: '1' is not usable; write a number"),
        ({"lambda": float("nan")}, r"here\.lambda: nan is not usable; write a number"),
        ({"weight": [float("inf"), 1, 1]}, r"here\.weight: .*inf.* is not usable"),
        ({"weight": [True, 1, 1]}, r"here\.weight: .*True.* is not usable"),
        ({"normalize": 1}, r"here\.normalize: 1 is not usable; write a value of type bool"),
        ({"rescale": "l2"}, r"here\.rescale: unknown choice 'l2'; did you mean 'l1'"),
        ({"seed": 1.5}, r"here\.seed: 1.5 is not usable; write a value of type int"),
    ],
)
def test_wrong_values_are_refused(given, message):
    with pytest.raises(BadInput, match=message):
        METHODS["dare_ties"].complete(given, 3, "here")


def test_a_new_method_is_one_function():
    """Its signature says what it works on, what can be set, and what can be searched."""
    try:

        @method("Nobody 2030", elementwise=True)
        def louder(deltas: torch.Tensor, *, gain_: Annotated[float, Range(0.5, 2.0)] = 1.0) -> torch.Tensor:
            """The sum of the deltas, louder."""
            return gain_ * deltas.sum(0)

        found = METHODS["louder"]
        assert found.on_deltas
        assert found.elementwise
        assert not found.draws
        assert found(torch.ones(E, 4), found.complete({"gain": 2}, E, "here"), "w").tolist() == [6.0] * 4
        space = genome(found, [Expert("a", "aa")] * E, Expert("base", "00"), 4, 2, ["gain"], {}, "search")
        assert [k.name for k in space.knobs] == ["gain@outside", "gain@0-1", "gain@2-3"]
        assert {(k.low, k.high) for k in space.knobs} == {(0.5, 2.0)}
    finally:
        METHODS.pop("louder", None)


def run(name, rows, **given):
    found = METHODS[name]
    return found(torch.tensor(rows), found.complete(given, len(rows), "here"), "w").tolist()


def test_simple_and_linear_by_hand():
    """(1 + 3) / 2 = 2, (2 + 6) / 2 = 4. Weights 1 and 3: (1 + 9) / 4 = 2.5, (2 + 18) / 4 = 5; not divided 10 and 20."""
    rows = [[1.0, 2.0], [3.0, 6.0]]
    assert run("simple", rows) == [2.0, 4.0]
    assert run("linear", rows, weight=[1, 3]) == [2.5, 5.0]
    assert run("linear", rows, weight=[1, 3], normalize=False) == [10.0, 20.0]


def test_task_arithmetic_by_hand():
    """λ (w₁τ₁ + w₂τ₂) = 2 (0.25 · [4, 8] + 0.5 · [2, -8]) = 2 [2, -2] = [4, -4]; over 0.75: [16/3, -16/3]."""
    rows = [[4.0, 8.0], [2.0, -8.0]]
    assert run("task_arithmetic", rows, weight=[0.25, 0.5], **{"lambda": 2.0}) == [4.0, -4.0]
    divided = run("task_arithmetic", rows, weight=[0.25, 0.5], normalize=True, **{"lambda": 2.0})
    assert divided == pytest.approx([16 / 3, -16 / 3])


def test_ties_by_hand():
    """Density 0.5 of 4 keeps 2 a row: [0, -4, 3, 0] and [0, 2, 3, 0].

    Sums at weight 1: 0, -2, 6, 0; so the second elects minus and takes -4 alone, the third takes both: (3 + 3) / 2 = 3.
    λ = 2 doubles: [0, -8, 6, 0]. Without normalisation the third is 2 · 6 = 12.
    With weights 1 and 3 the second place sums to -4 + 6 = 2, elects plus and takes 3 · 2 / 3 = 2, doubled 4.
    """
    rows = [[1.0, -4.0, 3.0, 0.5], [-1.0, 2.0, 3.0, 0.25]]
    assert run("ties", rows, density=0.5, **{"lambda": 2.0}) == [0.0, -8.0, 6.0, 0.0]
    assert run("ties", rows, density=0.5, normalize=False, **{"lambda": 2.0}) == [0.0, -8.0, 12.0, 0.0]
    assert run("ties", rows, density=0.5, weight=[1, 3], **{"lambda": 2.0}) == [0.0, 4.0, 6.0, 0.0]


def test_dare_ties_at_full_density_by_hand():
    """Nothing is dropped. Sums 3, -2: the first takes 1 + 2, the second -4 alone (2 disagrees)."""
    for how in ("l1", "inv_p", "none"):
        assert run("dare_ties", [[1.0, -4.0], [2.0, 2.0]], rescale=how) == [3.0, -4.0]


def dare(values, density, how, seed=0):
    found = METHODS["dare_ties"]
    return found(values[None], found.complete({"density": density, "rescale": how, "seed": seed}, 1, "here"), "w")


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_dare_keeps_its_share_and_its_norm(density):
    """40,000 draws: the kept share lies within 5 · √(p (1-p) / n) of p. One expert alone is never outvoted."""
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(0)) + 0.01
    kept = dare(values, density, "none")
    share = (kept != 0).double().mean().item()
    assert abs(share - density) < 5 * (density * (1 - density) / 40_000) ** 0.5
    assert torch.equal(kept[kept != 0], values[kept != 0])
    assert dare(values, density, "l1").abs().sum().item() == pytest.approx(values.abs().sum().item(), rel=1e-4)
    assert torch.allclose(dare(values, density, "inv_p"), kept / density)


def test_dare_drops_by_its_own_draws():
    values = torch.ones(1000)
    kept = dare(values, 0.5, "none", seed=4)
    assert torch.equal(kept != 0, draws(4, "w#0", 0, 1000) < 32768)
    assert not torch.equal(kept, dare(values, 0.5, "none", seed=5))
