"""Parts of tensors with settings of their own: merged by hand, identities, their ids, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from evolver.checkpoints.weights import Checkpoint
from evolver.merging.materialise import Materialiser
from evolver.merging.mergekit.writer import Inexpressible, dump
from evolver.records.recipe import Expert, Merge, Place, Rule, dump_recipe, load_recipe, part_rows

SHAPES = {"model.layers.0.w": (7, 3), "model.layers.1.w": (4, 5), "norm": (6,), "scale": ()}


@pytest.fixture
def models(tmp_path):
    tensors, opened = {}, {}
    draw = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        tensors[name] = {n: torch.randn(s, generator=draw) for n, s in SHAPES.items()}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file(tensors[name], tmp_path / name / "model.safetensors")
        opened[name] = Checkpoint(tmp_path / name, name)
    nodes = {n: Expert(n, o.digest()) for n, o in opened.items()}
    build = Materialiser(opened["base"], {o.digest(): o for o in opened.values()}, torch.float32)
    return tensors, nodes, build


def merge_of(nodes, *rules, method="task_arithmetic"):
    return Merge(method, (nodes["a"], nodes["b"]), nodes["base"], tuple(rules))


def test_parts_by_hand(models):
    tensors, nodes, build = models
    usual = Rule.of({"weight": (0.5, 0.25)})
    own = Rule.of({"weight": (1.0, 0.0)}, Place(layers=(0, 1), contains="w", part=(1, 3)))
    last = Rule.of({"weight": (0.0, 2.0)}, Place(outside=True, part=(1, 2)))
    merged = dict(build.stream(merge_of(nodes, usual, own, last)))
    for name, found in merged.items():
        base, a, b = (tensors[n][name].double() for n in ("base", "a", "b"))
        wanted = base + 0.5 * (a - base) + 0.25 * (b - base)
        if name == "model.layers.0.w":
            wanted[2:4] = a[2:4]  # of 7 rows in 3 parts: 0 and 1, 2 and 3, 4 to 6
        if name == "norm":
            wanted[3:] = base[3:] + 2 * (b[3:] - base[3:])
        if name == "scale":
            wanted = base + 2 * (b - base)  # one row, which the second part has
        assert torch.allclose(found.double(), wanted, atol=1e-6), name
        assert found.shape == SHAPES[name]


@pytest.mark.parametrize("count", [2, 3, 50])
def test_parts_that_agree_are_the_whole(models, count):
    _, nodes, build = models
    values = {"weight": (0.3, 0.4), "lambda": 1.5}
    parts = [Rule.of(values, Place(part=(number, count))) for number in range(count)]
    whole, divided = (dict(build.stream(merge_of(nodes, *rules))) for rules in ([Rule.of(values)], parts))
    assert all(torch.equal(whole[name], divided[name]) for name in SHAPES)


@pytest.mark.parametrize("rows", [0, 1, 5, 12])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_every_row_is_in_one_part(rows, count):
    found = [row for number in range(count) for row in range(rows)[part_rows((number, count), rows)]]
    assert found == list(range(rows))


def test_recipes_keep_parts_and_their_ids(models):
    _, nodes, _ = models
    plain = merge_of(nodes, Rule.of({"lambda": 0.5}, Place(contains="w")))
    divided = merge_of(nodes, Rule.of({"lambda": 0.5}, Place(contains="w", part=(0, 2))))
    assert plain.id != divided.id
    for recipe in (plain, divided):
        again = load_recipe(dump_recipe(recipe))
        assert (again.id, again.rules) == (recipe.id, recipe.rules)
    assert plain.rules[0].place.form() == [None, False, "w"]  # as recipes of earlier versions have it


def test_what_cannot_be_divided_is_refused(models):
    _, nodes, build = models
    twice = [Rule.of({"lambda": 0.5}, Place(part=(0, count))) for count in (2, 3)]
    with pytest.raises(ValueError, match="divided into 2 and into 3 parts"):
        dict(build.stream(merge_of(nodes, *twice)))
    with pytest.raises(Inexpressible, match="parts of tensors"):
        dump(merge_of(nodes, twice[0]), {n.digest: n.name for n in nodes.values()}, list(SHAPES))
