"""A search over programs of layers: another search chooses values, and a space of programs makes recipes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from evolver.config.corrections import AfterSettings
from evolver.config.reading import check_section
from evolver.config.section import Section
from evolver.errors import BadInput, nearest
from evolver.records.recipe import Recipe
from evolver.search.base import SEARCHES, Algorithm, Maker, Merger, Search, Setup, Space, algorithm, inside
from evolver.search.coefficients.base import Coefficients, CoefficientSettings
from evolver.search.programs.dataflow import DataFlow
from evolver.search.programs.prune import Prune
from evolver.search.programs.sources import BLEND, MERGE, SCALE, Sources
from evolver.search.programs.swap import Swap

ProgramSpace = Swap | Prune | DataFlow

BASE_NAME = "base"
# Which keys belong to which of the spaces; the others belong to all.
KEYS = {"groups": ("swap", "prune"), "remove": ("prune",), "repeats": ("dataflow",), "most": ("dataflow",)}
KEYS["protect"] = ("prune", "dataflow")


class LayersSettings(Section):
    """Settings of the search over programs of layers."""

    algorithm: Literal["layers"] = Field(description="name of this search")
    genome: Literal["swap", "prune", "dataflow"] = Field(
        "swap",
        description="which programs are searched. swap: as many layers as the models have, each from one of the "
        "sources. prune: fewer layers, each from some of the sources, merged. dataflow: all layers of all sources in a "
        "row, the row several times, and for each layer in it whether it is used",
    )
    sources: list[str] | None = Field(
        None,
        min_length=1,
        description="what layers are taken from: names of experts, base, or merge, the merge whose coefficients are "
        "searched along with the program; default: all experts, for swap also merge",
    )
    ends: str | None = Field(
        None,
        description="the source of the embeddings, the last norm and the head, and of protected layers; default: for "
        "swap it is searched, else the first of the sources",
    )
    groups: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="for swap and prune: number of groups of neighbouring layers that have the same source or sources; "
        "default: every layer is a group",
    )
    remove: int | list[int] | None = Field(
        None,
        description="for prune: number of layers that are removed, or a list of the least and the most; default: a "
        "quarter of the layers",
    )
    protect: int = Field(
        1, ge=0, le=10_000, description="for prune and dataflow: number of layers at each end that always stay"
    )
    repeats: int = Field(3, ge=1, le=1000, description="for dataflow: how often the row of layers comes")
    most: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="for dataflow: the most layers of a model; default: twice as many as the experts have",
    )
    by: dict[str, Any] = Field(
        default_factory=lambda: {"algorithm": "tpe"},
        description="the search that chooses the values: algorithm and settings of a search over coefficients, such as "
        "{algorithm: tpe, startup: 20}; its method, tune, settings and layer_groups are those of the source merge",
    )


@algorithm("layers", LayersSettings, inside="by")
def search_layers(setup: Setup, settings: LayersSettings) -> Search:
    """Layer programs: which model each layer is taken from (layer swapping, Bandarkar et al. 2024, arXiv 2410.01335),
    which layers go (GPTailor, Su et al. 2025, arXiv 2506.20480), or which come again (the data-flow space of Akiba et
    al. 2024, arXiv 2403.13187).

    Unlike the other searches it changes the order and the number of layers. The values of a program are chosen by a
    search over coefficients (``by``), together with the coefficients of a merge that layers may be taken from. It
    assumes that layers of fine-tunes of one base still understand each other's outputs.
    """
    for key in _given(settings):
        if settings.genome not in KEYS.get(key, (settings.genome,)):
            raise BadInput(
                f"search.{key}: the genome {settings.genome} has no such setting; leave {key} out, or write genome: "
                f"{' or '.join(KEYS[key])}."
            )
    found, typed = _inner(settings)
    names, depth = _names(setup, settings, typed), setup.maker.depth(anew=settings.genome != "swap")
    program = PROGRAMS[settings.genome](settings, _sources(setup, names, depth))
    with inside("search.by"):
        search = found.build(replace(setup, maker=_ProgramMaker(setup.maker, program)), typed)
    if isinstance(search, Coefficients):
        search.name = settings.algorithm
    return search


@dataclass(frozen=True)
class _ProgramMaker:
    """Gives a search over coefficients a space of programs, where it asks for the space of a merge method."""

    maker: Maker
    program: ProgramSpace

    def space(
        self, method: str | Sequence[str], groups: int | Literal["per-layer"], tune: Sequence[str] | None,
        settings: Mapping[str, Any], classes: bool = False, knots: int | None = None,
        after: Sequence[AfterSettings] = (),
    ) -> Space:  # fmt: skip
        if MERGE not in self.program.sources.names:
            return self.program
        merge = self.maker.space(method, groups, tune, settings, classes, knots, after)
        return replace(self.program, sources=replace(self.program.sources, merge=merge))

    def space_in(self, recipe: Any, after: Sequence[AfterSettings] = ()) -> Space:
        if MERGE not in self.program.sources.names:
            return self.program
        merge = self.maker.space_in(recipe, after)
        return replace(self.program, sources=replace(self.program.sources, merge=merge))

    def merger(
        self, settings: Mapping[str, Any], members: int | None = None, adapt: Sequence[str] | bool = False
    ) -> Merger:
        return self.maker.merger(settings, members, adapt)

    def crossover(self, first: Recipe, second: Recipe, ratio: float, point: float) -> Recipe:
        return self.maker.crossover(first, second, ratio, point)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.maker.shapes

    @property
    def changes(self) -> Callable[[], Mapping[str, tuple[float, ...]]]:
        return self.maker.changes

    def depth(self, anew: bool) -> int:
        return self.maker.depth(anew)


def _inner(settings: LayersSettings) -> tuple[Algorithm, CoefficientSettings]:
    """The search inside."""
    known = [name for name, found in SEARCHES.items() if issubclass(found.settings, CoefficientSettings)]
    name = settings.by.get("algorithm")
    if name not in known:
        raise BadInput(f"search.by.algorithm: {name!r} cannot choose the values of a program; {nearest(name, known)}")
    if settings.genome == "swap" and name == "cmaes":
        raise BadInput(
            "search.by.algorithm: cmaes can only tune numbers, and the genome swap chooses among sources; write "
            "by: {algorithm: tpe}, or genome: prune or dataflow."
        )
    typed = check_section(SEARCHES[name].settings, settings.by, "search.by")
    assert isinstance(typed, CoefficientSettings)
    if not isinstance(typed.method, str):
        raise BadInput("search.by.method: layers are taken from merges by one method; write one method, such as ties.")
    return SEARCHES[name], typed


def _given(settings: Section) -> list[str]:
    """The keys whose values are not the defaults."""
    fields = type(settings).model_fields.items()
    return [key for key, field in fields if getattr(settings, key) != field.get_default(call_default_factory=True)]


def _names(setup: Setup, settings: LayersSettings, typed: CoefficientSettings) -> tuple[str, ...]:
    """The names of the sources."""
    experts = [expert.name for expert in setup.experts]
    names = settings.sources or [*experts, *([MERGE] if settings.genome == "swap" else [])]
    known = [*experts, BASE_NAME, MERGE]
    if MERGE in experts:
        raise BadInput(
            f"experts.{MERGE}: in a program of layers, {MERGE} names the merge; give the expert another name."
        )
    for name in [*names, *([settings.ends] if settings.ends else [])]:
        if name not in known:
            key = "sources" if name in names else "ends"
            raise BadInput(f"search.{key}: there is no source {name!r}; {nearest(name, known)}")
    if len(set(names)) < len(names):
        raise BadInput("search.sources: a source is listed twice; list each source once.")
    if settings.ends and settings.ends not in names:
        raise BadInput(f"search.ends: {settings.ends} is none of the sources; add it to search.sources.")
    given = [key for key in _given(typed) if key in CoefficientSettings.model_fields]
    if given and MERGE not in names:
        raise BadInput(
            f"search.by.{given[0]}: no layer is taken from a merge with coefficients; leave {given[0]} out, or add "
            f"{MERGE} to search.sources."
        )
    return tuple(names)


def _sources(setup: Setup, names: tuple[str, ...], depth: int) -> Sources:
    models: dict[str, Recipe] = {BASE_NAME: setup.base, **{expert.name: expert for expert in setup.experts}}

    def blend(chosen: Sequence[Recipe], scale: float) -> Recipe:
        return setup.maker.merger({"method": BLEND, SCALE: scale}, len(chosen))(chosen)

    return Sources(names, models, setup.base, depth, None, blend)


def _swap(settings: LayersSettings, sources: Sources) -> Swap:
    if len(sources.names) < 2:
        raise BadInput("search.sources: layers are swapped between sources, and there is one; list two or more.")
    return Swap(sources, _groups(settings, sources), settings.ends)


def _prune(settings: LayersSettings, sources: Sources) -> Prune:
    depth, free = sources.depth, sources.depth - 2 * settings.protect
    given = settings.remove if settings.remove is not None else max(1, depth // 4)
    bounds = [given, given] if isinstance(given, int) else given
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] or bounds[1] == 0:
        raise BadInput(f"search.remove: {given} is no number of layers; write one, or [least, most].")
    least, most = bounds
    if most >= depth:
        raise BadInput(f"search.remove: without {most} of {depth} layers, a model has none; write less than {depth}.")
    if free < 1:
        raise BadInput(f"search.protect: all {depth} layers are protected, so none can go; write a smaller number.")
    if most > free:
        raise BadInput(
            f"search.remove: {most} of {depth} layers cannot go, as {2 * settings.protect} are protected; write {free} "
            "or less, or a smaller search.protect."
        )
    return Prune(sources, _groups(settings, sources), settings.ends or sources.names[0], least, most, settings.protect)


def _dataflow(settings: LayersSettings, sources: Sources) -> DataFlow:
    depth, fixed = sources.depth, 2 * settings.protect
    most = settings.most if settings.most is not None else 2 * depth
    if fixed >= depth:
        raise BadInput(
            f"search.protect: all {depth} layers are protected, so there is nothing to choose; write a smaller number."
        )
    if most <= fixed:
        raise BadInput(
            f"search.most: {most} layers leave no room beside {fixed} protected ones; write {fixed + 1} or more, or a "
            "smaller search.protect."
        )
    return DataFlow(sources, settings.ends or sources.names[0], settings.repeats, most, settings.protect)


def _groups(settings: LayersSettings, sources: Sources) -> int:
    groups = settings.groups if settings.groups is not None else sources.depth
    if groups > sources.depth:
        raise BadInput(
            f"search.groups: {groups} groups of {sources.depth} layers; write a number from 1 to {sources.depth}."
        )
    return groups


PROGRAMS: Mapping[str, Callable[[LayersSettings, Sources], ProgramSpace]] = {
    "swap": _swap, "prune": _prune, "dataflow": _dataflow,
}  # fmt: skip
