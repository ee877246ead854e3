"""The search space of a mergekit file that leaves values free."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evolver.config.recipes import RecipeText
from evolver.errors import BadInput
from evolver.merging.mergekit.free import METHOD_KEY, Free, filled, free_values
from evolver.merging.mergekit.reader import Configuration, configuration_of
from evolver.merging.methods import METHODS, Range
from evolver.records import Choice, Knob
from evolver.records.recipe import Expert, Layers, Merge, Recipe, layer_of
from evolver.storage.paths import expand, last_part
from evolver.storage.references import parts_of

# Numbers have so many digits, as a person would write them: so the written file makes the very model that was scored.
ROUND_TO = 6
# By multiples of this, weights are moved whose sum vanishes.
NUDGE = 1e-6


@dataclass(frozen=True)
class RecipeSpace:
    """The space of a mergekit file: see ``Space``. A point has a value for every place that the file leaves free.

    Args:
        text: the file.
        free: what it leaves free.
        nodes: its models by reference.
        names: of the base's tensors.
        seed: of methods that draw at random.
    """

    text: RecipeText
    free: tuple[Free, ...]
    nodes: Mapping[str, Expert]
    names: Sequence[str]
    seed: int = 0

    @property
    def knobs(self) -> tuple[Knob | Choice, ...]:
        """One for every free value, in the order of the file."""
        return tuple(free.knob for free in self.free)

    @property
    def branches(self) -> Mapping[str, RecipeSpace]:
        """None: a method that is searched is a choice like any other, because the file's settings hold for all."""
        return {}

    def within(self, branch: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Space``: there is no branch."""
        return dict(values)

    @property
    def start(self) -> dict[str, Any]:
        """The point at which a search begins: what the file names, else the middle of ranges and the first choices."""
        return {free.knob.name: free.start for free in self.free}

    @property
    def draws(self) -> bool:
        """Whether a method that it may use draws at random, so that the model depends on the seed."""
        of = {str(d[METHOD_KEY]) for d in self.text.documents if isinstance(d.get(METHOD_KEY), str)}
        of |= {str(o) for f in self.free if f.key == METHOD_KEY and isinstance(f.knob, Choice) for o in f.knob.options}
        return any("seed" in METHODS[name].settings for name in of)

    @property
    def tune(self) -> tuple[str, ...]:
        """None by a name of its own: the file marks what is searched."""
        return ()

    def encode_equal(self, mass: float) -> dict[str, Any]:
        """See ``Space``: the file says where a search begins, and no mass."""
        return self.start

    def axes(self, levels: Callable[[str], int]) -> tuple[tuple[dict[str, Any], ...], ...]:
        """See ``Space``: each free value has an axis of its own; it is called by the name of its parameter."""
        return tuple(tuple({f.knob.name: v} for v in _along(f.knob, levels(f.key))) for f in self.free)

    def decode(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe at a point. Numbers are rounded to six digits."""
        return self._made(values)[1]

    def encode(self, recipe: Recipe) -> dict[str, Any] | None:
        """The point that ``decode`` makes this very recipe of; None if there is none.

        Settings are linear in the numbers of a file, as a gradient is. So the numbers are found by least squares, and
        rounded as those that were searched; then the model is made of them again and has to be the same.
        """
        point, wanted = self.start, list(_settings(recipe, self.names))
        for free in self.free:
            if isinstance(free.knob, Choice):
                fits = {o: self._agreement({**point, free.knob.name: o}, wanted) for o in free.knob.options}
                point[free.knob.name] = max(fits, key=lambda option: fits[option])
        numbers = [free for free in self.free if isinstance(free.knob, Knob)]
        found = self._solved(point, numbers, wanted) if numbers else point
        if found is None:
            return None
        with contextlib.suppress(BadInput):
            return found if self.decode(found).id == recipe.id else None
        return None

    def written(self, values: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> str:
        """The file with the values of a point at their places, as YAML.

        Args:
            extra: further keys of the last document, which is the model.
        """
        documents = self._filled(self._made(values)[0])
        documents[-1] |= {k: v for k, v in (extra or {}).items() if k not in documents[-1]}
        return "---\n".join(yaml.safe_dump(d, sort_keys=False, allow_unicode=True) for d in documents)

    @cached_property
    def _by_name(self) -> Mapping[str, Free]:
        return {free.knob.name: free for free in self.free}

    def _filled(self, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        return filled(self.text.documents, {self._by_name[name].path: value for name, value in values.items()})

    def _recipe(self, values: Mapping[str, Any]) -> Recipe:
        return self._configuration(values).recipe(self.nodes, self.names, self.seed)

    def _configuration(self, values: Mapping[str, Any]) -> Configuration:
        return configuration_of(replace(self.text, documents=tuple(self._filled(values))))

    def _made(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], Recipe]:
        """The values as a file has them, and the recipe. Weights whose sum is 0 where it divides are moved a little."""
        rounded = {free.knob.name: _rounded(free, values[free.knob.name]) for free in self.free}
        try:
            return rounded, self._recipe(rounded)
        except BadInput:
            weights = [f for f in self.free if f.key == "weight" and isinstance(f.knob, Knob)]
            if not weights:
                raise
        moved = {f.knob.name: _moved(f, rounded[f.knob.name], NUDGE * (k + 1)) for k, f in enumerate(weights)}
        return rounded | moved, self._recipe(rounded | moved)

    def _agreement(self, point: Mapping[str, Any], wanted: Sequence[Any]) -> int:
        """How many settings of the model at a point are those that are wanted."""
        return sum(a == b for a, b in zip(_settings(self.decode(point), self.names), wanted, strict=False))

    def _solved(
        self, point: Mapping[str, Any], numbers: Sequence[Free], wanted: Sequence[Any]
    ) -> dict[str, Any] | None:
        """The point whose model has the wanted settings, by least squares; None where the settings are others."""
        middle = {f.knob.name: f.knob.at(0.5) for f in numbers if isinstance(f.knob, Knob)}
        here = list(_settings(self.decode({**point, **middle}), self.names))
        if len(here) != len(wanted):
            return None
        places = [n for n, (a, b) in enumerate(zip(here, wanted, strict=True)) if _is_float(a) and _is_float(b)]
        at = np.array([here[n] for n in places], dtype=np.float64)
        columns, rounded = [], {f.knob.name: _rounded(f, middle[f.knob.name]) for f in numbers}
        for free in numbers:
            assert isinstance(free.knob, Knob)
            name, end = free.knob.name, free.knob.high
            there = list(_settings(self.decode({**point, **middle, name: end}), self.names))
            step = _rounded(free, end) - rounded[name]
            columns.append((np.array([there[n] for n in places], dtype=np.float64) - at) / step)
        change = np.array([wanted[n] for n in places], dtype=np.float64) - at
        moves = np.linalg.lstsq(np.stack(columns, axis=1), change, rcond=None)[0]
        out = dict(point)
        for free, move in zip(numbers, moves.tolist(), strict=True):
            out[free.knob.name] = _rounded(free, rounded[free.knob.name] + move)
        return out


def recipe_space(
    text: RecipeText, names: Sequence[str], places: Mapping[str, Expert], base: str, key: str, seed: int = 0
) -> RecipeSpace:  # fmt: skip
    """The space of a file, checked.

    Args:
        names: of the base's tensors.
        places: base and experts by their locations.
        base: the location of the base.
        key: the key of the configuration, for messages.

    Raises BadInput for models that the configuration does not have, for a file without any free value, for what cannot
    be searched, and where no merge can be made of the values.
    """
    known = {spelling: node for place, node in places.items() for spelling in _spellings(place, base)}

    def label(model: str) -> str:
        node = known.get(_whole(model))
        return node.name if node else last_part(model) or model

    try:
        free = free_values(text, label)
        if not free:
            raise BadInput(
                f"{text.origin}: the file leaves no value free; write {{search: [LOW, HIGH]}} or ? in the place of a "
                "number, or merge it as it is with `evolver merge`."
            )
        _refuse_twice(text, free)
        space = RecipeSpace(text, free, {}, names, seed)
        nodes = {}
        for model in space._configuration(space.start).references:
            if _whole(model) not in known:
                raise BadInput(
                    f"{text.origin}: it merges {model}, which is neither the base nor an expert of this configuration; "
                    "write the same places in both files, or leave experts and model.base out."
                )
            nodes[model] = known[_whole(model)]
        space = replace(space, nodes=nodes)
        for point in _trials(space):
            space.decode(point)
    except BadInput as error:
        raise BadInput(f"{key}: {error}" if key and not str(error).startswith(f"{key}:") else str(error)) from error
    return space


def _refuse_twice(text: RecipeText, free: Sequence[Free]) -> None:
    """Raises BadInput where two values have one name, because two entries of a list have one filter."""
    seen: dict[str, Free] = {}
    for one in free:
        if one.knob.name in seen:
            raise BadInput(f"{text.at(one.path)}: {one.knob.name}: this value is there twice; write it once.")
        seen[one.knob.name] = one


def _trials(space: RecipeSpace) -> Iterator[dict[str, Any]]:
    """The start with each choice in turn, and the points at which a distance is largest beside a probability."""
    yield space.start
    for free in space.free:
        for option in free.knob.options if isinstance(free.knob, Choice) else ():
            yield {**space.start, free.knob.name: option}
    around = {s.search.around for m in METHODS.values() for s in m.settings.values() if isinstance(s.search, Range)}
    numbers = {f.knob.name: (f.key, f.knob) for f in space.free if isinstance(f.knob, Knob)}
    far = {name: knob.high for name, (key, knob) in numbers.items() if key not in around}
    for end in ("low", "high"):
        centres = {name: getattr(knob, end) for name, (key, knob) in numbers.items() if key in around}
        yield {**space.start, **far, **centres}


def _along(knob: Knob | Choice, levels: int) -> Sequence[Any]:
    if isinstance(knob, Choice):
        return knob.options
    return [knob.at(i / (levels - 1) if levels > 1 else 0.5) for i in range(levels)]


def _rounded(free: Free, value: Any) -> Any:
    if not isinstance(free.knob, Knob):
        return value
    number = float(f"{min(max(value, free.knob.low), free.knob.high):.{ROUND_TO}g}")
    number = min(max(number, free.knob.low), free.knob.high)
    return round(number) if free.whole else number


def _moved(free: Free, value: float, by: float) -> float:
    """A number moved a little, into its range."""
    assert isinstance(free.knob, Knob)
    return value + by if value + by <= free.knob.high else value - by


def _settings(recipe: Recipe, names: Sequence[str]) -> Iterator[Any]:
    """All that is set in the merges of a recipe, for tensor after tensor, in a fixed order."""
    if isinstance(recipe, Merge):
        yield recipe.method
        for name in recipe.names(names):
            for _, value in sorted(recipe.settings(name, layer_of(name)).items()):
                yield from value if isinstance(value, tuple) else (value,)
    for inner in recipe.inputs if isinstance(recipe, Merge | Layers) else ():
        yield from _settings(inner, names)


def _is_float(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _spellings(place: str, base: str) -> Iterator[str]:
    """How a mergekit file may name a model: an adapter also behind its base."""
    yield _whole(place)
    yield f"{_whole(base)}+{_whole(place)}"


def _whole(place: str) -> str:
    """A model's place in one spelling: of folders their absolute paths."""
    return "+".join(_absolute(part) for part in parts_of(place) if part)


def _absolute(place: str) -> str:
    path = Path(expand(place))
    return str(path.resolve()) if path.exists() else place
