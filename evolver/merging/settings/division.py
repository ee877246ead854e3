"""Where a search has coefficients of their own: the places of a model, and how its tensors depend on them.

A place is a group of layers, a class of tensors, both at a time, or a knot of a spline along the depth of the model.
Tensors outside of the layers (embeddings, final norm, head) are a place of their own wherever layers are told apart.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from evolver.errors import BadInput
from evolver.merging.settings.rules import rules_of
from evolver.records.recipe import Place, layer_of

Groups = int | Literal["per-layer"]
# The places whose coefficients a tensor takes, each with its share; the shares sum to 1.
Blend = tuple[tuple[str, float], ...]

_OUTSIDE = "@outside"
NORM = re.compile(r"norm|(^|[._])ln([_.\d]|$)")
ATTENTION = re.compile(r"attn|attention")
# After the two above: an encoder's ``output.dense`` is a part of its MLP, unless it is one of its attention.
MLP = re.compile(r"mlp|ffn|feed_?forward|moe|expert|intermediate|densereludense|(^|[._])(fc\d|output\.dense)[._]")


@dataclass(frozen=True)
class Division:
    """The places of a model that have coefficients of their own.

    Attributes:
        suffixes: of every place, what the names of its coefficients end with, such as ``@0-2``.
        parts: of every part of the model, the tensors that it holds, and the places whose coefficients they take. Where
            several parts hold a tensor, the last one counts.
    """

    suffixes: tuple[str, ...]
    parts: tuple[tuple[Place, Blend], ...]

    def tensors(self, names: Iterable[str]) -> dict[str, dict[str, float]]:
        """Of every place, by its suffix, the tensors that take its coefficients, each with its share of them."""
        out: dict[str, dict[str, float]] = {suffix: {} for suffix in self.suffixes}
        for name in names:
            blends = [blend for place, blend in self.parts if place.covers(name, layer_of(name))]
            for suffix, share in blends[-1] if blends else ():
                out[suffix][name] = share
        return out

    def unblended(self, values: Sequence[Any]) -> dict[str, Any] | None:
        """The value of one setting at every place, given that of every part; None where no places have these parts.

        Where a part lies on a place, its value is the place's. Knots between layers follow by least squares: a layer
        lies between each knot and the next one, so there is one solution.
        """
        own = {blend[0][0]: value for (_, blend), value in zip(self.parts, values, strict=True) if len(blend) == 1}
        first = {blend[0][0]: value for (_, blend), value in reversed([*zip(self.parts, values, strict=True)])}
        if isinstance(values[0], bool | str):  # it holds from its knot to the next
            found = {suffix: own.get(suffix, first.get(suffix)) for suffix in self.suffixes}
            held = all(found[blend[0][0]] == value for (_, blend), value in zip(self.parts, values, strict=True))
            return found if held else None
        shares = np.array([[dict(blend).get(suffix, 0.0) for suffix in self.suffixes] for _, blend in self.parts])
        wanted = np.array(values, dtype=float).reshape(len(values), -1)
        solved = np.linalg.lstsq(shares, wanted, rcond=None)[0]
        if not np.allclose(shares @ solved, wanted, rtol=1e-9, atol=1e-9):
            return None
        # A knot is not known better than this; rounded so, one at the end of its range stays in it.
        rounded = [tuple(float(round(v, 12)) for v in row) for row in solved]
        whole = isinstance(values[0], tuple)
        return {
            suffix: own.get(suffix, row if whole else row[0])
            for suffix, row in zip(self.suffixes, rounded, strict=True)
        }


def division_of(names: Sequence[str], groups: Groups, classes: bool, knots: int | None, where: str) -> Division:
    """Divide a model.

    Args:
        names: of its tensors.
        groups: number of groups of layers; per-layer: every layer is one.
        classes: whether attention, MLP, norms and the rest are told apart.
        knots: number of the knots of a spline along the layers; None: no spline.
        where: names the section of the configuration in errors.

    Raises BadInput where the model has no layers, fewer than groups or knots, or tensors of one class only.
    """
    layers = 1 + max((layer for n in names if (layer := layer_of(n)) is not None), default=-1)
    _check(layers, groups, knots, where)
    count = layers if groups == "per-layer" else groups
    if knots is not None:
        cells = _spline(layers, knots)
    elif count == 1:
        cells = [((0, layers), "", (("", 1.0),))]
    else:
        cells = [((a, b), f"@{a}-{b - 1}", ((f"@{a}-{b - 1}", 1.0),)) for a, b in _ranges(layers, count)]
    if classes:
        return _by_class(names, cells, whole=count == 1 and knots is None, where=where)
    if count == 1 and knots is None:
        return Division(("",), ((Place(), (("", 1.0),)),))
    parts = [(Place(outside=True), ((_OUTSIDE, 1.0),)), *((Place(span), blend) for span, _, blend in cells)]
    return Division(_suffixes(blend for _, blend in parts), tuple(parts))


def tensor_class(name: str) -> str:
    """What a tensor is a part of, by its name: attention, mlp, norm, or other."""
    lower = name.lower()
    if NORM.search(lower):
        return "norm"
    if ATTENTION.search(lower):
        return "attention"
    return "mlp" if layer_of(name) is not None and MLP.search(lower) else "other"


# The layers from the first number to before the second, their name, and the places whose coefficients they take.
_Cell = tuple[tuple[int, int], str, Blend]


def _check(layers: int, groups: Groups, knots: int | None, where: str) -> None:
    if not layers and (groups != 1 or knots is not None):
        key = "layer_groups" if groups != 1 else "knots"
        raise BadInput(
            f"{where}.{key}: the names of the base's tensors tell of no layers, so they cannot have coefficients of "
            f"their own; leave {key} out."
        )
    if groups != "per-layer" and not 1 <= groups <= max(layers, 1):
        raise BadInput(f"{where}.layer_groups: {groups} groups of {layers} layers; write a number from 1 to {layers}.")
    if knots is None:
        return
    if groups != 1:
        raise BadInput(f"{where}.knots: a spline stands in the place of groups of layers; leave one of the two out.")
    if not 2 <= knots <= layers:
        raise BadInput(
            f"{where}.knots: a spline of {knots} knots through {layers} layers; "
            + (f"write a number from 2 to {layers}." if layers > 1 else "leave knots out.")
        )


def _ranges(layers: int, groups: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise(round(g * layers / groups) for g in range(groups + 1)))


def _spline(layers: int, knots: int) -> list[_Cell]:
    """Knots at equal distances from the first layer to the last one, with a straight line from each to the next: the
    same as a gradient with so many values. So numbers stay in their range, and weights sum to 1.
    """
    out: list[_Cell] = []
    for layer in range(layers):
        below, rest = divmod(layer * (knots - 1), layers - 1)
        share = rest / (layers - 1)
        blend: Blend = ((f"@knot{below}", 1.0 - share),)
        if rest:
            blend = (*blend, (f"@knot{below + 1}", share))
        out.append(((layer, layer + 1), f"@{layer}", blend))
    return out


def _by_class(names: Sequence[str], cells: Sequence[_Cell], whole: bool, where: str) -> Division:
    """The same cells, each divided by the classes of its tensors.

    Args:
        whole: whether the only cell is the whole model, so that what lies outside of the layers belongs to it, too.
    """
    if len({tensor_class(n) for n in names}) == 1:
        raise BadInput(
            f"{where}.tensor_classes: the names of the base's tensors do not tell attention, MLP and norms apart; "
            "leave tensor_classes out."
        )
    blends: dict[str, Blend] = {}
    at: dict[str, dict[str, str]] = {}
    for name in names:
        layer, kind, label = layer_of(name), tensor_class(name), _OUTSIDE
        if layer is None and not whole:
            blends[label] = ((_OUTSIDE, 1.0),)
        else:
            ((_, title, own),) = (c for c in cells if whole or c[0][0] <= (layer or 0) < c[0][1])
            label = _joined(title, kind)
            blends[label] = tuple((_joined(suffix, kind), share) for suffix, share in own)
        at[name] = {"cell": label}
    parts = tuple((rule.place, blends[str(rule.values[0][1])]) for rule in rules_of(at))
    return Division(_suffixes(blends.values()), parts)


def _joined(suffix: str, kind: str) -> str:
    return f"{suffix}/{kind}" if suffix else f"@{kind}"


def _suffixes(blends: Iterable[Blend]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(suffix for blend in blends for suffix, _ in blend))
