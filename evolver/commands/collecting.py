"""``evolver stats``: collects the statistics of a configuration's experts before a run needs them, and lists them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolver.config.reading import ConfigText
from evolver.driver.prepare import Prepared, in_compute, prepare
from evolver.driver.run import Chooser
from evolver.errors import BadInput, nearest
from evolver.evaluation.collectors import COLLECTORS
from evolver.merging.methods import METHODS, Of
from evolver.pool import Pool
from evolver.records import Candidate, Question
from evolver.records.recipe import Merge, Statistic, ancestors
from evolver.workers.compute import is_open
from evolver.workers.pools import PoolMaker
from evolver.workers.worker import statistics_of


@dataclass(frozen=True)
class KeptStatistic:
    """A statistic that is kept.

    Attributes:
        fresh: it was collected by this call.
    """

    node: Statistic
    file: Path
    fresh: bool

    @property
    def line(self) -> str:
        """The statistic in words."""
        size = self.file.stat().st_size / 1e6
        return f"{self.node.describe()}: {'collected' if self.fresh else 'kept'}, {size:.1f} MB, {self.file}"


def collect_statistics(
    given: ConfigText, kinds: Sequence[str], device: str, make_pool: PoolMaker, choose: Chooser
) -> Iterator[KeptStatistic]:  # fmt: skip
    """Collect what is not kept yet, on the pool of the configuration, and yield every statistic once it is kept.

    Args:
        kinds: names of collectors; none: those that the methods of the section ``search`` ask for.

    Raises BadInput for unknown kinds, for a search that needs none, and for what cannot be collected.
    """
    asked = _asked(given, kinds)
    prepared = prepare(given, device=device)
    if is_open(prepared.config):
        prepared = in_compute(prepared, choose(prepared.config).compute)
    wanted = [node for of in asked for node in prepared.maker.wanted_of_experts(of)]
    nodes = list(dict.fromkeys(needed for node in wanted for needed in _needed(node)))
    statistics = statistics_of(prepared.plan, prepared.opened, prepared.tasks)
    missing = []
    for node in nodes:
        file = statistics.kept(node)
        if file is None:
            missing.append(node)
        else:
            yield KeptStatistic(node, file, False)
    if missing:
        with contextlib.closing(make_pool(prepared.plan, "dev", prepared.tasks)) as pool:
            yield from _collected(prepared, pool, missing, statistics.kept)


def _collected(
    prepared: Prepared, pool: Pool, missing: Sequence[Statistic], kept: Callable[[Statistic], Path | None]
) -> Iterator[KeptStatistic]:  # fmt: skip
    """Statistics that workers collect as they make a model of which only one item is scored.

    Raises BadInput where one could not be collected, and where what a worker kept is not seen here.
    """
    waiting, away = dict(enumerate(missing)), dict[int, Statistic]()
    while waiting or away:
        ready = [n for n, node in waiting.items() if not {*waiting.values(), *away.values()} & {*_needed(node)[:-1]}]
        for number in ready[: max(0, pool.free())]:
            node = waiting.pop(number)
            recipe = Merge("simple", (prepared.experts[0],), prepared.base, (), (node,))
            pool.submit(Candidate(number, recipe, "statistics", question=Question(piece=(0, 1))))
            away[number] = node
        for result in pool.wait():
            node = away.pop(result.number)
            if result.status != "ok":
                raise BadInput(f"{prepared.file}: {node.describe()} could not be collected: {result.reason}.")
            file = kept(node)
            if file is None:
                raise BadInput(
                    f"{prepared.file}: {node.describe()} was collected by {result.worker}, but it is not in the cache "
                    "of this machine; set EVOLVER_CACHE to a folder that all machines share."
                )
            yield KeptStatistic(node, file, True)


def _needed(node: Statistic) -> list[Statistic]:
    """The statistics without which one cannot be collected, as it is of a merge with statistics, and itself; what is
    used stands before what uses it.
    """
    return [found for found in ancestors(node) if isinstance(found, Statistic)]


def _asked(given: ConfigText, kinds: Sequence[str]) -> list[Of]:
    """What is asked for: by name, or by the methods that a search names."""
    known = {of for found in METHODS.values() for of in found.statistics.values() if not of.merged}
    for kind in kinds:
        if kind not in COLLECTORS:
            raise BadInput(f"evolver stats: there is no kind of statistic {kind!r}; {nearest(kind, COLLECTORS)}")
    if kinds:
        return [of for kind in kinds for of in sorted((o for o in known if o.statistic == kind), key=lambda o: o.base)
                or [Of(kind)]]  # fmt: skip
    named = {name for name in _texts(given.parsed().search) if name in METHODS}
    asked = list(dict.fromkeys(of for name in sorted(named) for of in METHODS[name].statistics.values()))
    if not asked:
        raise BadInput(
            f"{given.origin}: search: no merge method of this search needs statistics; name a kind with --kind "
            f"({', '.join(COLLECTORS)})."
        )
    return asked


def _texts(settings: Any) -> Iterator[str]:
    """All texts in nested settings."""
    if isinstance(settings, Mapping):
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        for inner in settings:
            yield from _texts(inner)
    elif isinstance(settings, str):
        yield settings
