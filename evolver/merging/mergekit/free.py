"""The values that a mergekit file leaves free: where they stand, and what a search may put there.

In the place of a value stands ``{search: [LOW, HIGH]}``, with ``log: true`` for a log scale and ``start`` for the value
that a search begins with; ``{choices: [...]}``; or ``?`` (or ``{search: default}``), which is the method's own range or
the words that it knows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evolver.config.recipes import RecipeText, ValuePath, reference
from evolver.errors import BadInput, nearest
from evolver.merging.mergekit.parameters import SILENT, settings_of
from evolver.merging.methods import METHODS, Method, Range, Setting, Simplex, get
from evolver.records import Choice, Knob
from evolver.storage.paths import last_part

METHOD_KEY = "merge_method"
FREE_MARK, DEFAULT = "?", "default"
SPEC_KEYS = ("search", "choices", "log", "start")
CONDITION = ("filter", "value")
# Handed in by Evolver itself: the seed of the run, and whether there is a base.
HANDED = ("seed", "task_vectors")
EXAMPLE = "{search: [LOW, HIGH]}"


@dataclass(frozen=True)
class Free:
    """One value that is searched.

    Attributes:
        path: where it stands: the number of the document, then keys and numbers.
        key: the parameter that it is a value of.
        knob: its range or choices, under a name that says the place.
        start: the value that a search begins with.
        whole: it is an integer.
    """

    path: ValuePath
    key: str
    knob: Knob | Choice
    start: Any
    whole: bool = False

    @property
    def said(self) -> str:
        """The name and the range, in words."""
        knob = self.knob
        if isinstance(knob, Choice):
            return f"{knob.name}: {' or '.join(_word(o) for o in knob.options)}"
        return f"{knob.name}: {knob.low:g} to {knob.high:g}{' on a log scale' if knob.log else ''}"


def is_free(value: Any) -> bool:
    """Whether something stands in the place of a value that is to be searched."""
    return value == FREE_MARK or (isinstance(value, Mapping) and any(key in value for key in SPEC_KEYS[:2]))


def free_values(text: RecipeText, label: Callable[[str], str]) -> tuple[Free, ...]:
    """All that a file leaves free, in its order.

    Args:
        label: a short name of a model by its reference, for the names of the values.

    Raises BadInput that names file and line for what cannot be searched; none may be there.
    """
    found = []
    for number, document in enumerate(text.documents):
        methods = _methods(text, number, document)
        prefix = f"{document.get('name') or number + 1}/" if len(text.documents) > 1 else ""
        if is_free(document.get(METHOD_KEY)):
            options = tuple(m.name for m in methods)
            found.append(Free((number, METHOD_KEY), METHOD_KEY, Choice(f"{prefix}{METHOD_KEY}", options), options[0]))
        known: set[ValuePath] = {(number, METHOD_KEY)}
        for block in _blocks(document, (number,), prefix, label, reference(document.get("base_model"))):
            for key, given in block.parameters.items():
                path = (*block.path, key)
                known.add(path)
                for place, name, value in _values(given, path, f"{block.name}{key}"):
                    found.append(_Place(text, place, name, key, methods, block.models).free(value))
        _refuse_elsewhere(text, document, (number,), known)
    return tuple(found)


def refuse_free(text: RecipeText) -> None:
    """Raises BadInput for a file that leaves values free, where it is to be merged as it is."""
    paths = [path for number, d in enumerate(text.documents) for path in _marks(d, (number,))]
    if paths:
        raise BadInput(
            f"{text.at(paths[0])}: the file leaves {len(paths)} values free; write numbers, or search for them with "
            "`evolver run` and a configuration that has search: {algorithm: cmaes, recipe: FILE}."
        )


def at_start(text: RecipeText) -> RecipeText:
    """The file with the values that a search begins with.

    Raises BadInput for what cannot be searched.
    """
    values = {free.path: free.start for free in free_values(text, last_part)}
    return replace(text, documents=tuple(filled(text.documents, values)))


def filled(documents: Sequence[Mapping[str, Any]], values: Mapping[ValuePath, Any]) -> list[dict[str, Any]]:
    """Copies of the documents with values at their places."""
    out = [copy.deepcopy(dict(document)) for document in documents]
    for path, value in values.items():
        inside: Any = out
        for step in path[:-1]:
            inside = inside[step]
        inside[path[-1]] = value
    return out


@dataclass(frozen=True)
class _Block:
    """Parameters of one place in a file; ``models`` are merged there."""

    parameters: Mapping[str, Any]
    path: ValuePath
    name: str
    models: int


def _blocks(
    raw: Mapping[str, Any], path: ValuePath, name: str, label: Callable[[str], str], base: str
) -> Iterator[_Block]:  # fmt: skip
    def of(part: Mapping[str, Any], path: ValuePath, name: str, key: str) -> Iterator[_Block]:
        """The parameters of a part that merges models, and those of the models."""
        listed = _entries(part, path, key)
        count = sum(reference(model.get("model")) != base for model, _ in listed)
        yield _Block(_parameters(part), (*path, "parameters"), name, count or most)
        for model, place in listed:
            own = f"{name}models.{label(reference(model.get('model')))}."
            yield _Block(_parameters(model), (*place, "parameters"), own, count)

    parts = _entries(raw, path, "slices")
    most = max((len(_entries(part, place, "sources")) for part, place in parts), default=1)
    yield from of(raw, path, name, "models")
    for number, (part, place) in enumerate(parts):
        yield from of(part, place, f"{name}slices[{number}].", "sources")
    modules = raw.get("modules")
    for key, module in modules.items() if isinstance(modules, Mapping) else ():
        if isinstance(module, Mapping):
            yield from _blocks(module, (*path, "modules", key), name, label, base)


def _entries(raw: Mapping[str, Any], path: ValuePath, key: str) -> list[tuple[Mapping[str, Any], ValuePath]]:
    given = raw.get(key)
    listed = enumerate(given) if isinstance(given, list) else ()
    return [(entry, (*path, key, number)) for number, entry in listed if isinstance(entry, Mapping)]


def _parameters(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    given = raw.get("parameters")
    return given if isinstance(given, Mapping) else {}


def _values(given: Any, path: ValuePath, name: str) -> Iterator[tuple[ValuePath, str, Any]]:
    """What stands in the place of a value anywhere in a parameter, with its path and its name."""
    if isinstance(given, list):
        for number, entry in enumerate(given):
            condition = isinstance(entry, Mapping) and any(key in entry for key in CONDITION)
            part = (entry.get("filter") or "*") if condition else number
            yield from _values(entry, (*path, number), f"{name}[{part}]")
    elif isinstance(given, Mapping) and any(key in given for key in CONDITION):
        yield from _values(given.get("value"), (*path, "value"), name)
    elif given == FREE_MARK or isinstance(given, Mapping):
        yield path, name, given


def _methods(text: RecipeText, number: int, document: Mapping[str, Any]) -> list[Method]:
    given, path = document.get(METHOD_KEY), (number, METHOD_KEY)
    place = f"{text.at(path)}: {METHOD_KEY}"
    if not is_free(given):
        return [get(str(given), place)] if given is not None else []
    if not isinstance(given, Mapping) or not isinstance(given.get("choices"), list) or len(given) > 1:
        raise BadInput(f"{place}: a method is no number; write {{choices: [ties, dare_ties]}} with the methods to try.")
    if len(names := list(dict.fromkeys(map(str, given["choices"])))) < 2 or len(names) < len(given["choices"]):
        raise BadInput(f"{place}: a choice needs two different methods or more; write them, or one method alone.")
    return [get(name, place) for name in names]


@dataclass(frozen=True)
class _Place:
    """One place where a value is to be searched, with all that its range depends on."""

    text: RecipeText
    path: ValuePath
    name: str
    key: str
    methods: Sequence[Method]
    models: int

    @property
    def where(self) -> str:
        return f"{self.text.at(self.path)}: {self.name}"

    def free(self, given: Any) -> Free:
        """Raises BadInput for what cannot be searched here."""
        spec = {"search": DEFAULT} if given == FREE_MARK else dict(given)
        for key in spec:
            if key not in SPEC_KEYS:
                raise BadInput(f"{self.where}: unknown key {key!r}; {nearest(key, SPEC_KEYS)}")
        if ("search" in spec) == ("choices" in spec):
            raise BadInput(f"{self.where}: write either {EXAMPLE} for a number, or {{choices: [...]}}.")
        setting = self._setting()
        if "search" not in spec:
            return self._chosen(setting, spec["choices"], spec)
        if spec["search"] == DEFAULT:
            return self._default(setting, spec)
        return self._ranged(setting, spec)

    def _setting(self) -> Setting:
        known = [settings_of(m) for m in self.methods]
        found = [settings[self.key] for settings in known if self.key in settings]
        if found and self.key not in HANDED:
            return found[0]
        methods = " and ".join(m.name for m in self.methods) or "the method"
        if self.key in SILENT:
            why = "it changes how much memory mergekit needs, and no model"
        elif any(self.key in METHODS[name].settings for name in METHODS):
            why = f"{methods} does not use it"
        else:
            keys = {key for settings in known for key in settings}
            raise BadInput(f"{self.where}: {methods} has no parameter {self.key!r}; {nearest(self.key, keys)}")
        raise BadInput(f"{self.where}: {self.key} cannot be searched, because {why}; write a value, or leave it out.")

    def _chosen(self, setting: Setting, options: Any, spec: Mapping[str, Any]) -> Free:
        if not isinstance(options, list) or len(options) < 2 or len(set(map(repr, options))) < len(options):
            raise BadInput(f"{self.where}: choices: {options!r} is not usable; write a list of two values or more.")
        if "log" in spec:
            raise BadInput(f"{self.where}: log: choices have no scale; leave it out.")
        allowed = (*setting.options, *((True, False) if self.key == "rescale" else ()))
        for option in options:
            if allowed and not any(option is a or (isinstance(a, str) and option == a) for a in allowed):
                raise BadInput(f"{self.where}: choices: {option!r} is none of {', '.join(map(_word, allowed))}.")
            if not allowed:
                self._number(setting, option, "choices")
        start = spec.get("start", options[0])
        if not any(start == o and type(start) is type(o) for o in options):
            raise BadInput(f"{self.where}: start: {start!r} is none of the choices; write one of them.")
        return Free(self.path, self.key, Choice(self.name, tuple(options)), start)

    def _default(self, setting: Setting, spec: Mapping[str, Any]) -> Free:
        """The range or the words that the method's signature gives."""
        if setting.options:
            words = [False, True] if self.key == "rescale" else list(setting.options)
            return self._chosen(setting, words, spec)
        if isinstance(setting.search, Simplex):
            return self._knob(setting, 0.0, 1.0, spec, 1 / max(self.models, 1))
        if not isinstance(setting.search, Range):
            raise BadInput(f"{self.where}: {self.key} has no range of its own; write one, as {EXAMPLE}.")
        own = setting.search
        return self._knob(setting, own.low, own.high, {"log": own.log, **spec}, None)

    def _ranged(self, setting: Setting, spec: Mapping[str, Any]) -> Free:
        ends = spec["search"]
        if setting.options:
            words = ", ".join(map(_word, setting.options))
            raise BadInput(f"{self.where}: {self.key} is no number; write {{choices: [{words}]}}.")
        if not isinstance(ends, list) or len(ends) != 2:
            raise BadInput(f"{self.where}: search: {ends!r} is not usable; write {EXAMPLE}, or {{choices: [...]}}.")
        low, high = (self._number(setting, end, "search") for end in ends)
        if low >= high:
            raise BadInput(
                f"{self.where}: search: the range begins at {low:g} and ends at {high:g}; write the smaller number "
                "first."
            )
        return self._knob(setting, low, high, spec, None)

    def _number(self, setting: Setting, value: Any, key: str) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (setting.kind is int and value != int(value)):
            raise BadInput(f"{self.where}: {key}: {value!r} is not usable; write a number.")
        if isinstance(setting.search, Range) and setting.search.refuses(value):
            raise BadInput(f"{self.where}: {key}: {value!r} is not usable; write a number {setting.search.valid}.")
        return float(value)

    def _knob(self, setting: Setting, low: float, high: float, spec: Mapping[str, Any], usual: float | None) -> Free:
        log = spec.get("log", False)
        if not isinstance(log, bool):
            raise BadInput(f"{self.where}: log: {log!r} is not usable; write true or false.")
        if log and low <= 0:
            raise BadInput(f"{self.where}: log: a log scale begins above 0; write a range that does, or log: false.")
        knob = Knob(self.name, low, high, log)
        start = self._number(setting, spec["start"], "start") if "start" in spec else usual
        if start is not None and not low <= start <= high:
            raise BadInput(f"{self.where}: start: {start:g} is outside the range; write a number in it.")
        whole = setting.kind is int
        middle = knob.at(0.5)
        return Free(self.path, self.key, knob, (round(middle) if whole else middle) if start is None else start, whole)


def _marks(value: Any, path: ValuePath) -> Iterator[ValuePath]:
    """The paths of all that stands in the place of a value."""
    if is_free(value):
        yield path
    elif isinstance(value, Mapping | list):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            if key == "tokenizer":  # its keys are tokens, which may be any words
                continue
            yield from _marks(inner, (*path, key))


def _refuse_elsewhere(text: RecipeText, document: Mapping[str, Any], at: ValuePath, known: set[ValuePath]) -> None:
    for path in _marks(document, at):
        if not any(path[:n] in known for n in range(1, len(path) + 1)):
            place = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in path[1:]).lstrip(".")
            raise BadInput(
                f"{text.at(path)}: {place}: only parameters and {METHOD_KEY} can be searched; write a value here."
            )


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
