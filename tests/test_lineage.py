"""The drawing of a lineage: from the experts down to the winner, and legible however large it is."""

from __future__ import annotations

import itertools
import random

import pytest

from evolver.dashboard.lineage import BOX, GAP, MOST_EXPERTS, MOST_MODELS, drawing
from evolver.records.recipe import Cross, Expert, Merge, ancestors

BASE = Expert("base", "00")


def grown(experts, generations, partners=1, strategy="evolver"):
    """The member of the largest lineage after so many generations, in which half of the offspring are better."""
    draw = random.Random(0)
    population = [Expert(f"expert-{k}", f"{k}") for k in range(experts)]
    for _, k in itertools.product(range(generations), range(experts)):
        others = draw.sample([j for j in range(experts) if j != k], partners)
        seed = draw.getrandbits(32)
        child = Cross(population[k], tuple(population[j] for j in others), strategy, 0.5, 0.5, seed)
        if draw.random() < 0.5:
            population[k] = child
    return max(population, key=lambda member: len(list(ancestors(member))))


LARGE = {"ten by twelve": (10, 12), "three partners": (10, 12, 3, "rand/1"), "many experts": (30, 6), "deep": (2, 300)}


@pytest.mark.parametrize("size", LARGE.values(), ids=LARGE)
def test_a_large_lineage_can_be_read(size):
    recipe = grown(*size)
    found = drawing(recipe, {})
    boxes = found["nodes"]
    assert found["models"] == len(list(ancestors(recipe))) > found["shown"]
    (rest,) = (b for b in boxes if b["role"] == "left out")
    assert rest["label"] == f"{found['models'] - found['shown']} more"
    assert 6 <= sum(b["role"] == "model" for b in boxes) <= MOST_MODELS
    assert 1 <= sum(b["role"] == "expert" for b in boxes) <= MOST_EXPERTS
    assert found["width"] <= MOST_EXPERTS * (BOX + GAP)
    for one, other in itertools.combinations(boxes, 2):
        assert one["row"] != other["row"] or abs(one["x"] - other["x"]) >= BOX + GAP - 0.2
    for x in [b["x"] for b in boxes]:
        assert BOX / 2 - 0.1 <= x <= found["width"] - BOX / 2 + 0.1


@pytest.mark.parametrize("size", [(3, 2), (10, 12), (4, 6, 3, "rand/1")])
def test_arrows_go_down_from_experts_to_the_winner(size):
    recipe = grown(*size)
    found = drawing(recipe, {})
    row, place = {b["id"]: b["row"] for b in found["nodes"]}, {b["id"]: b["x"] for b in found["nodes"]}
    assert [key for key, r in row.items() if r == found["rows"] - 1] == [recipe.id]
    assert {b["row"] for b in found["nodes"] if b["role"] == "expert"} == {0}
    ends = set()
    for edge in found["edges"]:
        rows = [r for _, r in edge["points"]]
        assert rows == list(range(rows[0], rows[-1] + 1))  # through every layer, downwards
        (start, first), (end, last) = edge["points"][0], edge["points"][-1]
        ends.add((
            min((k for k in row if row[k] == first), key=lambda k: abs(place[k] - start)),
            min((k for k in row if row[k] == last), key=lambda k: abs(place[k] - end)),
        ))  # fmt: skip
    for node in ancestors(recipe):
        for below in node.inputs:
            if node.id in row and below.id in row:
                assert (below.id, node.id) in ends


def test_operations_are_named():
    a, b = Expert("a", "aa"), Expert("b", "bb")
    cross = Cross(a, (b,), "rand/1", 0.5, 0.25, 1)
    found = drawing(Merge("ties", (a, cross), BASE), {cross.id: 7})
    said = {n["label"]: n["lines"] for n in found["nodes"]}
    assert said["candidate 7"] == ["mutation rand/1", "crossover Cr 0.25"]
    assert said["ties"] == ["merge", "ties"]
    assert (said["a"], found["shown"], found["models"]) == ([], 5, 5)
    assert sorted(e["kind"] for e in found["edges"]) == ["base", "parent", "parent", "parent", "partner"]


def test_an_expert_alone_is_a_lineage():
    found = drawing(Expert("a", "aa"), {})
    assert ([n["label"] for n in found["nodes"]], found["edges"], found["rows"]) == (["a"], [], 1)
