"""The orders of all hidden units of a model that make it most like another one: measured, found once, and kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evolver.checkpoints.kept import Damaged, open_kept, write_kept
from evolver.checkpoints.weights import Source, TensorInfo
from evolver.config.model import AlignmentSettings
from evolver.errors import EvolverError
from evolver.merging.alignment.layouts import (
    KEY,
    MLP_UNITS,
    OUTPUT,
    QUERY,
    STREAM,
    VALUES,
    UnitLayer,
    stream_axes,
    unit_axes,
)
from evolver.merging.alignment.matching import (
    MOST_SWEEPS,
    HeadOrder,
    Heads,
    best_order,
    head_order,
    unit_order,
)
from evolver.merging.alignment.semantics import semantic_map, token_head
from evolver.merging.alignment.transport import exact_order, soft_transport, unit_costs
from evolver.records.canonical import content_hash
from evolver.storage.paths import expand

# Below this mean cosine of MLP rows, two models are taken to be of different ancestry: fine-tunes of one base are at
# 0.9 and more, models that were trained apart are near 0.
DIFFERENT_BELOW = 0.5
# The folder of the cache, and the form of what is in it, which changes when orders are found in another way.
CACHED_ORDERS, ORDERS_FORM = "alignments", 1
FIGURES = "figures"
# Rows of an embedding that are float64 at a time.
ROWS_AT_A_TIME = 1 << 13

Read = Callable[[str], Tensor]
Axes = Mapping[str, Sequence[tuple[int, str]]]


@dataclass(frozen=True)
class AlignmentFigures:
    """What was measured.

    Attributes:
        cosine: the mean over all layers and hidden units of the cosine between the unit's incoming MLP weights in the
            two models, as they are.
        after: the same of the units in their new order; as before where nothing was aligned.
        moved: the share of hidden units of MLPs that are at another place.
        heads: the share of attention heads at another place.
    """

    cosine: float
    after: float
    moved: float
    heads: float


@dataclass(frozen=True)
class FoundOrders:
    """The orders that change something, by their names, and the figures.

    An order is a vector of places (units,), or, where units are mixed, a transport (theirs, ours).
    """

    orders: Mapping[str, Tensor]
    figures: AlignmentFigures


def all_axes(layers: list[UnitLayer], headers: Mapping[str, TensorInfo], stream: bool, place: str) -> Axes:
    """Which axes of which tensors are ordered, by the name of the tensor.

    Raises BadInput where it is not known which tensors hold features of the stream.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for layer in layers:
        for name, axis, tag in unit_axes(layer, headers):
            found.setdefault(name, []).append((axis, tag))
    for name, axis in stream_axes(layers, headers, place) if stream else ():
        found.setdefault(name, []).append((axis, STREAM))
    return found


def found_once(
    base: Source, model: Source, headers: Mapping[str, TensorInfo], layers: list[UnitLayer], axes: Axes,
    settings: AlignmentSettings,
) -> FoundOrders:  # fmt: skip
    """The orders from the cache, or found and put there."""
    key = content_hash([ORDERS_FORM, base.digest(), model.digest(), settings.model_dump(mode="json")])
    file = Path(expand("$EVOLVER_CACHE")) / CACHED_ORDERS / f"{key}.safetensors"
    tags = {tag for places in axes.values() for _, tag in places}
    with contextlib.suppress(Damaged, OSError):
        if (kept := open_kept(file, key)) is not None and (figures := kept.get(FIGURES)) is not None:
            orders = {tag: order for tag in sorted(tags) if (order := kept.get(tag)) is not None}
            return FoundOrders(orders, AlignmentFigures(*figures.tolist()))
    found = find_orders(base.tensor, model.tensor, headers, layers, axes, settings)
    told = torch.tensor([*vars(found.figures).values()], dtype=torch.float64)
    with contextlib.suppress(OSError, EvolverError):  # a cache that cannot be written costs time, not correctness
        write_kept(file, key, {**found.orders, FIGURES: told})
    return found


def find_orders(
    ours: Read, theirs: Read, headers: Mapping[str, TensorInfo], layers: list[UnitLayer], axes: Axes,
    settings: AlignmentSettings,
) -> FoundOrders:  # fmt: skip
    """The orders of a model's units, as the settings say.

    Args:
        ours: reads a tensor of the model that stays as it is.
        theirs: reads one of the model that is re-ordered.
    """
    before = mean_cosine(ours, theirs, layers)
    if settings.when == "different" and before >= DIFFERENT_BELOW:
        return FoundOrders({}, AlignmentFigures(before, before, 0.0, 0.0))
    orders: dict[str, Tensor] = {}
    if settings.method == "semantic":
        head = token_head(headers, "model.align.method")
        turn = semantic_map(ours(head), theirs(head))
        orders |= {} if turn is None else {STREAM: turn}
    elif settings.parts == "all":
        orders[STREAM] = stream_order(ours, theirs, headers, layers, axes, settings)
    seen = ordered(theirs, axes, orders)
    heads = []
    for layer in layers:
        new, moved = _layer_orders(layer, headers, ours, seen, settings)
        orders |= new
        heads.append(moved)
    after = mean_cosine(ours, ordered(theirs, axes, orders), layers)
    units = [orders[layer.tag(MLP_UNITS)] for layer in layers if layer.tag(MLP_UNITS) in orders]
    share = sum(map(moved_share, units)) / max(1, len(units))
    figures = AlignmentFigures(before, after, share, sum(heads) / len(heads))
    return FoundOrders({tag: o for tag, o in orders.items() if o.dim() > 1 or moved_share(o) > 0}, figures)


def moved_share(order: Tensor) -> float:
    """The share of units that come to another place; of a transport, those whose largest part is from elsewhere."""
    places = order.argmax(0) if order.dim() > 1 else order
    return float((places != torch.arange(len(places))).double().mean())


def mean_cosine(ours: Read, theirs: Read, layers: list[UnitLayer]) -> float:
    """The mean cosine between incoming MLP weights, over all units; a unit of zeros counts as 0."""
    each = []
    for layer in layers:
        a, b = (_incoming(read, layer, None) for read in (ours, theirs))
        each.append(torch.nn.functional.cosine_similarity(a, b, dim=1))
    return float(torch.cat(each).mean())


def ordered(read: Read, axes: Axes, orders: Mapping[str, Tensor]) -> Read:
    """A reader of the same model with its units in other orders."""
    return lambda name: brought(name, read(name), axes, orders)


def brought(name: str, tensor: Tensor, axes: Axes, orders: Mapping[str, Tensor]) -> Tensor:
    """A tensor with its units in other orders.

    Where a stream is turned, no gain of a norm belongs to one feature any more: each feature gets the mean of the gains
    of those that it was made of, which is the diagonal of the turned diagonal matrix.
    """
    for axis, tag in axes.get(name, ()):
        if (order := orders.get(tag)) is not None:
            gain = tag == STREAM and order.dim() > 1 and tensor.dim() == 1 and name.endswith(".weight")
            tensor = put_in_order(tensor, axis, order.square() if gain else order)
    return tensor


def put_in_order(tensor: Tensor, axis: int, order: Tensor) -> Tensor:
    """A tensor with one axis in another order, or with its entries mixed along it as a transport says."""
    if order.dim() == 1:
        return tensor.index_select(axis, order)
    mixed: Tensor = torch.tensordot(order.T, tensor.float(), dims=([1], [axis])).movedim(0, axis)
    return mixed.to(tensor.dtype).contiguous()


def stream_order(
    ours: Read, theirs: Read, headers: Mapping[str, TensorInfo], layers: list[UnitLayer], axes: Axes,
    settings: AlignmentSettings,
) -> Tensor:  # fmt: skip
    """The order of the features that all layers share, by coordinate ascent: first from the tensors that hold nothing
    else, such as embeddings, then in turn with the orders of the layers until it stays.
    """
    matched = settings.model_copy(update={"method": "matching"})
    alone = [n for n, places in axes.items() if [tag for _, tag in places] == [STREAM]]
    order = best_order(_stream_products(ours, theirs, axes, alone))
    for _ in range(MOST_SWEEPS):
        seen, orders = ordered(theirs, axes, {STREAM: order}), dict[str, Tensor]()
        for layer in layers:
            orders |= _layer_orders(layer, headers, ours, seen, matched)[0]
        held = [n for n, places in axes.items() if any(tag == STREAM for _, tag in places)]
        new = best_order(_stream_products(ours, ordered(theirs, axes, orders), axes, held), order)
        if torch.equal(new, order):
            break
        order = new
    return order


def _stream_products(ours: Read, theirs: Read, axes: Axes, names: Iterable[str]) -> Tensor:
    """Σ over tensors of the products of their features, float64 (width, width)."""
    total: Tensor | None = None
    for name in names:
        axis = next(a for a, tag in axes[name] if tag == STREAM)
        a, b = (read(name).movedim(axis, -1) for read in (ours, theirs))
        pieces = zip(*(t.reshape(-1, t.shape[-1]).split(ROWS_AT_A_TIME) for t in (a, b)), strict=True)
        for one, other in pieces:
            found = one.double().T @ other.double()
            total = found if total is None else total.add_(found)
    if total is None:
        raise ValueError("no tensor holds features of the stream")
    return total


def _layer_orders(
    layer: UnitLayer, headers: Mapping[str, TensorInfo], ours: Read, theirs: Read, settings: AlignmentSettings
) -> tuple[dict[str, Tensor], float]:  # fmt: skip
    """The orders of one layer by their names, and the share of heads that move."""
    orders: dict[str, Tensor] = {}
    if settings.parts != "heads":
        orders[layer.tag(MLP_UNITS)] = _units(layer, headers, ours, theirs, settings)
    if settings.parts == "mlp":
        return orders, 0.0
    mine, other = (_heads(layer, headers, read) for read in (ours, theirs))
    found = head_order(mine, other)
    kinds = (QUERY, KEY, VALUES, OUTPUT)
    orders |= {layer.tag(kind): order for kind, order in zip(kinds, found.flat(mine.key.shape[1]), strict=True)}
    return orders, _moved_heads(found)


def _moved_heads(order: HeadOrder) -> float:
    count = order.heads.shape[1]
    return moved_share((order.groups[:, None] * count + order.heads).flatten())


def _units(
    layer: UnitLayer, headers: Mapping[str, TensorInfo], ours: Read, theirs: Read, settings: AlignmentSettings
) -> Tensor:  # fmt: skip
    a, b = (_incoming(read, layer, headers) for read in (ours, theirs))
    if settings.method != "transport":
        out = f"{layer.prefix}{layer.layout.outer}.weight"
        return unit_order(*(torch.cat([rows, read(out).double().T], 1) for rows, read in ((a, ours), (b, theirs))))
    if settings.regularisation == 0:
        return exact_order(unit_costs(a, b, settings.metric))
    return soft_transport(a, b, settings.regularisation, settings.metric, settings.masses)


def _incoming(read: Read, layer: UnitLayer, headers: Mapping[str, TensorInfo] | None) -> Tensor:
    """The incoming weights of an MLP's units, float64 (units, n), with their biases where ``headers`` has some."""
    parts = []
    for module in layer.layout.inner:
        parts.append(_rows(read, f"{layer.prefix}{module}", headers or {}))
    return torch.cat(parts, 1)


def _rows(read: Read, module: str, headers: Mapping[str, TensorInfo]) -> Tensor:
    weight = read(f"{module}.weight").double()
    bias = f"{module}.bias"
    return torch.cat([weight, read(bias).double()[:, None]], 1) if bias in headers else weight


def _heads(layer: UnitLayer, headers: Mapping[str, TensorInfo], read: Read) -> Heads:
    """The weights of a layer's attention, cut by heads."""
    names, groups, count = layer.layout, layer.groups, layer.heads // layer.groups
    query, key, value = (_rows(read, f"{layer.prefix}{m}", headers) for m in (names.query, names.key, names.value))
    output = read(f"{layer.prefix}{names.output}.weight").double().T
    return Heads(
        query.view(groups, count, -1, query.shape[1]), key.view(groups, -1, key.shape[1]),
        value.view(groups, -1, value.shape[1]), output.reshape(groups, count, -1, output.shape[1]),
    )  # fmt: skip
