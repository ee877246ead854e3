"""Recipes node by node: each node is a text that names its inputs by their ids, so that it is kept and sent only once.

A lineage of thousands of nodes grows by one or two a candidate. ``evolver.records.recipe`` writes a recipe as one text
instead, which is handy for a single file and would be read and written again and again in a ledger.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Set
from typing import Any

from evolver.records.canonical import canonical_json, content_hash, text_hash
from evolver.records.node import BY_ID, NODES
from evolver.records.recipe import Recipe, Statistic, ancestors


class UnknownNode(LookupError):
    """A recipe needs a node that is not there. The error's text is the id of the node."""


class _Wanted(LookupError):
    """A node needs an input that is not built yet."""


class _Built(dict[str, Recipe]):
    def __missing__(self, key: Any) -> Recipe:
        raise _Wanted(key)


def node_text(node: Recipe) -> str:
    """A node as JSON, with its inputs by their ids."""
    return canonical_json([node.kind, *node.entry(BY_ID)])


def text_id(text: str) -> str:
    """The id of the node that a text describes.

    Raises ValueError where the text is not a node.
    """
    try:
        kind, *entry = json.loads(text)
        return content_hash(NODES[kind].form_of(entry))
    except (TypeError, IndexError, KeyError, RecursionError) as error:
        raise ValueError(f"not a node of a recipe: {error}") from error


def is_node(key: str, text: str) -> bool:
    """Whether a text describes the node with this id. The text of most kinds is what their id is the hash of."""
    try:
        return text_hash(text) == key or text_id(text) == key
    except ValueError:
        return False


def texts_of(recipe: Recipe, known: Container[str] = ()) -> dict[str, str]:
    """The nodes of a recipe as texts, by their ids; inputs come before what uses them.

    Args:
        known: ids of nodes that are left out, with all that is below them.
    """
    return {node.id: node_text(node) for node in ancestors(recipe, known)}


def working_order(recipe: Recipe, kept: Container[str] = ()) -> list[Recipe]:
    """The nodes that a model is computed from, inputs before what uses them, each as late as possible. Few of them are
    then held at a time, however long the lineage: about two for each member of a population. Statistics stand in the
    list, and what they alone are of does not.

    Args:
        kept: ids of nodes that are there already. They stand in the list, and what is below them does not.
    """
    found = {node.id: node for node in ancestors(recipe, kept)} or {recipe.id: recipe}
    distance = {recipe.id: 0}  # the longest way from the recipe
    for node in reversed([*found.values()]):
        computed = node.id in distance and node.id not in kept and not isinstance(node, Statistic)
        for below in node.below if computed else ():
            found.setdefault(below.id, below)
            distance[below.id] = max(distance.get(below.id, 0), distance[node.id] + 1)
    return sorted((n for n in found.values() if n.id in distance), key=lambda node: -distance[node.id])


class NodeTable:
    """Nodes by their ids, of which recipes are built when they are asked for. A node is built once, so that recipes
    share what they have in common.
    """

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._built = _Built()

    def __len__(self) -> int:
        return len(self._built) + len(self._texts)

    @property
    def built(self) -> Set[str]:
        """The ids of those that were built. What is below them was built, too."""
        return self._built.keys()

    def add(self, texts: Iterable[tuple[str, str]]) -> None:
        """Add nodes, each as its id and its text; those that are there stay as they are."""
        for key, text in texts:
            if key not in self._built:
                self._texts.setdefault(key, text)

    def clear(self) -> None:
        """Let all nodes go."""
        self._texts.clear()
        self._built.clear()

    def update(self, other: NodeTable) -> None:
        """Add the nodes of another table, none of which was built yet."""
        self.add(other._texts.items())

    def recipe(self, key: str) -> Recipe:
        """The recipe with an id.

        Raises UnknownNode where one of its nodes is not in the table, and ValueError where one is damaged.
        """
        stack, open_ones = [key], {key}
        while stack:  # no recursion: a lineage can be thousands of nodes long
            if stack[-1] not in self._built:
                try:
                    self._build(stack[-1])
                except _Wanted as wanted:
                    below = wanted.args[0]
                    if below in open_ones:
                        raise ValueError(f"the node {below} of a recipe would be made of itself") from None
                    stack.append(below)
                    open_ones.add(below)
                    continue
            open_ones.discard(stack.pop())
        if isinstance(self._built[key], Statistic):
            raise ValueError("a statistic is not a model")
        return self._built[key]

    def _build(self, key: str) -> None:
        if key not in self._texts:
            raise UnknownNode(key)
        try:
            kind, *entry = json.loads(self._texts[key])
            node: Recipe = NODES[kind].from_entry(entry, self._built)  # type: ignore[assignment]  # each is a recipe
        except _Wanted:
            raise
        except (TypeError, IndexError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a node of a recipe: {error}") from error
        if node.id != key:
            raise ValueError(f"the node {key} of a recipe has the contents of another one")
        self._built[key] = node
        del self._texts[key]
