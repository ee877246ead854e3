"""Recipes node by node: what is taken apart is put together again, and nothing else is taken for it."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolver.records.canonical import canonical_json
from evolver.records.graph import NodeTable, UnknownNode, node_text, text_id, texts_of, working_order
from evolver.records.node import NODES
from evolver.records.noise import Noise
from evolver.records.recipe import Cross, Expert, Layers, Merge, Place, Rule, Statistic, ancestors

BASE = Expert("base", "00")


def random_recipe(seed, steps):
    """A recipe of all kinds of nodes, each made from some of those before."""
    draw = random.Random(seed)
    members = [BASE, *(Expert(f"expert {i}", f"{i:020x}") for i in range(3))]
    for _ in range(steps):
        one, two = draw.choice(members), members[-1]
        rules = (Rule.of({"weight": (draw.random(), -0.0), "normalize": True}, Place((0, draw.randint(1, 9)))),)
        fisher = tuple(Statistic("fisher", m, "items") for m in (one, two))
        members.append(
            draw.choice(
                [
                    Cross(two, (one,), "evolver", draw.random(), draw.random(), draw.getrandbits(32)),
                    Cross(one, (two, BASE), "rand/1", 0.5, 1.0, draw.getrandbits(64), draw.choice(["row", "layer"])),
                    Merge("linear", (one, two), BASE, rules),
                    Merge("fisher", (one, two), BASE, (), fisher),
                    Noise(one, (members[1],), BASE, ((draw.getrandbits(64), draw.random()),), "rademacher", 2),
                    Layers((one, two), ((0, draw.randint(0, 5)), (1, 0)), (0, 1)),
                ]
            )
        )
    return members[-1]


recipes = st.builds(random_recipe, st.integers(0, 10**9), st.integers(0, 40))


def table_of(texts):
    table = NodeTable()
    table.add(texts.items())
    return table


@settings(max_examples=60, deadline=None)
@given(recipe=recipes, seed=st.integers(0, 10**6))
def test_what_is_taken_apart_is_put_together_again(recipe, seed):
    texts = list(texts_of(recipe).items())
    assert [key for key, _ in texts] == [node.id for node in ancestors(recipe)]
    assert all(text_id(text) == key for key, text in texts)
    random.Random(seed).shuffle(texts)
    again = table_of(dict(texts)).recipe(recipe.id)
    assert [(n, node_text(n)) for n in ancestors(again)] == [(n, node_text(n)) for n in ancestors(recipe)]


def test_every_kind_of_node_is_among_them():
    kinds = {node.kind for seed in range(20) for node in ancestors(random_recipe(seed, 40))}
    assert kinds == {kind for kind, node in NODES.items() if node.__module__.startswith("evolver.")}


@settings(max_examples=60, deadline=None)
@given(recipe=recipes, data=st.data())
def test_what_is_known_is_left_out_with_what_is_below(recipe, data):
    known = set(texts_of(data.draw(st.sampled_from([*ancestors(recipe)]))))
    rest = texts_of(recipe, known)
    assert rest.keys() | known == texts_of(recipe).keys()
    assert not rest.keys() & known


@settings(max_examples=60, deadline=None)
@given(recipe=recipes, data=st.data())
def test_without_a_node_whatever_needs_it_is_unknown(recipe, data):
    nodes = [*ancestors(recipe)]
    lost = data.draw(st.sampled_from(nodes))
    table = table_of({key: text for key, text in texts_of(recipe).items() if key != lost.id})
    for node in nodes:
        if lost in ancestors(node):
            with pytest.raises(UnknownNode):
                table.recipe(node.id)
        elif not isinstance(node, Statistic):
            assert table.recipe(node.id) == node
    assert table.built <= {n.id for n in nodes if lost not in ancestors(n)}
    table.add([(lost.id, node_text(lost))])
    assert table.recipe(recipe.id) == recipe


def test_what_two_recipes_share_is_one_object():
    parent = Cross(BASE, (Expert("a", "aa"),), "evolver", 0.5, 0.5, 1)
    one, two = (Cross(parent, (BASE,), "evolver", 0.5, 0.5, seed) for seed in (2, 3))
    table = table_of(texts_of(one) | texts_of(two))
    assert table.recipe(one.id).parent is table.recipe(two.id).parent


def test_a_lineage_of_5000_generations_takes_one_step_each():
    one, two = BASE, Expert("a", "aa")
    for seed in range(5000):
        one, two = two, Cross(two, (one,), "evolver", 0.5, 0.5, seed)
    again = table_of(texts_of(two)).recipe(two.id)
    assert (again, len(working_order(again))) == (two, 5002)


GOOD = Merge("simple", (BASE, Expert("a", "aa")), BASE)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "null", '["zz"]', '["merge"]', '["expert","a"]', '["cross",[],"evolver",0.5,0.5,1]',
     '["merge","simple",[0],1,[]]', '["merge","simple",[["x"]],{},[]]', node_text(BASE)],
)  # fmt: skip
def test_what_is_no_node_is_refused(text):
    table = table_of(texts_of(GOOD) | {GOOD.id: text})
    with pytest.raises((ValueError, UnknownNode)):
        table.recipe(GOOD.id)
    assert GOOD.id not in table.built


def test_a_node_that_is_made_of_itself_is_refused():
    table = table_of({"x": '["merge","simple",["y"],"y",[]]', "y": '["merge","simple",["x"],"x",[]]'})
    with pytest.raises(ValueError, match="made of itself"):
        table.recipe("x")


def test_a_statistic_is_no_model():
    node = Statistic("fisher", BASE, "items")
    with pytest.raises(ValueError, match="a statistic is not a model"):
        table_of(texts_of(node)).recipe(node.id)


@settings(max_examples=60, deadline=None)
@given(recipe=recipes, data=st.data())
def test_the_order_of_work_has_inputs_first_and_nothing_below_what_is_there_or_is_a_statistic(recipe, data):
    kept = {n.id for n in data.draw(st.lists(st.sampled_from([*ancestors(recipe)])))}
    order = working_order(recipe, kept)
    place = {node.id: k for k, node in enumerate(order)}
    assert len(place) == len(order)
    assert order[-1] == recipe
    used = {recipe.id}
    for node in order:
        if node.id not in kept and not isinstance(node, Statistic):
            assert all(place[below.id] < place[node.id] for below in node.below)
            used |= {below.id for below in node.below}
    assert used == place.keys()


def test_the_text_of_a_node_is_pinned():
    """They stand in ledgers: a change would make them unreadable."""
    assert node_text(GOOD) == canonical_json(["merge", "simple", [BASE.id, GOOD.inputs[1].id], BASE.id, []])
    assert json.loads(node_text(BASE)) == ["expert", "base", "00"]
