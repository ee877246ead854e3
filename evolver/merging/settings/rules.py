"""Settings of every tensor, written as the few rules that say the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from evolver.records.recipe import LAYER, Place, Rule, Value, layer_of

# A later stage is more particular, and its rules win: all tensors, a layer, a part of a layer, one tensor.
SaidValue = tuple[int, Place, Value]


def rules_of(values: Mapping[str, Mapping[str, Value]]) -> tuple[Rule, ...]:
    """Rules that give every tensor its settings.

    Args:
        values: settings by the tensor's name; every tensor has the same keys.
    """
    at: dict[tuple[int, Place], dict[str, Value]] = defaultdict(dict)
    for key in next(iter(values.values()), {}):
        for stage, place, value in _said({name: given[key] for name, given in values.items()}):
            at[stage, place][key] = value
    # A name that another one holds is the shorter one: of two that cover a tensor, its own comes last.
    ordered = sorted(at.items(), key=lambda item: (item[0][0], len(item[0][1].contains) if item[0][0] == 3 else 0))
    return tuple(Rule.of(given, place) for (_, place), given in ordered)


def _said(values: Mapping[str, Value]) -> Iterator[SaidValue]:
    """The rules of one setting."""
    usual = Counter(values.values()).most_common(1)[0][0]
    yield 0, Place(), usual
    by_layer: dict[int | None, list[str]] = defaultdict(list)
    for name in values:
        by_layer[layer_of(name)].append(name)
    whole: dict[str, list[tuple[int, Value]]] = defaultdict(list)
    singles: set[str] = set()
    for layer, names in by_layer.items():
        for part, members in _parts(names, values):
            if part is None:
                singles.update(n for n in members if values[n] != usual)
            elif (value := values[members[0]]) != usual:
                if layer is None:
                    yield 1, Place(outside=True), value
                else:
                    whole[part].append((layer, value))
    for part, run in whole.items():
        for first, end, value in _runs(run):
            yield 2 if part else 1, Place((first, end), contains=part), value
    # In the order of the tensors: that of a set is another one in every process, and with it would be the recipe's id.
    for name in values:
        if any(single in name for single in singles):
            yield 3, Place(contains=name), values[name]


def _parts(names: Sequence[str], values: Mapping[str, Value]) -> Iterator[tuple[str | None, list[str]]]:
    """The tensors of a layer in groups that have one value: all of them, or those of a part; the rest under None."""
    if len({values[n] for n in names}) == 1:
        yield "", list(names)
        return
    groups: dict[str | None, list[str]] = defaultdict(list)
    for name in names:
        groups[_part(name)].append(name)
    rest = groups.pop(None, [])
    for part, members in groups.items():
        alone = part is not None and members == [n for n in names if part in n]
        if alone and len({values[n] for n in members}) == 1:
            yield part, members
        else:
            rest += members
    yield None, rest


def _part(name: str) -> str | None:
    """What follows the layer's number, as in ``.mlp.``."""
    match = LAYER.search(name)
    return f".{name[match.end() :].split('.')[0]}." if match else None


def _runs(values: Sequence[tuple[int, Value]]) -> Iterator[tuple[int, int, Value]]:
    """Neighbouring layers of one value, as [first, end)."""
    numbered = enumerate(sorted(values, key=lambda v: v[0]))
    for (_, value), run in groupby(numbered, key=lambda item: (item[1][0] - item[0], item[1][1])):
        layers = [layer for _, (layer, _) in run]
        yield layers[0], layers[-1] + 1, value
