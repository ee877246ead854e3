"""Recipes into weights: a stream of (name, tensor), one tensor at a time.

Every node of a recipe is a model in the run's dtype: arithmetic is done in float32 and rounded once a node. That is
why a parent may be kept (the resident population) or rebuilt from its own recipe with the same bytes as the result.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from evolver.merging import methods, operators
from evolver.merging.weights import Checkpoint, Source, layer_of
from evolver.records import Cross, Expert, Merge, Recipe, ancestors

# Elementwise methods go through a tensor in pieces that stay in a core's cache.
PIECE = 1 << 16


class Materialiser:
    """Builds models from the opened base and experts.

    Args:
        base: the common ancestor; its tensor names are the model's.
        sources: base and experts by digest.
        dtype: of floating tensors; None keeps each tensor's dtype in the base.
        cache_bytes: budget of the resident population.
    """

    def __init__(
        self,
        base: Checkpoint,
        sources: Mapping[str, Source],
        dtype: torch.dtype | None = None,
        cache_bytes: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.base, self.sources, self.dtype = base, sources, dtype
        self.device = torch.device(device)
        self._slots = cache_bytes // max(1, sum(self._bytes(n) for n in base.names()))
        self._resident: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def stream(self, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model, in the base's order of names."""
        order = self._order(recipe)
        last = {i.id: step for step, node in enumerate(order) for i in node.below}
        keep: dict[str, dict[str, Tensor]] = {i: {} for i in self._worth_keeping(recipe, order)}
        for name in self.base.names():
            values: dict[str, Tensor] = {}
            for step, node in enumerate(order):
                values[node.id] = self._tensor(node, name, values)
                if node.id in keep:
                    keep[node.id][name] = values[node.id]
                for used in node.below:  # what no later node needs is let go, however long the lineage
                    if last[used.id] == step:
                        values.pop(used.id, None)
            yield name, values[recipe.id]
        self._admit(keep)

    def _order(self, recipe: Recipe) -> list[Recipe]:
        """The nodes to be computed, inputs first; nothing below a resident node, which is there already."""
        needed, stack = set(), [recipe]
        while stack:
            node = stack.pop()
            if node.id not in needed:
                needed.add(node.id)
                if node.id not in self._resident:
                    stack.extend(node.below)
        return [n for n in ancestors(recipe) if n.id in needed]

    def _worth_keeping(self, recipe: Recipe, order: list[Recipe]) -> list[str]:
        """Inputs of the recipe and theirs: the population. Memory-mapped checkpoints are the system's to cache."""
        for node in order:
            if node.id in self._resident:
                self._resident.move_to_end(node.id)
        near = {i.id: i for direct in recipe.inputs for i in (direct, *direct.inputs)}
        computed = {n.id for n in order if n.id not in self._resident}
        new = [i for i, n in near.items() if i in computed and not self._is_mapped(n)]
        return new[: self._slots]

    def _is_mapped(self, node: Recipe) -> bool:
        return isinstance(node, Expert) and isinstance(self.sources[node.digest], Checkpoint)

    def _admit(self, built: Mapping[str, dict[str, Tensor]]) -> None:
        self._resident.update(built)
        while len(self._resident) > self._slots:
            self._resident.popitem(last=False)

    def _tensor(self, node: Recipe, name: str, values: Mapping[str, Tensor]) -> Tensor:
        if node.id in self._resident:
            return self._resident[node.id][name]
        if isinstance(node, Expert):
            tensor = self.sources[node.digest].tensor(name)
            return tensor.to(self.device, self._dtype_of(name))
        inputs = [values[i.id] for i in node.inputs]
        if not inputs[0].is_floating_point():
            return inputs[0]  # counters and masks are copied from the first input, never averaged
        if isinstance(node, Cross):
            return operators.cross(node.strategy, inputs[0], inputs[1:], node.F, node.Cr, node.seed, name)
        return self._merge(node, name, inputs, values[node.base.id])

    def _merge(self, node: Merge, name: str, inputs: list[Tensor], base: Tensor) -> Tensor:
        method = methods.METHODS[node.method]
        settings = node.settings(layer_of(name))
        flats, anchor = [t.reshape(-1) for t in inputs], base.reshape(-1)
        size = anchor.numel()
        step = PIECE if method.elementwise else max(1, size)
        out = torch.empty_like(anchor)
        for start in range(0, size, step):
            place = slice(start, start + step)
            origin = anchor[place].float()
            stack = torch.stack([f[place].float() for f in flats])
            shape = (-1,) if method.elementwise else base.shape
            if method.on_deltas:
                merged = origin + method((stack - origin).view(len(flats), *shape), settings, name).view(-1)
            else:
                merged = method(stack.view(len(flats), *shape), settings, name).view(-1)
            out[place] = merged
        return out.view(base.shape)

    def _bytes(self, name: str) -> int:
        return self._dtype_of(name).itemsize * math.prod(self.base.headers[name].shape)

    def _dtype_of(self, name: str) -> torch.dtype:
        own = self.base.headers[name].dtype
        return self.dtype if self.dtype is not None and own.is_floating_point else own
