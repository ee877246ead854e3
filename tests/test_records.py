"""Recipes: canonical form, identity, and the text that travels; results: what they answer."""

import json
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolver.records import Candidate, Question, Result
from evolver.records.recipe import Cross, Expert, MaskUnit, Merge, Place, Rule, ancestors, dump_recipe, load_recipe

A, B = Expert("a", "aa"), Expert("b", "bb")

finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(min_size=1, max_size=5)
experts = st.builds(Expert, names, st.text("0123456789abcdef", min_size=1, max_size=4))
values = st.one_of(finite, st.booleans(), st.integers(-9, 9), names, st.lists(finite, max_size=3).map(tuple))
places = st.one_of(
    st.just(Place()),
    st.just(Place(outside=True)),
    st.tuples(st.integers(0, 4), st.integers(5, 9)).map(lambda ends: Place(ends)),
)
rules = st.builds(Rule.of, st.dictionaries(names, values, max_size=3), places)


def nested(inner):
    some = st.lists(inner, min_size=1, max_size=3).map(tuple)
    merges = st.builds(Merge, names, some, experts, st.lists(rules, max_size=2).map(tuple))
    masks = st.sampled_from(get_args(MaskUnit))
    return merges | st.builds(Cross, inner, some, names, finite, finite, st.integers(0, 2**32), masks)


recipes = st.recursive(experts, nested, max_leaves=6)


def lineage(depth, partner=B):
    """A Cross of a Cross of … of A, each with its own seed."""
    node = A
    for seed in range(depth):
        node = Cross(node, (partner,), "evolver", 0.5, 0.5, seed)
    return node


@given(recipes)
@settings(max_examples=60, deadline=None)
def test_a_recipe_survives_its_text_with_the_same_id(recipe):
    text = dump_recipe(recipe)
    again = load_recipe(text)
    assert again.id == recipe.id
    assert again == recipe
    assert dump_recipe(again) == text


def test_ids_depend_on_content_not_on_the_sharing_of_objects():
    shared = Cross(A, (B,), "evolver", 0.5, 0.5, 1)
    one = Merge("simple", (shared, shared), A)
    two = Merge(
        "simple", tuple(Cross(Expert("a", "aa"), (Expert("b", "bb"),), "evolver", 0.5, 0.5, 1) for _ in "xy"), A
    )
    assert one.id == two.id
    assert len(list(ancestors(two))) == 4  # a, b, their child, the merge
    assert dump_recipe(one) == dump_recipe(two)


def test_the_name_of_an_expert_is_for_people_only():
    assert Expert("a", "aa").id == Expert("another", "aa").id


@pytest.mark.parametrize(
    "other",
    [
        Cross(B, (A,), "evolver", 0.5, 0.5, 1),
        Cross(A, (B, B), "evolver", 0.5, 0.5, 1),
        Cross(A, (B,), "rand/1", 0.5, 0.5, 1),
        Cross(A, (B,), "evolver", 0.25, 0.5, 1),
        Cross(A, (B,), "evolver", 0.5, 0.25, 1),
        Cross(A, (B,), "evolver", 0.5, 0.5, 2),
        Cross(A, (B,), "evolver", 0.5, 0.5, 1, "row"),
        Cross(A, (B,), "evolver", 0.5, 0.5, 1, "layer"),
    ],
)
def test_every_part_of_a_recipe_counts_for_its_id(other):
    assert other.id != Cross(A, (B,), "evolver", 0.5, 0.5, 1).id


def test_there_is_one_zero():
    assert Cross(A, (B,), "evolver", -0.0, 0.5, 1).id == Cross(A, (B,), "evolver", 0.0, 0.5, 1).id
    assert Rule.of({"w": (-0.0,), "x": -0.0}).form() == Rule.of({"w": (0.0,), "x": 0.0}).form()
    assert "-0.0" not in json.dumps(Rule.of({"w": (-0.0,), "x": -0.0}).form())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_recipe_holds_finite_numbers_only(bad):
    with pytest.raises(ValueError, match="cannot hold"):
        Cross(A, (B,), "evolver", bad, 0.5, 1)
    with pytest.raises(ValueError, match="cannot hold"):
        Rule.of({"weight": (0.5, bad)})
    with pytest.raises(ValueError, match="cannot hold"):
        Rule.of({"lambda": bad})


def test_the_canonical_form_is_pinned():
    """Ids stand in ledgers and cards: a change of the form breaks every recorded run, so it has to be noticed here."""
    child = Cross(A, (B,), "evolver", 0.5, 0.25, 7)
    merged = Merge("ties", (child, B), A, (Rule.of({"weight": (0.25, 0.75), "lambda": 1.5}, Place((0, 2))),))
    assert merged.id == "1634b34e7e16b06544aa"
    assert dump_recipe(merged) == (
        '[["expert","a","aa"],["expert","b","bb"],["cross",[0,1],"evolver",0.5,0.25,7],'
        '["merge","ties",[2,1],0,[[[[0,2],false,""],[["lambda",1.5],["weight",[0.25,0.75]]]]]]]'
    )


def test_a_mask_by_scalars_has_the_form_of_before_there_were_others():
    plain = Cross(A, (B,), "evolver", 0.5, 0.25, 7, "scalar")
    assert (plain.id, dump_recipe(plain)) == (Cross(A, (B,), "evolver", 0.5, 0.25, 7).id, dump_recipe(plain))
    coarse = dump_recipe(Cross(A, (B,), "evolver", 0.5, 0.25, 7, "row"))
    assert coarse == dump_recipe(plain).replace("0.25,7]", '0.25,7,"row"]')
    with pytest.raises(ValueError, match="no mask 'rows'"):
        load_recipe(coarse.replace('"row"', '"rows"'))


def test_the_text_grows_with_nodes_not_with_paths():
    """60 generations that each use the two before have about 60 nodes and 2^42 paths."""
    one, two = A, B
    for seed in range(60):
        one, two = two, Cross(two, (one,), "evolver", 0.5, 0.5, seed)
    text = dump_recipe(two)  # path by path it would not end
    again = load_recipe(text)
    assert again.id == two.id
    assert len(text) < 10_000
    assert len(json.loads(text)) == 62
    assert len(repr(two)) < 100


def test_a_lineage_of_5000_generations_needs_no_recursion():
    node = lineage(5000)
    assert len(node.id) == 20
    text = dump_recipe(lineage(5000))  # of fresh nodes, none of which has an id yet
    again = load_recipe(text)
    assert again.id == node.id
    assert again == node
    assert len(list(ancestors(again))) == 5002


def test_a_deep_merge_has_an_id_too():
    node = A
    for _ in range(3000):
        node = Merge("simple", (node, B), A)
    assert load_recipe(dump_recipe(node)) == node


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "[1]", '[["expert"]]', '[["soup","a","aa"]]', '[["cross",[3],"evolver",0.5,0.5,1]]',
     '[["expert","a","aa"],["cross",[0,0],"evolver",0.5,0.5,1],["layers",[0],[[0]],[0,0]]]'],
)  # fmt: skip
def test_other_text_is_no_recipe(text):
    with pytest.raises(ValueError):  # noqa: PT011  # the text of the message is json's own in some cases
        load_recipe(text)


def test_the_later_rule_wins_and_places_are_told_apart():
    rules = (
        Rule.of({"lambda": 1.0, "density": 0.5}),
        Rule.of({"lambda": 2.0}, Place((1, 3))),
        Rule.of({"lambda": 3.0}, Place(outside=True)),
    )
    merged = Merge("ties", (A, B), A, rules)
    assert [merged.settings("w", layer)["lambda"] for layer in (0, 1, 2, 3, None)] == [1.0, 2.0, 2.0, 1.0, 3.0]
    assert merged.settings("w", 2)["density"] == 0.5
    named = Merge("ties", (A, B), A, (*rules, Rule.of({"lambda": 4.0}, Place((1, 3), contains="mlp"))))
    assert [named.settings("mlp.up", layer)["lambda"] for layer in (0, 1, None)] == [1.0, 4.0, 3.0]
    assert named.settings("attn", 1)["lambda"] == 2.0


def test_which_questions_a_result_answers():
    full = Result(0, "r", "ok", 0.6, 0.6, True)
    partial = Result(0, "r", "ok", None, 0.5, False, items=(1.0, 0.0))
    failed = Result(0, "r", "failed")

    def ask(bar=None, limit=None):
        return Candidate(0, A, "test", question=Question(bar=bar, limit=limit))

    assert full.answers(ask())
    assert full.answers(ask(0.9))
    assert failed.answers(ask())
    assert partial.answers(ask(0.5))
    assert partial.answers(ask(0.7))
    assert not partial.answers(ask(0.4))
    assert not partial.answers(ask())
    assert partial.answers(ask(limit=2))
    assert not partial.answers(ask(limit=3))
    assert not Result(0, "r", "ok", None, None, False).answers(ask(0.5))  # no bound is known: it decides nothing
    assert Result(0, "r", "ok", None, 0.0, False).answers(ask(0.0))


def test_what_a_result_is_better_than_and_costs():
    full = Result(0, "r", "ok", 0.6, 0.6, True, items=(1.0, 0.2))
    assert full.standing > (0.0, 0.5)
    assert full.standing == (0.0, 0.6)
    assert Result(0, "r", "ok", None, 0.9, False).standing < (0.0, 0.1)
    assert full.cost == 2
    assert Result(0, "r", "ok", 0.6, 0.6, True, items=(1.0, 0.2), given=1).cost == 1
    assert Result(0, "r", "ok", 0.6, 0.6, True, items=(1.0, 0.2), reused=True).cost == 0


def test_ids_and_text_of_merges_without_statistics_are_what_they_were():
    """Written by the code of before there were statistics: old ledgers hold such recipes."""
    experts = '["expert","a","aa"],["expert","b","bb"],["expert","base","cc"]'
    text = f'[{experts},["merge","ties",[0,1],2,[[[null,false,""],[["density",0.5]]]]]]'
    recipe = Merge("ties", (A, B), Expert("base", "cc"), (Rule.of({"density": 0.5}),))
    assert (recipe.id, dump_recipe(recipe)) == ("556529b9fcec9805c525", text)
    assert load_recipe(text) == recipe


def test_objectives_are_the_scores_of_all_tasks_or_none():
    result = Result(0, "r", "ok", score=0.5, tasks={"one": 0.25, "two": 0.75})
    assert result.objectives(["two", "one"]) == (0.75, 0.25)
    assert result.objectives(["one", "three"]) is None
    assert Result(0, "r", "ok", bound=0.5, tasks=result.tasks).objectives(["one"]) is None
