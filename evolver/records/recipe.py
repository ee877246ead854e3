"""Recipes: small immutable graphs, each of which describes one model completely.

The id of a recipe is a Merkle hash: equal recipes have equal ids in every process, and a parent of many children is
hashed and sent only once. This module knows no tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from evolver.records.canonical import canonical_json
from evolver.records.node import NODES, NamedNodes, Node, finite_number
from evolver.records.noise import Noise

Value = bool | int | float | str | tuple[float, ...]
# Finds the number of the layer in a tensor's name.
LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
# Parts of the names of tensors that come before the layers.
EMBEDDINGS = ("embed", "wte", "wpe")
# What draws once in a crossover: a single weight, a row of a tensor, a tensor, or a layer.
MaskUnit = Literal["scalar", "row", "tensor", "layer"]


def _value(x: Any) -> Value:
    if isinstance(x, bool | str | int):
        return x
    if isinstance(x, float):
        return finite_number(x)
    return tuple(finite_number(v) for v in x)


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, or None for embeddings, final norm and head."""
    match = LAYER.search(name)
    return int(match.group(1)) if match else None


def part_rows(part: tuple[int, int] | None, rows: int) -> slice:
    """Which of so many rows a part has, see ``Place``; None: all. Parts of a few rows may have none."""
    number, count = part or (0, 1)
    return slice(number * rows // count, (number + 1) * rows // count)


def at_layer(name: str, layer: int) -> str:
    """The name of the same tensor in another layer."""
    match = LAYER.search(name)
    return name if match is None else f"{name[: match.start(1)]}{layer}{name[match.end(1) :]}"


@dataclass(frozen=True, eq=False, repr=False)
class Expert(Node):
    """A checkpoint that the user gave: an expert or the base.

    Attributes:
        name: its name, which does not influence the id.
        digest: hash of its tensors.
    """

    kind: ClassVar[str] = "expert"
    name: str
    digest: str
    inputs: tuple[Recipe, ...] = field(default=(), init=False)

    @classmethod
    def form_of(cls, entry: Sequence[Any]) -> list[Any]:
        return [cls.kind, entry[1]]

    def entry(self, place: Mapping[str, Any]) -> list[Any]:
        return [self.name, self.digest]

    @classmethod
    def from_entry(cls, entry: Sequence[Any], nodes: NamedNodes) -> Expert:
        return cls(*entry)

    def describe(self) -> str:
        return f"given as {self.name}"

    @property
    def label(self) -> str:
        return self.name


@dataclass(frozen=True)
class Place:
    """The tensors that a rule applies to.

    Attributes:
        layers: only tensors of the layers from the first number to before the second; None: of any layer.
        outside: only tensors that belong to no layer.
        contains: only tensors with this text in their name.
        part: only part number ``part[0]``, from 0, of the ``part[1]`` parts that the rows of every tensor are divided
            into, its slices along the first dimension; None: whole tensors.
    """

    layers: tuple[int, int] | None = None
    outside: bool = False
    contains: str = ""
    part: tuple[int, int] | None = None

    def covers(self, name: str, layer: int | None) -> bool:
        """Whether this is the place of the tensor ``name`` of ``layer`` (None: embeddings, final norm, head)."""
        if self.contains not in name:
            return False
        if self.outside:
            return layer is None
        return self.layers is None or (layer is not None and self.layers[0] <= layer < self.layers[1])

    def form(self) -> list[Any]:
        own = [list(self.layers) if self.layers else None, self.outside, self.contains]
        return own if self.part is None else [*own, list(self.part)]  # recipes of before parts keep their ids


@dataclass(frozen=True)
class Rule:
    """Settings for the tensors of one place. Where several rules of a merge set a value, the last one holds."""

    place: Place
    values: tuple[tuple[str, Value], ...]

    @staticmethod
    def of(values: Mapping[str, Any], place: Place | None = None) -> Rule:
        return Rule(place or Place(), tuple(sorted((k, _value(v)) for k, v in values.items())))

    def form(self) -> list[Any]:
        return [self.place.form(), [[k, list(v) if isinstance(v, tuple) else v] for k, v in self.values]]

    @staticmethod
    def from_form(form: Sequence[Any]) -> Rule:
        (layers, outside, contains, *part), values = form
        return Rule.of(
            dict(values), Place(tuple(layers) if layers else None, outside, contains, *(tuple(p) for p in part))
        )


@dataclass(frozen=True, eq=False, repr=False)
class Statistic(Node):
    """What a collector has found out about a model on some items: tensors with names and shapes of their own.

    It is a source like an expert, made from data and not from tensors; no model, so that nothing but a merge uses it.

    Args:
        collected: the name of its collector.
        of: the model.
        items: the hash of the items.
    """

    kind: ClassVar[str] = "statistic"
    collected: str
    of: Recipe
    items: str
    inputs: tuple[Recipe, ...] = field(default=(), init=False)

    @property
    def below(self) -> tuple[Recipe, ...]:
        return (self.of,)

    def needs(self, name: str) -> list[tuple[Recipe, str]]:
        return []

    def entry(self, place: Mapping[str, Any]) -> list[Any]:
        return [self.collected, place[self.of.id], self.items]

    @classmethod
    def from_entry(cls, entry: Sequence[Any], nodes: NamedNodes) -> Statistic:
        collected, of, items = entry
        return cls(collected, nodes[of], items)

    def describe(self) -> str:
        return f"{self.collected} of {self.of.label} on dev items ({self.items[:8]})"


@dataclass(frozen=True, eq=False, repr=False)
class Merge(Node):
    """A merge method applied to its inputs. Task vectors are the differences of the inputs to ``base``.

    ``statistics`` are those that the method asks for: of every kind, in the order in which its signature names them,
    one for each input, in the order of the inputs; or, of the base alone, as many of each kind as there are experts.
    """

    kind: ClassVar[str] = "merge"
    method: str
    inputs: tuple[Recipe, ...]
    base: Recipe
    rules: tuple[Rule, ...] = ()
    statistics: tuple[Statistic, ...] = ()

    @property
    def below(self) -> tuple[Recipe, ...]:
        return (*self.inputs, self.base, *self.statistics)

    def needs(self, name: str) -> list[tuple[Recipe, str]]:
        return [(node, name) for node in (*self.inputs, self.base)]

    def entry(self, place: Mapping[str, Any]) -> list[Any]:
        own = [self.method, [place[i.id] for i in self.inputs], place[self.base.id], [r.form() for r in self.rules]]
        return own + ([[place[s.id] for s in self.statistics]] if self.statistics else [])

    @classmethod
    def from_entry(cls, entry: Sequence[Any], nodes: NamedNodes) -> Merge:
        method, places, base, rules, *more = entry
        wanted = more[0] if more else ()
        statistics = tuple(s for i in wanted if isinstance(s := nodes[i], Statistic))
        if len(statistics) < len(wanted):
            raise ValueError("something among the statistics of a merge is not a statistic")
        inputs = tuple(nodes[i] for i in places)
        return cls(method, inputs, nodes[base], tuple(Rule.from_form(r) for r in rules), statistics)

    def describe(self) -> str:
        return f"merge ({self.method})"

    @property
    def label(self) -> str:
        return self.method

    @property
    def operations(self) -> tuple[str, ...]:
        return "merge", self.method

    def settings(self, name: str, layer: int | None, part: tuple[int, int] | None = None) -> dict[str, Value]:
        """The settings in force for the tensor ``name`` of ``layer``, or for one part of it; rules for other parts do
        not count.
        """
        out: dict[str, Value] = {}
        for number in self.ruling(name, layer, part):
            out.update(self.rules[number].values)
        return out

    def ruling(self, name: str, layer: int | None, part: tuple[int, int] | None = None) -> list[int]:
        """The numbers of the rules for a tensor, or for one part of it."""
        return [
            number
            for number, rule in enumerate(self.rules)
            if rule.place.part in (None, part) and rule.place.covers(name, layer)
        ]

    def parts(self, name: str, layer: int | None) -> tuple[tuple[int, int] | None, ...]:
        """The parts of a tensor that have settings of their own; only None where it is merged as a whole.

        Raises ValueError where rules divide it in different ways.
        """
        found = {r.place.part[1] for r in self.rules if r.place.part is not None and r.place.covers(name, layer)}
        if len(found) > 1:
            raise ValueError(f"{name} is divided into {' and into '.join(map(str, sorted(found)))} parts")
        return tuple((number, count) for count in found for number in range(count)) or (None,)


@dataclass(frozen=True, eq=False, repr=False)
class Cross(Node):
    """The mutation and crossover of Evolver (Du et al. 2024): a mutant of the population is crossed with the parent.

    Each unit of the ``mask`` takes the mutant's values with probability Cr, else the parent's. The operator as the
    authors released it draws for each scalar. Coarser units are the rows of a tensor (its vectors along the last
    dimension; a vector is one row), whole tensors, and layers; all embeddings are one more layer, and so is everything
    else outside the layers. The random numbers are a function of ``seed``, the tensor's name (or the layer) and the
    index of the scalar or row, so they do not depend on the order of computation.
    """

    kind: ClassVar[str] = "cross"
    parent: Recipe
    partners: tuple[Recipe, ...]
    strategy: str
    F: float
    Cr: float
    seed: int
    mask: MaskUnit = "scalar"

    def __post_init__(self) -> None:
        object.__setattr__(self, "F", finite_number(self.F))
        object.__setattr__(self, "Cr", finite_number(self.Cr))
        if self.mask not in get_args(MaskUnit):
            raise ValueError(f"a crossover has no mask {self.mask!r}")

    @property
    def inputs(self) -> tuple[Recipe, ...]:  # type: ignore[override]  # derived here, stored in the other nodes
        return (self.parent, *self.partners)

    def entry(self, place: Mapping[str, Any]) -> list[Any]:
        return [[place[i.id] for i in self.inputs], *self._numbers()]

    def _numbers(self) -> list[Any]:
        """What is written beside the inputs. A mask by scalars is left out: recipes of before coarser ones keep ids."""
        own = [self.strategy, self.F, self.Cr, self.seed]
        return own if self.mask == "scalar" else [*own, self.mask]

    @classmethod
    def from_entry(cls, entry: Sequence[Any], nodes: NamedNodes) -> Cross:
        (parent, *partners), *numbers = entry
        return cls(nodes[parent], tuple(nodes[i] for i in partners), *numbers)

    def describe(self) -> str:
        return f"crossover{self._by} ({self.strategy}, F {self.F:g}, Cr {self.Cr:g}, seed {self.seed})"

    @property
    def operations(self) -> tuple[str, ...]:
        return f"mutation {self.strategy}", f"crossover{self._by} Cr {self.Cr:g}"

    @property
    def _by(self) -> str:
        return "" if self.mask == "scalar" else f" by {self.mask}s"

    def unit(self, name: str) -> str:
        """What the draws of a tensor are named by: with a mask by layers its layer, else the tensor itself.

        A layer is named by the tensor's name up to its number, so that those of an encoder and of a decoder differ.
        """
        if self.mask != "layer":
            return name
        match = LAYER.search(name)
        if match:
            return name[: match.end(1)]
        return "before the layers" if any(e in name for e in EMBEDDINGS) else "after the layers"


@dataclass(frozen=True, eq=False, repr=False)
class Layers(Node):
    """A model put together from layers of its inputs, possibly with another number of layers.

    Layer k of the model is layer ``program[k][1]`` of input number ``program[k][0]``. Embeddings come from input number
    ``ends[0]``, and all other tensors outside the layers from input number ``ends[1]``.
    """

    kind: ClassVar[str] = "layers"
    inputs: tuple[Recipe, ...]
    program: tuple[tuple[int, int], ...]
    ends: tuple[int, int]

    def source(self, name: str) -> tuple[Recipe, str]:
        """The input that the tensor ``name`` comes from, and the tensor's name there."""
        layer = layer_of(name)
        if layer is None:
            return self.inputs[self.ends[0 if any(e in name for e in EMBEDDINGS) else 1]], name
        number, of = self.program[layer]
        return self.inputs[number], at_layer(name, of)

    def needs(self, name: str) -> list[tuple[Recipe, str]]:
        return [self.source(name)]

    def names(self, base: Sequence[str]) -> list[str]:
        made: dict[str, list[str]] = {}
        stack: list[Layers] = [self]
        while stack:  # each model once, and no recursion, as programs can be nested deeply
            programs = [_program_of(node) for node in stack[-1].inputs]
            waiting = [p for p in programs if p is not None and p.id not in made]
            stack.extend(waiting)
            if not waiting:
                node = stack.pop()
                made[node.id] = node._names([list(base) if p is None else made[p.id] for p in programs])
        return made[self.id]

    def _names(self, of_inputs: Sequence[Sequence[str]]) -> list[str]:
        """The names of its tensors, given those of each input."""
        outside = [n for n in of_inputs[0] if layer_of(n) is None]
        copies = enumerate(self.program)
        return outside + [at_layer(n, to) for to, (i, of) in copies for n in of_inputs[i] if layer_of(n) == of]

    def entry(self, place: Mapping[str, Any]) -> list[Any]:
        return [[place[i.id] for i in self.inputs], [list(p) for p in self.program], list(self.ends)]

    @classmethod
    def from_entry(cls, entry: Sequence[Any], nodes: NamedNodes) -> Layers:
        places, program, (first, last) = entry
        copies = tuple((int(i), int(layer)) for i, layer in program)
        return cls(tuple(nodes[i] for i in places), copies, (int(first), int(last)))

    def describe(self) -> str:
        return "layers put together"

    @property
    def operations(self) -> tuple[str, ...]:
        return ("layers combined",)


def _program_of(node: Recipe) -> Layers | None:
    """The layer program that decides which tensors a model has; None where it has those of the base."""
    while not isinstance(node, Layers) and node.inputs:
        node = node.inputs[0]
    return node if isinstance(node, Layers) else None


# Every kind of node. Statistics stand inside of recipes only.
Recipe = Expert | Merge | Cross | Noise | Layers | Statistic


def ancestors(recipe: Recipe, known: Container[str] = ()) -> Iterator[Recipe]:
    """Every node of the recipe once. Inputs come before the nodes that use them, and the recipe itself comes last.

    Args:
        known: ids of nodes that are left out. What is below them is not looked at.
    """
    seen: set[str] = set()
    stack: list[tuple[Recipe, bool]] = [(recipe, False)]
    while stack:  # no recursion: a lineage can be thousands of generations deep
        node, expanded = stack.pop()
        if expanded:
            yield node
        elif node.id not in seen and node.id not in known:
            seen.add(node.id)
            stack.append((node, True))
            stack.extend((i, False) for i in reversed(node.below))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as JSON: a list of its nodes, in which inputs are indices. Each node is written only once."""
    index: dict[str, int] = {}
    program: list[list[Any]] = []
    for node in ancestors(recipe):
        program.append([node.kind, *node.entry(index)])
        index[node.id] = len(index)
    return canonical_json(program)


def load_recipe(text: str) -> Recipe:
    """The inverse of ``dump_recipe``.

    Raises ValueError where the text is not a recipe.
    """
    nodes: list[Recipe] = []
    try:
        for kind, *entry in json.loads(text):
            if kind not in NODES:
                raise ValueError(f"unknown kind of node {kind!r}")
            nodes.append(NODES[kind].from_entry(entry, nodes))  # type: ignore[arg-type]  # each kind is a recipe
        if isinstance(nodes[-1], Statistic):
            raise ValueError("a statistic is not a model")
        return nodes[-1]
    except (TypeError, IndexError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a recipe: {error}") from error
