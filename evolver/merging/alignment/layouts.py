"""Which axes of a model's tensors can be re-ordered without a change of what the model computes.

An order of hidden units is shared by all axes that carry the same units: of an MLP, the rows of the matrices before the
non-linearity and the columns of the one behind it. This is known for the families of models that are listed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from evolver.checkpoints.weights import TensorInfo
from evolver.errors import BadInput

# What an order is of: hidden units of an MLP; rows of queries, keys and values; what attention hands on; the stream of
# features that all layers read and add to.
MLP_UNITS, QUERY, KEY, VALUES, OUTPUT, STREAM = "units", "query", "key", "value", "output", "stream"
# The number of attention heads, and of those of keys and values, as configurations call them.
HEAD_COUNTS, GROUP_COUNTS = ("num_attention_heads", "n_heads"), ("num_key_value_heads",)
# Settings of models that read more than text: other parts of them may have other heads.
SEVERAL_PARTS = ("text_config", "vision_config")
LAYER_PREFIX = re.compile(r"(?:^|\.)(?:layers|layer)\.\d+\.")
# Outside of all layers: the axis of the stream by the end of a name; None: it holds no features of the stream. The rows
# of a pooler, or of the first layer of a head, are features of their own.
STREAM_OUTSIDE = (
    (re.compile(r"(embed_tokens|word_embeddings|position_embeddings|token_type_embeddings)\.weight$"), 1),
    (re.compile(r"(^|\.)(norm|LayerNorm|layernorm)\.(weight|bias)$"), 0),
    (re.compile(r"(lm_head|score|pooler\.dense|pre_classifier|classifier\.dense)\.weight$"), 1),
    (re.compile(r"(lm_head|score|pooler\.dense|pre_classifier|classifier\.dense)\.bias$"), None),
    (re.compile(r"classifier\.out_proj\.(weight|bias)$"), None),
)
# The last layer of a classifier reads what a pooler makes of the stream, or, where there is none, the stream itself.
POOLED = re.compile(r"(pooler\.dense|pre_classifier)\.weight$")
CLASSIFIER = re.compile(r"(^|\.)classifier\.(weight|bias)$")


@dataclass(frozen=True)
class UnitLayout:
    """The names of a layer's modules in one family of models.

    Attributes:
        said: how people call these models.
        query, key, value, output: of attention.
        inner: of the MLP, those before the non-linearity, whose rows are its hidden units.
        outer: the one behind it, whose columns they are.
        inside: with what the names begin of everything that the hidden units of attention and MLP pass through.
        head_norms: norms that are the same for every head.
    """

    said: str
    query: str
    key: str
    value: str
    output: str
    inner: tuple[str, ...]
    outer: str
    inside: tuple[str, ...]
    head_norms: tuple[str, ...] = ()


LAYOUTS = (
    UnitLayout(
        "decoders such as Llama, Mistral, Qwen, Gemma and SmolLM",
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", ("self_attn.", "mlp."),
        ("self_attn.q_norm", "self_attn.k_norm"),
    ),
    UnitLayout(
        "encoders such as BERT, RoBERTa, ELECTRA and MiniLM",
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        ("intermediate.dense",), "output.dense", ("attention.self.", "intermediate.", "crossattention."),
    ),
    UnitLayout(
        "DistilBERT", "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin",
        ("ffn.lin1",), "ffn.lin2", ("attention.", "ffn."),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class UnitLayer:
    """A layer whose hidden units can be re-ordered.

    Attributes:
        prefix: of the names of its tensors.
        layout: the names of its modules.
        heads: how many heads have queries.
        groups: how many heads have keys and values; each is shared by heads ÷ groups heads in a row.
    """

    prefix: str
    layout: UnitLayout
    heads: int
    groups: int

    def tag(self, kind: str) -> str:
        """The name of an order of this layer."""
        return f"{self.prefix}{kind}"

    def modules(self) -> dict[str, tuple[str, int]]:
        """The kind of unit that every module's weight has, and along which axis, by the module's full name."""
        names = self.layout
        found = dict.fromkeys(names.inner, (MLP_UNITS, 0)) | {names.outer: (MLP_UNITS, 1)}
        found |= {names.query: (QUERY, 0), names.key: (KEY, 0), names.value: (VALUES, 0), names.output: (OUTPUT, 1)}
        return {f"{self.prefix}{module}": place for module, place in found.items()}


def unit_layers(headers: Mapping[str, TensorInfo], config: Mapping[str, Any], place: str) -> list[UnitLayer]:
    """The layers of a model whose hidden units can be re-ordered: all that it has.

    Args:
        headers: of the model's tensors.
        config: the model's settings, which say how many heads there are.
        place: what a refusal begins with: the key of the configuration and the model.

    Raises BadInput for other families of models, and for one with a part that nobody here knows.
    """
    heads = next((config[k] for k in HEAD_COUNTS if k in config), None)
    groups = next((config[k] for k in GROUP_COUNTS if config.get(k) is not None), heads)
    prefixes = dict.fromkeys(n[: m.end()] for n in headers if (m := LAYER_PREFIX.search(n)))
    if not prefixes or type(heads) is not int or type(groups) is not int or any(k in config for k in SEVERAL_PARTS):
        raise _unknown(place, f"a {config.get('model_type')} model has another layout")
    found = []
    for prefix in prefixes:
        own = [la for la in LAYOUTS if all(f"{prefix}{m}.weight" in headers for m in (la.query, la.outer, *la.inner))]
        if not own:
            raise _unknown(place, f"the tensors of {prefix.rstrip('.')} have other names")
        layer = UnitLayer(prefix, own[0], heads, groups)
        _check(layer, headers, place)
        found.append(layer)
    return found


def unit_axes(layer: UnitLayer, headers: Mapping[str, TensorInfo]) -> Iterator[tuple[str, int, str]]:
    """The tensors of a layer that hold its units: name, axis, and the name of the order."""
    for module, (kind, axis) in layer.modules().items():
        yield f"{module}.weight", axis, layer.tag(kind)
        if axis == 0 and f"{module}.bias" in headers:
            yield f"{module}.bias", 0, layer.tag(kind)


def stream_axes(layers: list[UnitLayer], headers: Mapping[str, TensorInfo], place: str) -> Iterator[tuple[str, int]]:
    """The tensors of a model that hold features of its stream, and the axis of each.

    Raises BadInput where a tensor outside of the layers is of a kind that nobody here knows.
    """
    modules = {m: axis for layer in layers for m, (_, axis) in layer.modules().items()}
    shared = {f"{layer.prefix}{norm}" for layer in layers for norm in layer.layout.head_norms}
    width = headers[f"{layers[0].prefix}{layers[0].layout.query}.weight"].shape[1]
    pooled = any(POOLED.search(name) for name in headers)
    for name, info in headers.items():
        module, _, part = name.rpartition(".")
        if module in modules:  # of biases, those of modules that add to the stream
            axis = 1 - modules[module] if part == "weight" else 0 if modules[module] == 1 else None
        else:
            axis = _outside(name, pooled, module in shared, place)
        if axis is None:
            continue
        if len(info.shape) <= axis or info.shape[axis] != width:
            raise _stream_unknown(place, name)
        yield name, axis


def _outside(name: str, pooled: bool, of_heads: bool, place: str) -> int | None:
    """The axis of the stream of a tensor that is none of attention or MLP; None where it has none."""
    if LAYER_PREFIX.search(name):
        return None if of_heads else 0
    if CLASSIFIER.search(name):
        return None if pooled or name.endswith(".bias") else 1
    for pattern, axis in STREAM_OUTSIDE:
        if pattern.search(name):
            return axis
    raise _stream_unknown(place, name)


def _check(layer: UnitLayer, headers: Mapping[str, TensorInfo], place: str) -> None:
    """Raises BadInput where a layer has a part that is not known, or shapes that its heads do not explain."""
    modules = layer.modules()
    shapes = {module: headers[f"{module}.weight"].shape for module in modules if f"{module}.weight" in headers}
    if len(shapes) < len(modules) or any(len(shape) != 2 for shape in shapes.values()):
        raise _unknown(place, f"the tensors of {layer.prefix.rstrip('.')} have other names or shapes")
    sizes: dict[str, set[int]] = {kind: set() for kind in (MLP_UNITS, QUERY, KEY, VALUES, OUTPUT)}
    for module, (kind, axis) in modules.items():
        sizes[kind].add(shapes[module][axis])
    (query,), (key,), (value,), (output,) = (sizes[kind] for kind in (QUERY, KEY, VALUES, OUTPUT))
    heads, groups = layer.heads, layer.groups
    even = len(sizes[MLP_UNITS]) == 1 and heads % groups == 0 and query % heads == value % groups == 0
    if not even or key * heads != query * groups or value * heads != output * groups:
        raise _unknown(place, f"the shapes of {layer.prefix.rstrip('.')} are not those of {heads} heads")
    for name in (n for n in headers if n.startswith(layer.prefix)):
        module, inner = name.rpartition(".")[0], name.removeprefix(layer.prefix)
        if module in modules or not inner.startswith(layer.layout.inside):
            continue
        norm = inner.rpartition(".")[0] in layer.layout.head_norms
        if not norm or headers[name].shape != (query // heads,):
            raise _unknown(place, f"{name} is no tensor of theirs")


def _unknown(place: str, why: str) -> BadInput:
    known = "; ".join(layout.said for layout in LAYOUTS)
    return BadInput(f"{place}: hidden units can be aligned in {known}, and {why}; write align: none.")


def _stream_unknown(place: str, name: str) -> BadInput:
    return BadInput(
        f"{place}: it is not known which features of the stream {name} holds, so the stream keeps its order; write "
        "align: both, or, for what auto does, a mapping with parts: both."
    )
