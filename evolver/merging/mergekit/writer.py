"""Recipes written as mergekit's configuration files, where mergekit can make the same model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from evolver.errors import EvolverError
from evolver.merging.mergekit.parameters import MERGEKIT_NAMES, OURS, WEIGHTED
from evolver.merging.mergekit.reader import LONE, PAIRED, Parameters, spots
from evolver.merging.methods import METHODS, ROUNDING, Method
from evolver.records.noise import Noise
from evolver.records.recipe import LAYER, Cross, Expert, Layers, Merge, Recipe, Value, ancestors, layer_of

# Its usual name beside a model.
CONFIG_FILE = "mergekit_config.yml"
RANDOM = "# mergekit draws other random numbers: it makes a merge of this kind, not this very one.\n"


class Inexpressible(EvolverError):
    """Why mergekit cannot make a model, in words that follow "because"."""


def dump(recipe: Recipe, locations: Mapping[str, str], names: Sequence[str], dtype: str | None = None) -> str:
    """The recipe as text of a mergekit file; with documents for ``mergekit-multi`` where merges are merged.

    Args:
        locations: of models, by digest.
        names: of the base's tensors.
        dtype: of the written tensors; None: as mergekit chooses, which is as in the base.

    Raises Inexpressible with the reason.
    """
    labels = dict(locations)
    documents = []
    for node in _outputs(recipe):
        document = _Document(labels, names, dtype).of(node)
        if node is not recipe:
            labels[node.id] = f"merge-{node.id[:12]}"
            document = {"name": labels[node.id], **document}
        documents.append(document)
    text = "---\n".join(yaml.safe_dump(d, sort_keys=False) for d in documents)
    return (RANDOM if any(_is_random(n) for n in ancestors(recipe)) else "") + text


def _outputs(recipe: Recipe) -> list[Recipe]:
    """The nodes that are documents of their own, inputs first: the recipe, and every merge that a merge uses."""
    used = {_whole(i).id for n in ancestors(recipe) if isinstance(n, Merge) for i in (*n.inputs, n.base)}
    return [n for n in ancestors(recipe) if n is recipe or (n.id in used and not isinstance(n, Expert))]


def _whole(node: Recipe) -> Recipe:
    """The model that a run of layers is cut from; any other node as it is."""
    return node.below[0] if _is_cut(node) else node


def _is_cut(node: Recipe) -> bool:
    """Whether the node is a run of layers of one model."""
    if not isinstance(node, Layers) or len(node.inputs) != 1 or isinstance(node.inputs[0], Layers):
        return False
    first = node.program[0][1]
    return [of for _, of in node.program] == list(range(first, first + len(node.program)))


def _is_random(node: Recipe) -> bool:
    return isinstance(node, Merge) and "seed" in METHODS[node.method].settings


@dataclass(frozen=True)
class _Run:
    """Layers of the whole model that one merge makes: ``count`` from ``at`` on, with what lies before or after."""

    at: int
    count: int
    at_an_end: bool


class _Document:
    """One mapping of a file."""

    def __init__(self, labels: Mapping[str, str], names: Sequence[str], dtype: str | None) -> None:
        self.labels, self.names, self.dtype = labels, names, dtype

    def of(self, node: Recipe) -> dict[str, Any]:
        ends = {"dtype": self.dtype, "out_dtype": self.dtype} if self.dtype else {}
        if isinstance(node, Merge) and not any(_is_cut(i) for i in node.inputs):
            return self._head(node) | self._parts(node, None) | ends
        parts = self._parts_of(node)
        heads = [self._head(part) for part, _ in parts]
        if any(h.keys() != heads[0].keys() or h["merge_method"] != heads[0]["merge_method"] for h in heads):
            raise Inexpressible("its layers come from merges by several methods")
        slices, at = [], 0
        for (part, count), head in zip(parts, heads, strict=True):
            own_base = {k: v for k, v in head.items() if v != heads[0][k]}
            at_an_end = at == 0 or part is parts[-1][0]
            slices.append(self._parts(part, _Run(at, count, at_an_end)) | own_base)
            at += count
        return heads[0] | {"slices": slices} | ends

    def _parts_of(self, node: Recipe) -> list[tuple[Merge, int]]:
        """The merges whose layers follow each other, with the number of layers of each."""
        if isinstance(node, Merge):
            return [(node, _depth(node.names(self.names)))]
        if isinstance(node, Cross):
            raise Inexpressible(f"it crosses weights {node.mask} by {node.mask}")
        if isinstance(node, Noise):
            raise Inexpressible("it adds seeded noise to the weights of a model")
        if not isinstance(node, Layers):
            raise Inexpressible("it is a model as it is")
        if node.ends != (0, len(node.inputs) - 1):
            raise Inexpressible("its embeddings or its head come from the middle")
        out, at = [], 0
        for number, part in enumerate(node.inputs):
            layers = [of for which, of in node.program[at:] if which == number]
            if not isinstance(part, Merge) or node.program[at : at + len(layers)] != tuple((number, k) for k in layers):
                raise Inexpressible("its layers are woven from several models")
            if layers != list(range(len(layers))) or len(layers) != _depth(part.names(self.names)):
                raise Inexpressible("it takes layers out of a merge")
            out.append((part, len(layers)))
            at += len(layers)
        return out

    def _head(self, node: Merge) -> dict[str, Any]:
        if node.method not in MERGEKIT_NAMES:
            raise Inexpressible(f"it has no method {node.method}")
        return {"merge_method": node.method} | ({"base_model": self._base(node)} if _is_based(node) else {})

    def _base(self, node: Merge) -> str:
        return self._label(node.inputs[0] if node.method == "slerp" else node.base)

    def _parts(self, node: Merge, run: _Run | None) -> dict[str, Any]:
        shared, each = self._parameters(node, run)
        sources = []
        if run is not None and _is_based(node) and self._base(node) not in map(self._label, node.inputs):
            sources.append(
                {"model": self._base(node), "layer_range": [_first(node.base), _first(node.base) + run.count]}
            )
        for model, parameters in zip(node.inputs, each, strict=True):
            source: dict[str, Any] = {"model": self._label(model)}
            if run is not None:
                source["layer_range"] = [_first(model), _first(model) + run.count]
            sources.append(source | ({"parameters": parameters} if parameters else {}))
        return {"sources" if run else "models": sources} | ({"parameters": shared} if shared else {})

    def _label(self, node: Recipe) -> str:
        node = _whole(node)
        key = node.digest if isinstance(node, Expert) else node.id
        return self.labels[key]

    def _parameters(self, node: Merge, run: _Run | None) -> tuple[Parameters, list[Parameters]]:
        """What all models share, and what each one has."""
        method, names = METHODS[node.method], node.names(self.names)
        at, count = (run.at, run.count) if run else (0, _depth(names))
        ranges = [(_first(i), _first(i) + count) for i in node.inputs]
        seen = [n for n in names if run is None or run.at_an_end or layer_of(n) is not None]
        places = {s.name: s for s in spots(seen, (0, count), ranges, at, method.name in LONE)}
        if any(rule.place.part for rule in node.rules):
            raise Inexpressible("it has one number for the whole of a tensor, and here parts of tensors have their own")
        given = {n: method.complete(node.settings(n, layer_of(n)), len(node.inputs), "") for n in seen}
        _check_distances(method, given.values(), len(node.inputs))
        shared: Parameters = {}
        each: list[Parameters] = [{} for _ in node.inputs]
        for key, setting in method.settings.items():
            values = {n: g[key] for n, g in given.items()}
            if not _is_said(method, key, values.values()):
                continue
            if setting.kind is tuple:
                for i, parameters in enumerate(each):
                    own = {places[n].own[i]: v[i] for n, v in values.items() if isinstance(v, tuple)}
                    parameters[key] = _placed(own)
            else:
                shared[key] = _placed({places[n].shared: _in_words(key, v) for n, v in values.items()})
        return shared, each


def _check_distances(method: Method, given: Iterable[Mapping[str, Value]], experts: int) -> None:
    """Raises Inexpressible where mergekit refuses a number because a probability would be 0 or less, or 1 or more."""
    for values in given:
        for name, value, centre, room in method.distances(values, experts):
            if value >= room - ROUNDING:
                raise Inexpressible(f"it refuses {name} {value:g} beside a probability of {centre:g}")


def _is_said(method: Method, key: str, values: Iterable[Value]) -> bool:
    """Whether a setting has to be written; raises where mergekit does not have it."""
    setting, found = method.settings[key], set(values)
    if key in ("seed", "task_vectors"):  # said otherwise, or not at all
        return False
    if key == "weight" and method.name in WEIGHTED:
        return True
    if method.name == "karcher" and key == "weight":
        if any(len(set(v)) > 1 for v in found if isinstance(v, tuple)):
            raise Inexpressible("its karcher has no weights")
        return False
    count = len(next(iter(found))) if setting.kind is tuple else 0  # type: ignore[arg-type]  # tuples, by their kind
    default = setting.default * count if count and len(setting.default) == 1 else setting.default
    if found == {default}:
        return False
    if key in OURS and not (key == "filter_wise" and method.name == "model_stock"):
        raise Inexpressible(f"its {method.name} has no setting {key}")
    return True


def _in_words(key: str, value: Value) -> Value:
    if key != "rescale":
        return value
    if value not in ("l1", "none"):
        raise Inexpressible(f"it does not rescale by {value}")
    return value == "l1"


def _placed(values: Mapping[str, Value]) -> Any:
    """A value for every tensor, as one value or as a list of filters, of which the first in a name counts."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    layers: dict[str, set[Value]] = {}
    for name, value in values.items():
        layers.setdefault(_layer_part(name), set()).add(value)
    # A layer whose tensors agree needs one filter.
    filters = {n: v for n, v in values.items() if len(layers[_layer_part(n)]) > 1 or not _layer_part(n)}
    filters |= {_layer_part(n): v for n, v in values.items() if n not in filters}
    usual = Counter(values.values()).most_common(1)[0][0]
    others = {f: v for f, v in filters.items() if v != usual}
    kept = others | {f: usual for f in filters if f not in others and any(o in f for o in others)}
    # A name may hold another one, so the longest come first.
    return [{"filter": f, "value": kept[f]} for f in sorted(kept, key=len, reverse=True)] + [{"value": usual}]


def _layer_part(name: str) -> str:
    """The part of a tensor's name that says its layer, or nothing."""
    match = LAYER.search(name)
    return match.group(0) if match else ""


def _is_based(node: Merge) -> bool:
    """Whether mergekit wants a base beside the models; where it does not, it would take one for one more model."""
    needed = METHODS[node.method].on_deltas or node.method in {*PAIRED, "model_stock"}
    return needed or bool(node.settings("", None).get("task_vectors"))


def _first(model: Recipe) -> int:
    """The layer that a run of layers starts with."""
    if not _is_cut(model):
        return 0
    assert isinstance(model, Layers)
    return model.program[0][1]


def _depth(names: Iterable[str]) -> int:
    return 1 + max((layer_of(n) or 0 for n in names), default=0)
