"""Recipes into weights: a stream of (name, tensor), one tensor at a time.

Every node of a recipe is a model in the run's dtype: arithmetic is done in float32 and rounded once a node. That is
why a parent may be kept (the resident population) or rebuilt from its own recipe with the same bytes as the result.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import singledispatchmethod
from typing import Any, Protocol

import torch
from torch import Tensor

from evolver.checkpoints.adapted import Adapted
from evolver.checkpoints.weights import Checkpoint, Source, TensorInfo
from evolver.kernels.compiled import Kernels
from evolver.merging import crossing, methods, noise
from evolver.merging.alignment.realigned import Realigned
from evolver.merging.engine.apply import AllTensors, apply
from evolver.merging.engine.pieces import InputTensors
from evolver.merging.methods import Of
from evolver.merging.methods.here import Stack
from evolver.records.depth import origin_of
from evolver.records.graph import working_order
from evolver.records.noise import Noise
from evolver.records.recipe import Cross, Expert, Layers, Merge, Recipe, Statistic, ancestors, layer_of

Task = tuple[Recipe, str]


class StatisticTensors(Protocol):
    """A statistic of a model; a tensor of the model may have none."""

    def get(self, name: str) -> Tensor | None: ...


# Opens a statistic, given the weights of the model that it is of, or collects it.
OpenStatistic = Callable[[Statistic, Iterator[tuple[str, Tensor]]], StatisticTensors]


class Materialiser:
    """Builds models from the opened base and experts.

    Args:
        base: the common ancestor; its tensor names are the model's.
        sources: base and experts by digest.
        dtype: of floating tensors; None keeps each tensor's dtype in the base.
        cache_bytes: budget of the resident population.
        kernels: fused kernels, where there are some; the bits are the same.
        statistics: opens those that methods ask for.
    """

    def __init__(
        self,
        base: Checkpoint,
        sources: Mapping[str, Source],
        dtype: torch.dtype | None = None,
        cache_bytes: int = 0,
        device: torch.device | str = "cpu",
        kernels: Kernels | None = None,
        statistics: OpenStatistic | None = None,
    ) -> None:
        self.base, self.sources, self.dtype, self.kernels = base, sources, dtype, kernels
        self.device = torch.device(device)
        self._slots = cache_bytes // max(1, sum(self._bytes(n) for n in base.names()))
        self._resident: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._models: dict[str, AllTensors] = {}
        self._open_statistic, self._statistics = statistics, dict[str, StatisticTensors]()
        self._sigmas: dict[tuple[str, ...], float] = {}  # of noise, by the names of models and tensor

    def names(self, recipe: Recipe) -> list[str]:
        """The names of the model's tensors, in the base's order; a layer's repetitions follow it tensor by tensor."""
        names = recipe.names(self.base.names())
        if not isinstance(recipe, Layers):
            return names
        first = dict[tuple[str, str], int]()
        for place, name in enumerate(names):
            first.setdefault(origin_of(recipe, name), place)
        return sorted(names, key=lambda name: first[origin_of(recipe, name)])

    def info(self, recipe: Recipe, name: str) -> TensorInfo:
        """Shape and dtype of one tensor of the model."""
        while needed := recipe.needs(name):
            recipe, name = needed[0]
        return TensorInfo(self.base.headers[name].shape, self._dtype_of(name))

    def stream(self, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model, one at a time. Those of a repeated layer are built once and come again at once.

        Statistics are opened first, and where they are missing collected, before the first tensor comes.
        """
        order = self._opened(recipe)
        keep: dict[str, dict[str, Tensor]] = {i: {} for i in self._worth_keeping(recipe, order)}
        self._models.clear()
        straight = not any(isinstance(n, Layers) for n in ancestors(recipe))
        built: tuple[tuple[str, str], Tensor] | None = None
        for name in self.names(recipe):
            origin = origin_of(recipe, name)
            if built is None or built[0] != origin:
                tasks = [(n, name) for n in order] if straight else self._tasks(recipe, name)
                built = origin, self._run(tasks, keep)
            yield name, built[1]
        self._models.clear()
        # Of a model of which not every layer was used, only a part is there.
        self._admit({n.id: keep[n.id] for n in order if n.id in keep and len(keep[n.id]) == len(self.names(n))})

    def clear(self) -> None:
        """Let all models go that are kept in memory."""
        self._resident.clear()
        self._models.clear()

    def _run(self, tasks: list[Task], keep: Mapping[str, dict[str, Tensor]]) -> Tensor:
        """The tensor of the last task, after those that it needs."""
        last = {below: step for step, task in enumerate(tasks) for below in task[0].needs(task[1])}
        values: dict[tuple[str, str], Tensor] = {}
        for step, (node, name) in enumerate(tasks):
            values[node.id, name] = self._tensor(node, name, values)
            if node.id in keep:
                keep[node.id][name] = values[node.id, name]
            for used in node.needs(name):  # what no later node needs is let go, however long the lineage
                if last[used] == step:
                    values.pop((used[0].id, used[1]), None)
        return values[tasks[-1][0].id, tasks[-1][1]]

    def _tasks(self, recipe: Recipe, name: str) -> list[Task]:
        """Which tensors of which nodes one tensor of the recipe needs, inputs first, each as late as possible."""
        out: dict[tuple[str, str], Task] = {}
        stack: list[tuple[Task, bool]] = [((recipe, name), False)]
        while stack:
            task, expanded = stack.pop()
            key = (task[0].id, task[1])
            if expanded:
                out.setdefault(key, task)
            elif key not in out:
                stack.append((task, True))
                stack.extend((below, False) for below in reversed(self._needs(task)))
        distance = dict.fromkeys(out, 0)  # the longest way from the tensor that is wanted
        for key, task in reversed(out.items()):
            for node, below in self._needs(task):
                distance[node.id, below] = max(distance[node.id, below], distance[key] + 1)
        return [out[key] for key in sorted(out, key=lambda key: -distance[key])]

    def _needs(self, task: Task) -> list[Task]:
        """What a tensor is computed from; nothing where its model is resident."""
        return [] if task[0].id in self._resident else task[0].needs(task[1])

    def _opened(self, recipe: Recipe) -> list[Recipe]:
        """The nodes that the recipe is computed from, inputs before what uses them. Its statistics are open then.

        What only a statistic is of is not among the nodes: where the statistic is kept, nobody computes it.
        """
        for node in working_order(recipe, self._resident):
            if isinstance(node, Statistic) and node.id not in self._statistics:
                if self._open_statistic is None:
                    raise ValueError(f"this process cannot collect {node.describe()}")
                self._statistics[node.id] = self._open_statistic(node, self.stream(node.of))
        return [node for node in working_order(recipe, self._resident) if not isinstance(node, Statistic)]

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
        source = self.sources[node.digest] if isinstance(node, Expert) else None
        return isinstance(source, Checkpoint) and not isinstance(source, Adapted | Realigned)

    def _admit(self, built: Mapping[str, dict[str, Tensor]]) -> None:
        self._resident.update(built)
        while len(self._resident) > self._slots:
            self._resident.popitem(last=False)

    def _tensor(self, node: Recipe, name: str, values: Mapping[tuple[str, str], Tensor]) -> Tensor:
        if node.id in self._resident:
            return self._resident[node.id][name]
        return self._compute(node, name, [values[n.id, needed] for n, needed in node.needs(name)])

    @singledispatchmethod
    def _compute(self, node: Any, name: str, below: list[Tensor]) -> Tensor:
        """One tensor of a node from those that it needs; every kind of node is registered below."""
        raise TypeError(f"there is no code that computes a {type(node).__name__}")

    @_compute.register
    def _(self, node: Expert, name: str, below: list[Tensor]) -> Tensor:
        return self.sources[node.digest].tensor(name).to(self.device, self._dtype_of(name))

    @_compute.register
    def _(self, node: Layers, name: str, below: list[Tensor]) -> Tensor:
        return below[0]

    @_compute.register
    def _(self, node: Cross, name: str, below: list[Tensor]) -> Tensor:
        if _is_copied(below[0]):
            return below[0]
        parent, *partners = below
        given = (node.strategy, parent, partners, node.F, node.Cr, node.seed, node.unit(name))
        if node.mask == "scalar":
            return crossing.cross(*given, self.kernels)
        return crossing.cross_units(*given, by_row=node.mask == "row", kernels=self.kernels)

    @_compute.register
    def _(self, node: Noise, name: str, below: list[Tensor]) -> Tensor:
        point, *experts, base = below
        if _is_copied(point):
            return point
        key = (*(e.id for e in node.experts), node.base.id, node.needs(name)[-1][1])
        if key not in self._sigmas:  # the same for every candidate, which then reads no expert again
            self._sigmas[key] = noise.task_vector_rms(experts, base)
        sigma = self._sigmas[key]
        return noise.with_noise(point, sigma, node.terms, node.distribution, node.rank, name, self.kernels)

    @_compute.register
    def _(self, node: Merge, name: str, below: list[Tensor]) -> Tensor:
        if _is_copied(below[0]):
            return below[0]
        method = methods.METHODS[node.method]
        if node.id not in self._models:
            self._models[node.id] = self._model(node)
        whole, model, layer = self._whole(node, name, below), self._models[node.id], layer_of(name)
        merged = []
        for part in node.parts(name, layer):
            values = method.in_force(node.settings(name, layer, part), len(node.inputs))
            own = whole if part is None else whole.part(part)
            if own.base.numel():
                merged.append(apply(method, values, own, model, self.kernels))
        return (merged[0] if len(merged) == 1 else torch.cat(merged)).view(whole.base.shape)

    def _statistics_of(self, node: Merge, name: str) -> dict[str, Stack | None]:
        """What a merge is handed for one tensor, by the method's parameter, or None where one of a kind has none."""
        wanted, out = methods.METHODS[node.method].statistics, dict[Of, Stack | None]()
        count = len(node.statistics) // max(1, len(set(wanted.values())))
        for number, kind in enumerate(dict.fromkeys(wanted.values())):
            mine = node.statistics[number * count : (number + 1) * count]
            found = [self._statistics[s.id].get(name) for s in mine]
            whole = [t.to(self.device) for t in found if t is not None]
            out[kind] = whole if count and len(whole) == count else None
        return {parameter: out[kind] for parameter, kind in wanted.items()}

    def _whole(self, node: Merge, name: str, below: list[Tensor]) -> InputTensors:
        *inputs, base = below
        layer = layer_of(name)
        depth = None if layer is None else layer / max(1, self.base.layers - 1)
        statistics = self._statistics_of(node, name)
        return InputTensors(name, inputs, base, [i.id for i in node.inputs], depth, statistics)

    def _model(self, node: Merge) -> AllTensors:
        """All tensors that a merge goes over, read afresh for statistics of the model as a whole."""

        def tensors() -> Iterator[InputTensors]:
            for name in self.names(node):
                below = [self._run(self._tasks(n, of), {}) for n, of in node.needs(name)]
                if below[-1].is_floating_point():
                    yield self._whole(node, name, below)

        headers = self.base.headers
        sizes = (math.prod(headers[n].shape) for n in self.base.names() if headers[n].dtype.is_floating_point)
        return AllTensors(sum(sizes), tensors)

    def _bytes(self, name: str) -> int:
        return self._dtype_of(name).itemsize * math.prod(self.base.headers[name].shape)

    def _dtype_of(self, name: str) -> torch.dtype:
        own = self.base.headers[name].dtype
        return self.dtype if self.dtype is not None and own.is_floating_point else own


def _is_copied(tensor: Tensor) -> bool:
    """Whether a tensor is taken from the first input: counters and masks are never averaged."""
    return not tensor.is_floating_point() or not tensor.numel()
