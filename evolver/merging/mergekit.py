"""mergekit's configuration files, read into recipes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from evolver.config import Section, check_section
from evolver.errors import BadInput, nearest
from evolver.merging.methods import Method, get
from evolver.merging.names import names_of
from evolver.merging.placed import Placed
from evolver.merging.weights import layer_of
from evolver.records import Expert, Layers, Merge, Recipe

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


class TokenEntry(Section):
    """Which row a token has in models that lack it; with ``force``, in all."""

    source: Any = None
    force: bool = False


class Tokenizer(Section):
    """Where the tokens come from."""

    source: str = "union"
    tokens: dict[str, TokenEntry] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(None, ge=1)


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
    def tokenizer(self) -> Tokenizer | None:
        """Where the tokens come from: ``union``, ``base`` or a model; None: all models have the same ones."""
        if self.raw.tokenizer_source is not None:
            return Tokenizer(source=self.raw.tokenizer_source)
        return self.raw.tokenizer

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
        placed = self._placed(wanted, shared, place, seed)
        rules = placed.rules(names if span is None else _renumbered(names, any_range or [0, 0]), span)
        return Merge(self.method.name, tuple(cut[r] for r in inputs), cut[self.base], tuple(rules))

    def _placed(self, models: Mapping[str, Source], shared: Parameters, place: str, seed: int) -> Placed:
        """The parameters of one merge, which may differ from tensor to tensor."""
        known = {*self.method.settings, *IGNORED}
        for given, where in [(shared, "parameters"), *((s.parameters, f"{place}: {r}") for r, s in models.items())]:
            for key in given:
                if key not in known:
                    raise BadInput(f"{self.file}: {where}: {self.method.name} has no {key!r}; {nearest(key, known)}")
        each = [{k: v for k, v in {**shared, **s.parameters}.items() if k not in IGNORED} for s in models.values()]
        if self.method.name in WEIGHTED and not any("weight" in e for e in each):
            raise BadInput(f"{self.file}: {place}: weight is missing; give every model one under parameters.")
        for setting in self.method.settings.values():
            if setting.required and not any(setting.name in e for e in each):
                raise BadInput(
                    f"{self.file}: {place}.{setting.name}: missing; {self.method.name} has no default for it."
                )
        fixed: Parameters = {}
        if self.method.name in OPTIONAL_BASE:
            fixed["task_vectors"] = self.raw.base_model is not None
        if "seed" in self.method.settings:
            fixed["seed"] = seed
        return Placed(self.method, each, fixed, f"{self.file}: {place}")

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
