"""Statistics for ``evolver merge``: merges of a mergekit file by methods that ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from evolver.config.reading import config_at
from evolver.driver.prepare import Prepared, in_compute, prepare
from evolver.errors import BadInput
from evolver.merging.materialise import Materialiser, StatisticTensors
from evolver.merging.methods import METHODS, Method
from evolver.records.recipe import Expert, Layers, Merge, Recipe, Statistic, ancestors
from evolver.workers.compute import is_open
from evolver.workers.statistics import Statistics
from evolver.workers.worker import build_materialiser, choose_compute, statistics_of

STATISTICS_OPTION = "--statistics"


@dataclass(frozen=True)
class MergeStatistics:
    """The configuration of a run, on whose models and items statistics are collected.

    Attributes:
        statistics: collects them, or finds them in the cache, where ``evolver stats`` and runs put them.
        models: builds the models that they are of, as a run does.
    """

    prepared: Prepared
    statistics: Statistics
    models: Materialiser

    def __call__(self, node: Statistic, weights: Iterator[tuple[str, Tensor]]) -> StatisticTensors:
        """See ``OpenStatistic``. The weights are not read: a file may have them in another dtype than a run."""
        return self.statistics(node, self.models.stream(node.of))

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe of a file with the statistics that its merges ask for.

        Raises BadInput for a base or an expert that is not the configuration's, and for merges of runs of layers.
        """
        if isinstance(recipe, Layers):
            return replace(recipe, inputs=tuple(self.recipe(i) for i in recipe.inputs))
        if not isinstance(recipe, Merge):
            return recipe
        made = replace(recipe, inputs=tuple(self.recipe(i) for i in recipe.inputs), base=self.recipe(recipe.base))
        method = METHODS[recipe.method]
        return replace(made, statistics=self._asked(method, made)) if method.statistics else made

    def _asked(self, method: Method, merge: Merge) -> tuple[Statistic, ...]:
        maker, place = self.prepared.maker, f"{STATISTICS_OPTION}: {self.prepared.file}"
        if any(isinstance(node, Layers) for node in ancestors(merge)):
            raise BadInput(f"{place}: {method.name} has statistics of whole models only; write models, not slices.")
        if not isinstance(merge.base, Expert) or merge.base.digest != maker.base.digest:
            raise BadInput(f"{place}: its base is not that of the merge by {method.name}; give one with the same base.")
        if all(kind.base for kind in method.statistics.values()):
            return maker.statistics_of(method, maker.experts)
        known = {expert.digest: expert for expert in maker.experts}
        found = []
        for model in merge.inputs:
            if not isinstance(model, Expert) or model.digest not in known:
                raise BadInput(
                    f"{place}: {method.name} needs statistics of {model.label}, which is none of its experts; give a "
                    "configuration that lists it."
                )
            found.append(known[model.digest])
        return maker.statistics_of(method, found)


def measured(path: str | Path) -> MergeStatistics:
    """What a configuration says about statistics. Raises BadInput for one that cannot be used."""
    prepared = prepare(config_at(path))
    if is_open(prepared.config):
        prepared = in_compute(prepared, choose_compute(prepared.config).compute)
    statistics = statistics_of(prepared.plan, prepared.opened, prepared.tasks)
    return MergeStatistics(prepared, statistics, build_materialiser(prepared.plan, prepared.opened))
