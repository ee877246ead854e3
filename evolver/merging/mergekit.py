"""mergekit's configuration files, read into recipes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from evolver.config import Section, check_section
from evolver.errors import BadInput, nearest
from evolver.merging.methods import Method, get
from evolver.merging.names import names_of
from evolver.merging.weights import layer_of
from evolver.records import Expert, Layers, Merge, Place, Recipe, Rule

Parameters = dict[str, Any]
Dtype = Literal["float32", "float16", "bfloat16", "float64"]
# Methods of ours that mergekit has, whose weights it wants to be written.
WEIGHTED = {
    "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs",
    "breadcrumbs_ties", "nuslerp", "multislerp",
}  # fmt: skip
NAMES = WEIGHTED | {
    "slerp", "karcher", "model_stock", "sce", "ram", "ramplus_tl", "nearswap", "arcee_fusion", "passthrough",
}  # fmt: skip
# The base is one of the two models, and the other one is moved away from it.
PAIRED = {"slerp", "nearswap", "arcee_fusion"}
# With a base model, these work on task vectors.
OPTIONAL_BASE = {"nuslerp", "multislerp"}
# It changes mergekit's memory, not its result.
IGNORED = {"int8_mask"}


class Source(Section):
    """A model of a slice."""

    model: Any
    layer_range: list[int] | None = None
    parameters: Parameters = Field(default_factory=dict)


class Slice(Section):
    """Layers that are merged together."""

    sources: list[Source] = Field(min_length=1)
    parameters: Parameters = Field(default_factory=dict)


class Tokenizer(Section):
    """Where the tokens come from."""

    source: str


class File(Section):
    """A whole configuration."""

    merge_method: str
    models: list[Source] | None = None
    slices: list[Slice] | None = None
    base_model: Any = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Configuration:
    """A file that was read: what it merges, and the recipe once its models are known."""

    file: str
    raw: File
    method: Method
    earlier: Mapping[str, Configuration] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The model that task vectors are taken against."""
        return reference(self.raw.base_model) if self.raw.base_model else reference(self._sources()[0].model)

    @property
    def origin(self) -> str:
        """The model that gives names, configuration and tokenizer."""
        return self.earlier[self.base].origin if self.base in self.earlier else self.base

    @property
    def references(self) -> list[str]:
        """All models, the one of ``origin`` first, each once; of a merge by its name, the models that it is of."""
        own = [self.base, *(reference(s.model) for s in self._sources())]
        found = [r for o in own for r in (self.earlier[o].references if o in self.earlier else [o])]
        return list(dict.fromkeys([self.origin, *found]))

    @property
    def dtype(self) -> str | None:
        """Of the written tensors; None: as in the base."""
        return self.raw.out_dtype or self.raw.dtype

    @property
    def tokenizer_source(self) -> str | None:
        """``union``, ``base`` or a model; None: all models have the same tokens."""
        return self.raw.tokenizer.source if self.raw.tokenizer else self.raw.tokenizer_source

    def recipe(self, nodes: Mapping[str, Expert], names: Sequence[str], seed: int = 0) -> Recipe:
        """The recipe.

        Args:
            nodes: the models by reference.
            names: of the base's tensors.
            seed: of methods that draw at random.

        Raises BadInput that names file and key.
        """
        recipes = {n: c.recipe(nodes, names, seed) for n, c in self.earlier.items()}
        if any(names_of(r, names) != list(names) for r in recipes.values()):
            raise BadInput(
                f"{self.file}: a merge that another one uses has other layers than the models; merge it first."
            )
        return self._recipe({**nodes, **recipes}, names, seed)

    def _recipe(self, nodes: Mapping[str, Recipe], names: Sequence[str], seed: int) -> Recipe:
        if self.raw.models is not None:
            return self._merge(self.raw.models, self.raw.parameters, "models", nodes, names, seed)
        parts, program = [], []
        for number, part in enumerate(self.raw.slices or []):
            place = f"slices[{number}]"
            count = self._check_ranges(part, place, names)
            given = {**self.raw.parameters, **part.parameters}
            parts.append(self._merge(part.sources, given, f"{place}.sources", nodes, names, seed))
            program += [(number, layer) for layer in range(count)]
        layers = 1 + max((layer_of(n) or 0 for n in names), default=0)
        if len(parts) == 1 and len(program) == layers:
            return parts[0]
        return Layers(tuple(parts), tuple(program), (0, len(parts) - 1))

    def _merge(
        self, sources: Sequence[Source], shared: Parameters, place: str, nodes: Mapping[str, Recipe],
        names: Sequence[str], seed: int,
    ) -> Recipe:  # fmt: skip
        found = {reference(s.model): s for s in sources}
        if len(found) < len(sources):
            raise BadInput(f"{self.file}: {place}: a model stands twice; give each model once.")
        inputs = self._inputs(found, place)
        wanted = {r: found.get(r, Source(model=r)) for r in inputs}
        ranges = {r: s.layer_range for r, s in found.items()}
        any_range = next(iter(ranges.values()))
        span = None if any_range is None else any_range[1] - any_range[0]
        cut = {r: _cut(nodes[r], ranges.get(r, any_range), names) for r in {*inputs, self.base}}
        settings = _Settings(self, wanted, shared, place, seed)
        rules = settings.rules(names if span is None else _renumbered(names, any_range or [0, 0]), span)
        return Merge(self.method.name, tuple(cut[r] for r in inputs), cut[self.base], tuple(rules))

    def _inputs(self, found: Mapping[str, Source], place: str) -> list[str]:
        """Which models the method merges, in its order."""
        listed, name = list(found), self.method.name
        if name in PAIRED:
            others = [r for r in listed if r != self.base]
            if self.raw.base_model is None or len(others) != 1:
                raise BadInput(f"{self.file}: {place}: {name} takes base_model and one other model.")
            return [self.base, *others] if name == "slerp" else others
        if self.method.on_deltas or name in {*OPTIONAL_BASE, "model_stock"}:
            if self.raw.base_model is None and name not in OPTIONAL_BASE:
                raise BadInput(f"{self.file}: base_model: missing; {name} merges differences to a base.")
            listed = [r for r in listed if self.raw.base_model is None or r != self.base]
        if not listed:
            raise BadInput(f"{self.file}: {place}: no model is left to merge; give one besides the base.")
        if (name == "nuslerp" and len(listed) != 2) or (name == "passthrough" and len(listed) != 1):
            raise BadInput(f"{self.file}: {place}: {name} takes {2 if name == 'nuslerp' else 1}, not {len(listed)}.")
        if name == "model_stock" and len(listed) < 2:
            raise BadInput(f"{self.file}: {place}: model_stock takes two models or more besides the base.")
        return listed

    def _check_ranges(self, part: Slice, place: str, names: Sequence[str]) -> int:
        layers = 1 + max((layer_of(n) or 0 for n in names), default=0)
        lengths = set()
        for number, source in enumerate(part.sources):
            given = source.layer_range
            if given is None or len(given) != 2 or not 0 <= given[0] < given[1] <= layers:
                raise BadInput(
                    f"{self.file}: {place}.sources[{number}].layer_range: {given} is not usable; "
                    f"write [first, end) within 0 and {layers}."
                )
            lengths.add(given[1] - given[0])
        if len(lengths) > 1:
            raise BadInput(f"{self.file}: {place}: its sources have different numbers of layers; give them the same.")
        return lengths.pop()

    def _sources(self) -> list[Source]:
        return self.raw.models or [s for part in self.raw.slices or [] for s in part.sources]


def read(path: str | Path) -> Configuration:
    """Read a mergekit file; of several documents, the one without a name, else the last one, is the model.

    Raises BadInput for an unreadable file, an unknown key, method or parameter, with the nearest known one.
    """
    file = str(path)
    try:
        documents = list(yaml.safe_load_all(Path(path).read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"{file}: cannot be read ({' '.join(str(error).split())}); give a YAML file.") from error
    if not documents or not all(isinstance(d, dict) for d in documents):
        raise BadInput(f"{file}: is no mapping; give one with merge_method and models.")
    if len(documents) == 1:
        return parse(documents[0], file)
    return _linked([parse(d, f"{file}: document {i}") for i, d in enumerate(documents, 1)], file)


def parse(raw: Mapping[str, Any], file: str) -> Configuration:
    """A mergekit configuration that was read already; raises BadInput that names ``file``."""
    checked = check_section(File, _without_modules(raw, file), file)
    if (checked.models is None) == (checked.slices is None):
        raise BadInput(f"{file}: models: write either models or slices.")
    if not (checked.models or checked.slices):
        raise BadInput(f"{file}: models: no model is named; give at least one.")
    if checked.tokenizer and checked.tokenizer_source:
        raise BadInput(f"{file}: tokenizer_source: stands beside tokenizer; write one of them.")
    return Configuration(file, checked, get(checked.merge_method, f"{file}: merge_method"))


def _without_modules(raw: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    """A model of one module is that module, whatever its name."""
    modules = raw.get("modules")
    if "modules" not in raw:
        return raw
    if not isinstance(modules, dict) or len(modules) != 1 or not isinstance(only := next(iter(modules.values())), dict):
        raise BadInput(f"{file}: modules: models of several modules are not supported; write models, or one module.")
    rest = {k: v for k, v in raw.items() if k != "modules"}
    return {**rest, **only, "parameters": {**(raw.get("parameters") or {}), **(only.get("parameters") or {})}}


def _linked(documents: Sequence[Configuration], file: str) -> Configuration:
    """The document that is the model, with the named ones that it uses, and they with theirs."""
    named: dict[str, Configuration] = {}
    for document in documents:
        if document.raw.name in named:
            raise BadInput(f"{file}: name: {document.raw.name} stands twice; give every document a name of its own.")
        if document.raw.name:
            named[document.raw.name] = document
    nameless = [d for d in documents if not d.raw.name]
    if len(nameless) > 1:
        raise BadInput(f"{file}: {len(nameless)} documents have no name; only the one that is the model needs none.")

    def link(document: Configuration, above: tuple[str, ...]) -> Configuration:
        used = {document.base, *(reference(s.model) for s in document._sources())} & named.keys()
        if circle := used & set(above):
            raise BadInput(f"{file}: the merge {min(circle)} is made of itself; break the circle.")
        return replace(document, earlier={n: link(named[n], (*above, n)) for n in sorted(used)})

    last = [*documents, *nameless][-1]
    return link(last, (last.raw.name,) if last.raw.name else ())


def reference(model: Any) -> str:
    """``path@revision+lora`` of a model, which may be written as a mapping."""
    if isinstance(model, dict):
        inner, lora = model.get("model", {}), model.get("lora")
        text = (
            "@".join(str(inner[k]) for k in ("path", "revision") if inner.get(k)) if isinstance(inner, dict) else inner
        )
        return f"{text}+{reference({'model': lora})}" if lora else str(text)
    return str(model)


class _Settings:
    """The parameters of one merge, resolved for every tensor."""

    def __init__(
        self, owner: Configuration, models: Mapping[str, Source], shared: Parameters, place: str, seed: int
    ) -> None:
        self.owner, self.models, self.shared, self.place = owner, models, shared, place
        self.method, self.seed = owner.method, seed
        known = {*self.method.settings, *IGNORED}
        for given, where in [(shared, "parameters"), *((s.parameters, f"{place}: {r}") for r, s in models.items())]:
            for key in given:
                if key not in known:
                    raise BadInput(f"{owner.file}: {where}: {self.method.name} has no {key!r}; {nearest(key, known)}")
        self.keys = [k for k in self.method.settings if k in shared or any(k in s.parameters for s in models.values())]
        if self.method.name in WEIGHTED and "weight" not in self.keys:
            raise BadInput(f"{owner.file}: {place}: weight is missing; give every model one under parameters.")

    def rules(self, names: Sequence[str], span: int | None) -> list[Rule]:
        """Rules that give every tensor its values: by layer, then by filter, then by name where filters overlap."""
        layers = 1 + max((layer_of(n) or 0 for n in names), default=0) if span is None else span
        filters = list(dict.fromkeys(self._filters()))
        if not filters and not self._varies():
            return [Rule.of(self._values("", 0.0))]
        depths = [1.0 if layers == 1 else i / (layers - 1) for i in range(layers)]
        places = [Place(outside=True), *(Place((i, i + 1)) for i in range(layers))] if self._varies() else [Place()]
        out: list[Rule] = []
        for contains in ["", *reversed(filters)]:
            for place in places:
                t = depths[place.layers[0]] if place.layers else 0.0
                out.append(Rule.of(self._values(contains, t), Place(place.layers, place.outside, contains)))
        probe = Merge("simple", (), Expert("", ""), tuple(out))
        for name in names:
            layer = layer_of(name)
            values = Rule.of(self._values(name, 0.0 if layer is None else depths[layer])).values
            if tuple(sorted(probe.settings(name, layer).items())) != values:
                out.append(Rule(Place(contains=name), values))
        return out

    def _values(self, name: str, t: float) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key in self.keys:
            setting = self.method.settings[key]
            each = [self._value(s.parameters.get(key, self.shared.get(key)), name, t) for s in self.models.values()]
            given = [v for v in each if v is not None]
            if not given:
                continue
            where = f"{self.owner.file}: {self.place}: {key}"
            if setting.kind is tuple:
                if len(given) < len(each) and key == "weight":
                    raise BadInput(f"{where}: missing for a model; give every model one.")
                default = setting.default[0]
                out[key] = tuple(float(_number(v if v is not None else default, where)) for v in each)
            elif len(set(map(str, given))) > 1:
                raise BadInput(f"{where}: one value for all models is wanted; move it to the top's parameters.")
            elif key == "rescale":
                out[key] = {True: "l1", False: "none"}.get(given[0], given[0])
            else:
                out[key] = _number(given[0], where) if setting.kind is float else given[0]
        if self.method.name in OPTIONAL_BASE:
            out["task_vectors"] = self.owner.raw.base_model is not None
        if "seed" in self.method.settings:
            out["seed"] = self.seed
        self.method.complete(out, len(self.models), f"{self.owner.file}: {self.place}")
        return out

    def _value(self, given: Any, name: str, t: float) -> Any:
        if isinstance(given, list) and given and all(isinstance(g, dict) for g in given):
            for entry in given:
                wanted = entry.get("filter")
                if wanted in (None, "*") or wanted in name:
                    return self._value(entry.get("value"), name, t)
            return None
        if isinstance(given, list):
            at = t * (len(given) - 1)
            low = min(math.floor(at), len(given) - 1)
            high = min(low + 1, len(given) - 1)
            return (1 - (at - low)) * given[low] + (at - low) * given[high]
        return given

    def _given(self) -> Iterator[Any]:
        for key in self.keys:
            yield self.shared.get(key)
            for source in self.models.values():
                yield source.parameters.get(key)

    def _filters(self) -> Iterator[str]:
        for given in self._given():
            if isinstance(given, list):
                yield from (g["filter"] for g in given if isinstance(g, dict) and g.get("filter") not in (None, "*"))

    def _varies(self) -> bool:
        """Whether something changes with depth."""
        lists = [g for g in self._given() if isinstance(g, list)]
        inner = [e.get("value") for g in lists for e in g if isinstance(e, dict)]
        return any(isinstance(v, list) for v in inner) or any(not isinstance(e, dict) for g in lists for e in g)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadInput(f"{where}: {value!r} is not usable; write a number, a list, or a list of filter and value.")
    return float(value)


def _cut(node: Recipe, span: list[int] | None, names: Sequence[str]) -> Recipe:
    """The model, or its layers ``[first, end)`` as a model of their own."""
    layers = 1 + max((layer_of(n) or 0 for n in names), default=0)
    if span is None or span == [0, layers]:
        return node
    return Layers((node,), tuple((0, layer) for layer in range(*span)), (0, 0))


def _renumbered(names: Iterable[str], span: list[int]) -> list[str]:
    """The names of a model cut to the layers ``[first, end)``."""
    out = []
    for name in names:
        layer = layer_of(name)
        if layer is None:
            out.append(name)
        elif span[0] <= layer < span[1]:
            out.append(name.replace(f".{layer}.", f".{layer - span[0]}.", 1))
    return out
