"""What all nodes of a recipe have in common. This module knows no tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from evolver.records.canonical import content_hash

if TYPE_CHECKING:
    from evolver.records.recipe import Recipe


def finite_number(x: float) -> float:
    """A finite float in which -0.0 becomes 0.0, because the two would give one model two ids."""
    x = float(x)
    if not math.isfinite(x):
        raise ValueError(f"a recipe cannot hold {x}")
    return x + 0.0


NODES: dict[str, type[Node]] = {}


class _Same(dict[str, str]):
    """Maps every text to itself."""

    def __missing__(self, key: str) -> str:
        return key


# Names nodes by their ids; see ``Node.entry``.
BY_ID: Mapping[str, str] = _Same()


class NamedNodes(Protocol):
    """Nodes by their names: a list of them by their indices, or a mapping by their ids."""

    def __getitem__(self, name: Any, /) -> Recipe: ...


class Node:
    """The base class of all nodes of a recipe. Two nodes are equal if their contents are equal.

    A new kind of node is a subclass with a ``kind``; it is a frozen dataclass with ``eq=False`` and defines the methods
    below. The materialiser (``evolver.merging``) defines how its tensors are computed.
    """

    kind: ClassVar[str]
    inputs: tuple[Recipe, ...]

    def __init_subclass__(cls) -> None:
        NODES[cls.kind] = cls

    def form(self) -> list[Any]:
        """The canonical form of which the id is the hash; inputs are given by their ids."""
        return self.form_of(self.entry(BY_ID))

    @classmethod
    def form_of(cls, entry: Sequence[Any]) -> list[Any]:
        """The canonical form of an entry in which the inputs are named by their ids: unless a kind leaves something out
        of its id, the entry after its kind.
        """
        return [cls.kind, *entry]

    def entry(self, place: Mapping[str, Any]) -> list[Any]:
        """The node as it is written into a recipe's JSON, after its kind.

        Args:
            place: what names every earlier node, by its id: its index or, with ``BY_ID``, the id itself. Inputs are
                written as these names.
        """
        raise NotImplementedError  # every node below says its own

    @classmethod
    def from_entry(cls, entry: Sequence[Any], nodes: NamedNodes) -> Self:
        """The inverse of ``entry``, given the nodes before it by their names."""
        raise NotImplementedError  # every node below says its own

    def describe(self) -> str:
        """A phrase that says how the model was made."""
        raise NotImplementedError  # every node below says its own

    @property
    def label(self) -> str:
        """A short label for diagrams."""
        return self.id[:6]

    @property
    def operations(self) -> tuple[str, ...]:
        """What was done to the inputs, in lines of a few words, for pictures."""
        return ()

    def needs(self, name: str) -> list[tuple[Recipe, str]]:
        """The tensors that the tensor ``name`` is computed from, each as its node and its name there."""
        return [(node, name) for node in self.below]

    def names(self, base: Sequence[str]) -> list[str]:
        """The names of the model's tensors, given those of the base in their order."""
        node: Node = self
        while node.inputs and type(node).names is Node.names:  # no recursion: a lineage can be thousands long
            node = node.inputs[0]
        return list(base) if type(node).names is Node.names else node.names(base)

    @property
    def below(self) -> tuple[Recipe, ...]:
        """The nodes whose tensors this one is computed from."""
        return self.inputs

    @cached_property
    def id(self) -> str:
        stack: list[Node] = [self]
        while stack:  # no recursion, as a lineage can be thousands of nodes long; the ids of inputs come first
            waiting = [i for i in stack[-1].below if "id" not in i.__dict__]
            stack.extend(waiting)
            if not waiting:
                node = stack.pop()
                node.__dict__.setdefault("id", content_hash(node.form()))
        found: str = self.__dict__["id"]
        return found

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id})"  # a full lineage would repeat a node for each path to it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)
