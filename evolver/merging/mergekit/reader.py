"""mergekit's configuration files, read into recipes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from evolver.config.model import TokenizerSettings
from evolver.config.reading import check_section, config_at
from evolver.config.recipes import RecipeText, parsed_recipe, reference
from evolver.config.section import Section
from evolver.errors import BadInput, nearest
from evolver.merging.mergekit.free import at_start, refuse_free
from evolver.merging.mergekit.others import refuse_other_tools
from evolver.merging.mergekit.parameters import WEIGHTED, refuse_unweighed, settings_of, unused, warnings_of
from evolver.merging.methods import Method, get
from evolver.merging.settings.placed import Placed, Spot, depth, over
from evolver.records.recipe import Expert, Layers, Merge, Recipe, at_layer, layer_of
from evolver.storage.paths import expand

Parameters = dict[str, Any]
# A key with nothing behind it is as good as none.
GivenParameters = Annotated[Parameters, BeforeValidator(lambda given: {} if given is None else given)]
Dtype = Literal["float32", "float16", "bfloat16", "float64"]
# Of a model that is written as a mapping.
REFERENCE_KEYS = ("model", "lora", "override_architecture")
# The base is one of the two models, and the other one is moved away from it.
PAIRED = {"slerp", "nearswap", "arcee_fusion"}
# To these a base model is one more model to merge.
WITHOUT_BASE = {"linear", "karcher"}
# Its settings are those of its only model.
LONE = {"passthrough"}
# With a base model, these work on task vectors.
OPTIONAL_BASE = {"nuslerp", "multislerp"}


class TokenSource(Section):
    """A model of a slice."""

    model: Any
    layer_range: list[int] | None = None
    parameters: GivenParameters = Field(default_factory=dict)


class Slice(Section):
    """Layers that are merged together."""

    sources: list[TokenSource] = Field(min_length=1)
    base_model: Any = None
    parameters: GivenParameters = Field(default_factory=dict)


class File(Section):
    """A whole configuration."""

    merge_method: str
    models: list[TokenSource] | None = None
    slices: list[Slice] | None = None
    base_model: Any = None
    parameters: GivenParameters = Field(default_factory=dict)
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: str | None = None
    tokenizer: TokenizerSettings | None = None
    chat_template: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Configuration:
    """A file that was read: what it merges, and the recipe once its models are known."""

    file: str
    raw: File
    method: Method
    earlier: Mapping[str, Configuration] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the file says that does nothing, here as in mergekit; each sentence once."""
        below = (w for c in self.earlier.values() for w in c.warnings)
        return tuple(dict.fromkeys((*below, *self.ignored)))

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
        own = [self.base, *self._bases(), *(reference(s.model) for s in self._sources())]
        found = [r for o in own for r in (self.earlier[o].references if o in self.earlier else [o])]
        return list(dict.fromkeys([self.origin, *found]))

    @property
    def sliced(self) -> bool:
        """Whether this merge, or one that it uses, is of runs of layers."""
        return self.raw.slices is not None or any(c.sliced for c in self.earlier.values())

    @property
    def dtype(self) -> str | None:
        """Of the written tensors; None: as in the base."""
        return self.raw.out_dtype or self.raw.dtype

    @property
    def tokenizer(self) -> TokenizerSettings | None:
        """Where the tokens come from: ``union``, ``base`` or a model; None: all models have the same ones."""
        if self.raw.tokenizer_source is not None:
            return TokenizerSettings(source=self.raw.tokenizer_source)
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
        if any(r.names(names) != list(names) for r in recipes.values()):
            raise BadInput(
                f"{self.file}: a merge that another merge uses has a different number of layers than the models; run "
                "that merge first, and give its folder."
            )
        return self._recipe({**nodes, **recipes}, names, seed)

    def _recipe(self, nodes: Mapping[str, Recipe], names: Sequence[str], seed: int) -> Recipe:
        if self.raw.models is not None:
            group = _Group("models", self.raw.models, (self.raw.parameters,), self.raw.base_model, False, 0)
            return self._merge(group, nodes, names, seed)
        parts: list[Recipe] = []
        program: list[tuple[int, int]] = []
        for number, part in enumerate(self.raw.slices or []):
            place = f"slices[{number}]"
            count = self._check_ranges(part, place, names)
            base, scopes = part.base_model or self.raw.base_model, (part.parameters, self.raw.parameters)
            group = _Group(f"{place}.sources", part.sources, scopes, base, True, len(program))
            parts.append(self._merge(group, nodes, names, seed))
            program += [(number, layer) for layer in range(count)]
        if len(parts) == 1 and len(program) == _depth(names):
            return parts[0]
        return Layers(tuple(parts), tuple(program), (0, len(parts) - 1))

    def _merge(self, group: _Group, nodes: Mapping[str, Recipe], names: Sequence[str], seed: int) -> Recipe:
        found = {reference(s.model): s for s in group.sources}
        if len(found) < len(group.sources):
            raise BadInput(f"{self.file}: {group.place}: a model is listed twice; list each model once.")
        base = reference(group.base) if group.base else self.base
        inputs = self._inputs(found, group)
        usual = group.sources[0].layer_range or [0, _depth(names)]
        ranges = {r: (found[r].layer_range if r in found else None) or usual for r in {*inputs, base}}
        cut = {r: _cut(nodes[r], span, names) for r, span in ranges.items()}
        placed = self._placed([found.get(r, TokenSource(model=r)) for r in inputs], group, seed)
        lone = self.method.name in LONE
        rules = placed.rules(spots(names, usual, [ranges[r] for r in inputs], group.at, lone))
        return Merge(self.method.name, tuple(cut[r] for r in inputs), cut[base], rules)

    def _placed(self, models: Sequence[TokenSource], group: _Group, seed: int) -> Placed:
        """The parameters of one merge, which may differ from tensor to tensor."""
        settings, where = settings_of(self.method), f"{self.file}: {group.place}"
        own, lone = {k for k, s in settings.items() if s.kind is tuple}, self.method.name in LONE
        for model in models:
            for key in model.parameters:
                if key in settings and key not in own and not lone:
                    raise BadInput(
                        f"{where}: {key}: this setting has one value for all models; move it to the parameters of the "
                        "whole merge."
                    )
        shared = over((models[0].parameters, *group.scopes) if lone else group.scopes)
        each = [over((m.parameters, *group.scopes)) for m in models]
        for key, setting in settings.items():
            needed = setting.required or (key == "weight" and self.method.name in WEIGHTED)
            if needed and not any(key in e for e in each):
                raise BadInput(f"{where}: {key} is missing; {self.method.name} has no default for it.")
        fixed: Parameters = {}
        if self.method.name in OPTIONAL_BASE:
            fixed["task_vectors"] = group.base is not None
        if "seed" in settings:
            fixed["seed"] = seed
        mine = [{k: v for k, v in e.items() if k in own} for e in each]
        ours = {k: v for k, v in shared.items() if k in settings and k not in own}
        return Placed(self.method, mine, ours | fixed, where)

    def _inputs(self, found: Mapping[str, TokenSource], group: _Group) -> list[str]:
        """Which models the method merges, in its order."""
        listed, name, place = list(found), self.method.name, group.place
        base = reference(group.base) if group.base else None
        if name in PAIRED:
            others = [r for r in listed if r != base]
            if base is None or len(others) != 1:
                raise BadInput(f"{self.file}: {place}: {name} takes base_model and one other model.")
            return [base, *others] if name == "slerp" else others
        if name in WITHOUT_BASE and not group.cut and base is not None and base not in listed:
            listed.append(base)
        if self.method.on_deltas or name in {*OPTIONAL_BASE, "model_stock"}:
            if base is None and name not in OPTIONAL_BASE:
                raise BadInput(f"{self.file}: base_model: missing; {name} merges differences to a base.")
            listed = [r for r in listed if r != base]
        if not listed:
            raise BadInput(f"{self.file}: {place}: no model is left to merge; give one besides the base.")
        if (name == "nuslerp" and len(listed) != 2) or (name == "passthrough" and len(listed) != 1):
            raise BadInput(f"{self.file}: {place}: {name} takes {2 if name == 'nuslerp' else 1}, not {len(listed)}.")
        if name == "model_stock" and len(listed) < 2:
            raise BadInput(f"{self.file}: {place}: model_stock takes two models or more besides the base.")
        return listed

    def _check_ranges(self, part: Slice, place: str, names: Sequence[str]) -> int:
        layers, lengths = _depth(names), set()
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

    def _sources(self) -> list[TokenSource]:
        return self.raw.models or [s for part in self.raw.slices or [] for s in part.sources]

    def _bases(self) -> list[str]:
        """The bases that slices have of their own."""
        return [reference(part.base_model) for part in self.raw.slices or [] if part.base_model]


@dataclass(frozen=True)
class _Group:
    """Models that are merged together.

    Args:
        place: where they stand in the file.
        scopes: parameters that they share, the nearest first.
        cut: whether they are runs of layers.
        at: the layer of the whole model that their first one becomes.
    """

    place: str
    sources: Sequence[TokenSource]
    scopes: tuple[Parameters, ...]
    base: Any
    cut: bool
    at: int


def read(path: str | Path, start: bool = False, measured: bool = False) -> Configuration:
    """Read a mergekit file; of several documents, the one without a name, else the last one, is the model.

    Args:
        start: whether the file may leave values free, which then are those that a search begins with.
        measured: whether methods are allowed that need statistics, which the recipe lacks.

    Raises BadInput for an unreadable file, an unknown key, method or parameter, with the nearest known one.
    """
    text = parsed_recipe(config_at(path).text, str(path))
    if start:
        return configuration_of(at_start(text), measured)
    refuse_free(text)
    return configuration_of(text, measured)


def configuration_of(text: RecipeText, measured: bool = False) -> Configuration:
    """The configuration in the documents of a file; see ``read``."""
    documents, file = text.documents, text.origin
    if len(documents) == 1:
        return parse(documents[0], file, measured)
    return _linked([parse(d, f"{file}: document {i}", measured) for i, d in enumerate(documents, 1)], file)


def parse(raw: Mapping[str, Any], file: str, measured: bool = False) -> Configuration:
    """A mergekit configuration that was read already, see ``read``; raises BadInput that names ``file``."""
    refuse_other_tools(raw, file)
    checked = check_section(File, _without_modules(raw, file), file)
    for model, place in _models(checked, file):
        _check_reference(model, place)
    if (checked.models is None) == (checked.slices is None):
        raise BadInput(f"{file}: models: write either models or slices.")
    if not (checked.models or checked.slices):
        raise BadInput(f"{file}: models: no model is named; give at least one.")
    if checked.tokenizer and checked.tokenizer_source:
        raise BadInput(f"{file}: tokenizer_source: the file also has the key tokenizer; write only one of them.")
    method = get(checked.merge_method, f"{file}: merge_method")
    if method.statistics and not measured:
        raise BadInput(
            f"{file}: merge_method: {method.name} needs statistics of the models on items, and this file names none; "
            "write the configuration of a run, with the items under evaluation.tasks, and add it to evolver merge as "
            f"--statistics RUN.yaml, or search with it: {{algorithm: tpe, method: {method.name}}} and evolver run."
        )
    if method.name in WITHOUT_BASE and checked.models and checked.base_model:
        own = {reference(m.model): m.parameters for m in checked.models}
        refuse_unweighed(method, reference(checked.base_model), own, checked.parameters, file)
    found = [key for given, place in _parameters(checked, file) for key in unused(method, given, place)]
    return Configuration(file, checked, method, ignored=warnings_of(method, found, file))


def _parameters(raw: File, file: str) -> Iterator[tuple[Parameters, str]]:
    """The parameters of every place in a file, with the place."""
    yield raw.parameters, f"{file}: parameters"
    for number, part in enumerate(raw.slices or []):
        yield part.parameters, f"{file}: parameters"
        for source in part.sources:
            yield source.parameters, f"{file}: slices[{number}].sources: {reference(source.model)}"
    for model in raw.models or []:
        yield model.parameters, f"{file}: models: {reference(model.model)}"


def _models(raw: File, file: str) -> Iterator[tuple[Any, str]]:
    """Every model that a file names, with its place."""
    yield raw.base_model, f"{file}: base_model"
    for number, part in enumerate(raw.slices or []):
        yield part.base_model, f"{file}: slices[{number}].base_model"
        yield from ((s.model, f"{file}: slices[{number}].sources[{n}].model") for n, s in enumerate(part.sources))
    yield from ((m.model, f"{file}: models[{n}].model") for n, m in enumerate(raw.models or []))


def _check_reference(model: Any, place: str) -> None:
    """Raises BadInput for a model that is not written as mergekit reads it."""
    if isinstance(model, dict):
        for key in model:
            if key not in REFERENCE_KEYS:
                raise BadInput(f"{place}: unknown key {key!r}; {nearest(key, REFERENCE_KEYS)}")
        if model.get("override_architecture"):
            raise BadInput(
                f"{place}: override_architecture: Evolver reads the architecture from the model's config.json; leave "
                "this key out."
            )
    text = reference(model)
    parts = text.split("+")
    if len(parts) > 2 or any(part.count("@") > 1 and not Path(expand(part)).exists() for part in parts):
        raise BadInput(f"{place}: {text!r} is not usable; write MODEL, MODEL@REVISION or MODEL+ADAPTER.")


def _without_modules(raw: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    """A model of one module is that module, whatever its name."""
    modules = raw.get("modules")
    if "modules" not in raw:
        return raw
    if not isinstance(modules, dict) or len(modules) != 1 or not isinstance(only := next(iter(modules.values())), dict):
        raise BadInput(f"{file}: modules: models of several modules are not supported; write models, or one module.")
    rest = {k: v for k, v in raw.items() if k != "modules"}
    return {**rest, **only, "parameters": over(raw_.get("parameters") or {} for raw_ in (only, raw))}


def _linked(documents: Sequence[Configuration], file: str) -> Configuration:
    """The document that is the model, with the named ones that it uses, and they with theirs."""
    named: dict[str, Configuration] = {}
    for document in documents:
        if document.raw.name in named:
            raise BadInput(f"{file}: name: {document.raw.name} is used twice; give every document a different name.")
        if document.raw.name:
            named[document.raw.name] = document
    nameless = [d for d in documents if not d.raw.name]
    if len(nameless) > 1:
        raise BadInput(
            f"{file}: {len(nameless)} documents have no name; only the last merge, which gives the model, needs none."
        )

    def link(document: Configuration, above: tuple[str, ...]) -> Configuration:
        used = {document.base, *document._bases(), *(reference(s.model) for s in document._sources())} & named.keys()
        if circle := used & set(above):
            raise BadInput(
                f"{file}: the merge {min(circle)} uses itself, directly or through other merges; remove this circle."
            )
        return replace(document, earlier={n: link(named[n], (*above, n)) for n in sorted(used)})

    last = [*documents, *nameless][-1]
    return link(last, (last.raw.name,) if last.raw.name else ())


def _cut(node: Recipe, span: Sequence[int], names: Sequence[str]) -> Recipe:
    """The model, or its layers ``[first, end)`` as a model of their own."""
    if list(span) == [0, _depth(names)]:
        return node
    return Layers((node,), tuple((0, layer) for layer in range(*span)), (0, 0))


def spots(
    names: Iterable[str], usual: Sequence[int], ranges: Sequence[Sequence[int]], at: int, lone: bool
) -> Iterator[Spot]:
    """The tensors of a merge of the layers ``ranges``, of which every model has one [first, end).

    Args:
        names: of a whole model's tensors.
        usual: one of the ranges.
        at: the layer of the whole model that the first one becomes.
        lone: all settings are the only model's own.
    """
    for name in names:
        layer = layer_of(name)
        if layer is None:
            yield Spot(name, name, (name,) * len(ranges), 0.0)
        elif usual[0] <= layer < usual[1]:
            here = layer - usual[0]
            own = tuple(at_layer(name, first + here) for first, _ in ranges)
            shared = own[0] if lone else at_layer(name, at + here)
            yield Spot(at_layer(name, here), shared, own, depth(here, usual[1] - usual[0]))


def _depth(names: Iterable[str]) -> int:
    """The number of layers."""
    return 1 + max((layer_of(n) or 0 for n in names), default=0)
