"""The drawing of a lineage: boxes in layers, from the experts at the top down to the model.

It is laid out as Sugiyama, Tagawa and Toda (1981) do it: layers by the longest path, an order within each layer that
crosses few arrows, and places near those of the neighbours.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from evolver.records.noise import Noise
from evolver.records.recipe import Cross, Expert, Recipe, Statistic, ancestors

MOST_MODELS, MOST_EXPERTS = 20, 12  # that a drawing shows at most: more cannot be read
FEWEST = 6  # models that it shows, however many arrows cross
CROSSINGS = 25  # of arrows, above which fewer models are shown
LEFT_OUT = "left out"  # the id of the box that stands for the others
BOX, BEND, GAP = 104.0, 12.0, 11.0  # widths: of a box, of an arrow that passes a layer, and between them, in pixels
SPREAD = 0.7  # the part of the width of a box on which arrows begin and end
SWEEPS = 12

Arrow = tuple[str, str]


@dataclass
class Graph:
    """The boxes that are drawn, and the arrows between them from what is used to what uses it.

    Attributes:
        boxes: models by id, and None under ``LEFT_OUT``; what is used stands before what uses it.
        arrows: with what the model is used for: ``parent``, ``partner`` of a mutation, ``base`` of task vectors,
            ``scale`` of noise, ``statistics`` that were collected on it.
    """

    boxes: dict[str, Recipe | None] = field(default_factory=dict)
    arrows: dict[Arrow, str] = field(default_factory=dict)


def drawing(recipe: Recipe, numbers: Mapping[str, int]) -> dict[str, Any]:
    """A lineage as pages draw it.

    Args:
        numbers: of the search's candidates, by their recipes' ids.

    Returns:
        ``nodes`` with their texts, their ``row`` from the top and ``x`` of their middle in pixels; ``edges`` with the
        ``points`` (x, row) that they pass, and their ``kind``; ``width`` and ``rows`` of the whole; how many models
        are shown and how many there are.
    """
    everybody = [node for node in ancestors(recipe) if not isinstance(node, Statistic)]
    for most in range(MOST_MODELS, FEWEST - 1, -2):
        graph = nearest_models(recipe, everybody, most)
        found = Layout(graph)
        if found.crossings <= CROSSINGS:
            break
    shown = sum(node is not None for node in graph.boxes.values())
    return {
        "nodes": [{**box_texts(key, node, numbers, len(everybody) - shown), "x": round(found.x[key], 1),
                   "row": found.row[key]} for key, node in graph.boxes.items()],
        "edges": [{"points": found.points(arrow), "kind": kind} for arrow, kind in graph.arrows.items()],
        "rows": len(found.rows), "width": round(found.width, 1), "shown": shown, "models": len(everybody),
    }  # fmt: skip


def box_texts(key: str, node: Recipe | None, numbers: Mapping[str, int], left_out: int) -> dict[str, Any]:
    """The texts of a box: a name, the operations that made the model, and a description in words."""
    if node is None:
        return {"id": key, "label": f"{left_out} more", "lines": ["models between"], "role": "left out", "number": None,
                "made": f"{left_out} more models of this lineage are not drawn"}  # fmt: skip
    number = numbers.get(key)
    label = node.label if isinstance(node, Expert) or number is None else f"candidate {number}"
    role = "expert" if isinstance(node, Expert) else "model"
    return {"id": key, "label": label, "lines": list(node.operations), "role": role, "number": number,
            "made": node.describe()}  # fmt: skip


def nearest_models(recipe: Recipe, everybody: Sequence[Recipe], most: int) -> Graph:
    """The ``most`` models that are the fewest steps away from the last one, and the experts; one box stands for all
    others.
    """
    steps, found = [recipe], {recipe.id: recipe}
    for node in steps:  # breadth first: the list grows while it is gone through
        for below, _ in uses(node):
            if below.id not in found:
                found[below.id] = below
                steps.append(below)
    models = [node.id for node in steps if not isinstance(node, Expert)][:most]
    used = {below.id for node in steps if node.id in models for below, _ in uses(node)}
    experts = sorted((n.id for n in everybody if isinstance(n, Expert)), key=lambda key: key not in used)[:MOST_EXPERTS]
    kept = {*models, *experts}
    graph = Graph()
    for node in everybody:
        if node.id in kept and isinstance(node, Expert):
            graph.boxes[node.id] = node
    if any(node.id not in kept for node in everybody):
        graph.boxes[LEFT_OUT] = None
        hidden = [node for node in everybody if node.id not in kept]
        sources = {below.id for node in hidden for below, _ in uses(node)}
        graph.arrows |= {(key, LEFT_OUT): "parent" for key in experts if key in sources}
    for node in everybody:
        if node.id in kept and not isinstance(node, Expert):
            graph.boxes[node.id] = node
            for below, kind in uses(node):
                graph.arrows.setdefault((below.id if below.id in kept else LEFT_OUT, node.id), kind)
    return graph


def uses(node: Recipe) -> Iterator[tuple[Recipe, str]]:
    """What a model is made of, and what each of these is used for."""
    for below in node.below:
        if isinstance(below, Statistic):  # no model itself: it stands for the one that it is of
            yield below.of, "statistics"
        elif isinstance(node, Cross):
            yield below, "parent" if below is node.parent else "partner"
        elif isinstance(node, Noise):
            yield below, "parent" if below == node.point else "scale"
        else:
            yield below, "parent" if below in node.inputs else "base"


class Layout:
    """The positions of all boxes and arrows.

    Attributes:
        rows: of each layer from the top the boxes, and the bends of arrows that pass it, from the left.
        x: of their middles, in pixels.
        crossings: of arrows.
        width: of the whole.
    """

    def __init__(self, graph: Graph) -> None:
        self.row = layers(graph)
        self.rows: list[list[str]] = [[] for _ in range(1 + max(self.row.values()))]
        for key in graph.boxes:
            self.rows[self.row[key]].append(key)
        self._boxes = set(graph.boxes)
        self._chains = {arrow: self._chain(arrow) for arrow in graph.arrows}
        self._above: dict[str, list[str]] = defaultdict(list)
        self._below: dict[str, list[str]] = defaultdict(list)
        for chain in self._chains.values():
            for upper, lower in itertools.pairwise(chain):
                self._above[lower].append(upper)
                self._below[upper].append(lower)
        self._order()
        self.width = max(sum(self._size(key) + GAP for key in row) - GAP for row in self.rows)
        self.x = self._places()

    def points(self, arrow: Arrow) -> list[list[float]]:
        """Where an arrow begins, bends and ends."""
        chain = self._chains[arrow]
        middle = [[round(self.x[key], 1), self.row[key]] for key in chain]
        middle[0][0] = round(self._port(chain[0], chain[1], self._below), 1)
        middle[-1][0] = round(self._port(chain[-1], chain[-2], self._above), 1)
        return middle

    def _chain(self, arrow: Arrow) -> list[str]:
        """An arrow by way of a bend in every layer that it passes."""
        start, end = arrow
        bends = []
        for row in range(self.row[start] + 1, self.row[end]):
            bends.append(f"{start} to {end} in {row}")
            self.row[bends[-1]] = row
            self.rows[row].append(bends[-1])
        return [start, *bends, end]

    def _order(self) -> None:
        """Order each layer by the middles of the neighbours, downwards and upwards, and keep the order that crosses
        fewest arrows.
        """
        best, self.crossings = [list(row) for row in self.rows], self._crossings()
        for sweep in range(SWEEPS):
            down = sweep % 2 == 0
            for row in self.rows[1:] if down else self.rows[-2::-1]:
                place = {key: p for other in self.rows for p, key in enumerate(other)}
                mean = {key: _mean((place[n] for n in (self._above if down else self._below)[key]), place[key])
                        for key in row}  # fmt: skip
                row.sort(key=mean.__getitem__)
            crossed = self._crossings()
            if crossed < self.crossings:
                best, self.crossings = [list(row) for row in self.rows], crossed
        self.rows = best

    def _crossings(self) -> int:
        count = 0
        for upper, lower in itertools.pairwise(self.rows):
            place = {key: p for p, key in enumerate(lower)}
            ends = [sorted(place[n] for n in self._below[key]) for key in upper]
            for left, right in itertools.combinations(ends, 2):
                count += sum(a > b for a in left for b in right)
        return count

    def _places(self) -> dict[str, float]:
        """Places near the middles of the neighbours, none over another, and none beside the widest layer."""
        x = {
            key: place for row in self.rows for key, place in zip(row, self._apart(row, [0.0] * len(row)), strict=True)
        }
        for sweep in range(SWEEPS):
            down = sweep % 2 == 0
            for row in self.rows[1:] if down else self.rows[-2::-1]:
                wanted = [_mean((x[n] for n in (self._above if down else self._below)[key]), x[key]) for key in row]
                x |= dict(zip(row, self._apart(row, wanted), strict=True))
        return x

    def _apart(self, row: Sequence[str], wanted: Sequence[float]) -> list[float]:
        """The wanted places, moved until nothing overlaps, by as little to the left as to the right."""
        placed: list[float] = []
        for k, (key, place) in enumerate(zip(row, wanted, strict=True)):
            least = placed[-1] + (self._size(row[k - 1]) + self._size(key)) / 2 + GAP if placed else place
            placed.append(max(place, least))
        back = fmean(p - w for p, w in zip(placed, wanted, strict=True))
        left = 0.0
        behind = list(itertools.accumulate((self._size(key) + GAP for key in reversed(row)), initial=0.0))[-2::-1]
        for k, key in enumerate(row):
            right = self.width - behind[k]  # room for those that come after it
            placed[k] = max(left + self._size(key) / 2, min(placed[k] - back, right - self._size(key) / 2))
            left = placed[k] + self._size(key) / 2 + GAP
        return placed

    def _port(self, key: str, other: str, neighbours: Mapping[str, list[str]]) -> float:
        """Where an arrow meets its box: arrows stand side by side, in the order of their other ends."""
        ends = sorted(set(neighbours[key]), key=self.x.__getitem__)
        part = (ends.index(other) + 0.5) / len(ends) - 0.5
        return self.x[key] + SPREAD * BOX * part

    def _size(self, key: str) -> float:
        return BOX if key in self._boxes else BEND


def layers(graph: Graph) -> dict[str, int]:
    """The layer of every box: the longest way to it from a box that uses none."""
    row = dict.fromkeys(graph.boxes, 0)
    for key in graph.boxes:  # what is used stands before what uses it
        row[key] = max((row[start] + 1 for start, end in graph.arrows if end == key), default=int(key == LEFT_OUT))
    return row


def _mean(values: Iterable[float], otherwise: float) -> float:
    found = list(values)
    return fmean(found) if found else otherwise
