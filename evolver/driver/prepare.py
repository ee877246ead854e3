"""A configuration, checked, with everything opened that a run stands on."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from evolver.checkpoints.doubts import refuse_strangers, suspicions
from evolver.checkpoints.grams import task_grams, task_sizes
from evolver.checkpoints.weights import Checkpoint
from evolver.config import Budget, Config
from evolver.config.changes import FREE_KEYS, computing, default_at, keeping_base_chat, renamed, without_select
from evolver.config.reading import ConfigText
from evolver.config.recipes import recipe_of, with_content
from evolver.driver.early import chosen_search, innermost
from evolver.driver.objectives import objectives_of
from evolver.driver.refusals import refuse_estimate, refuse_unfit
from evolver.driver.starts import Starts, refuse_depth, starts_of
from evolver.errors import BadInput
from evolver.evaluation.blueprint import Blueprint, ModelFolder
from evolver.evaluation.collectors import collector_named
from evolver.evaluation.depth import check_alike, count_layers
from evolver.evaluation.fused import refuse_experts
from evolver.evaluation.overlap import Overlap, overlaps
from evolver.evaluation.rounding import refuse_stacks
from evolver.evaluation.scores.estimates import Estimates
from evolver.evaluation.scores.feasibility import unprovable
from evolver.evaluation.tasks import Tasks, load_tasks
from evolver.loggers import check_loggers
from evolver.merging.companions import Companions
from evolver.merging.corrected import Corrected
from evolver.merging.maker import RecipeMaker
from evolver.merging.materialise import Materialiser
from evolver.merging.mergekit import RecipeSpace
from evolver.merging.settings.genome import Genome
from evolver.records import SPLITS, Split
from evolver.records.objective import Objective
from evolver.records.recipe import Expert, Recipe
from evolver.runs.folder import RunFolder, compute_of, config_of_run, made_before
from evolver.runs.origin import taken_over
from evolver.search import SEARCHES, Search
from evolver.search.base import Setup
from evolver.search.coefficients.base import CoefficientSettings, space_of
from evolver.search.continued import continued
from evolver.search.estimating import Estimating
from evolver.storage import Storage
from evolver.threads import too_many
from evolver.workers.compute import is_open, settled
from evolver.workers.measures import with_texts
from evolver.workers.opened import STRICT, Opened, check_device, draw_up, open_models
from evolver.workers.plan import CHAT, SCORING_PACKAGES, TOKENS, Plan, items_hash
from evolver.workers.statistics import refuse_tasks, sample_hash, tasks_of
from evolver.workers.worker import build_materialiser, own_materialiser, statistics_of

RECORDED_PACKAGES = ("torch", "transformers", "lm-eval", "optuna", "safetensors", "numpy", "ray")


@dataclass(frozen=True)
class Prepared:
    """A checked configuration with everything opened that a run stands on."""

    config: Config
    file: str
    opened: Opened
    tasks: Tasks
    plan: Plan
    base: Expert
    experts: tuple[Expert, ...]
    estimates: Estimates
    search: Search
    identity: Mapping[str, Any]
    maker: RecipeMaker
    warnings: tuple[str, ...]
    # The search space of a mergekit file that leaves values free, where the search is in one.
    template: RecipeSpace | None = None

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives of the run; none where it has the score alone."""
        return objectives_of(self.config, self.tasks)

    @property
    def taken_over(self) -> int:
        """How many candidates the search begins with that an earlier run has scored."""
        return int(self.identity.get("origin", {}).get("candidates", 0))

    @property
    def searches_on(self) -> bool:
        """Whether candidates are left to the search after those that an earlier run has scored."""
        return self.config.budget.candidates is None or self.config.budget.candidates > self.taken_over


def prepare(
    given: ConfigText, name: str | None = None, weights: bool = True, device: str | None = None,
    run: Storage | None = None, origin: Mapping[str, Any] | None = None,
) -> Prepared:  # fmt: skip
    """Check a configuration: all that can be known from headers and task files, before any candidate is built.

    Args:
        weights: whether base and experts are read for their digests, without which nothing can be run.
        device: on which models are going to be scored, so that one has to find room and suit the tasks; None: no
            model is scored.
        run: the folder of the run, which may hold one that is to be continued.
        origin: what the run takes over from an earlier one, as ``taken_over`` says it; default: what its folder says.

    Raises BadInput, one sentence with file, key and remedy.
    """
    config, file = given.parsed(), given.origin
    config = config if name is None else renamed(config, name)
    config = config if run is None else _as_begun(config, run)
    origin = origin or (None if run is None else taken_over(run))
    algorithm, settings = chosen_search(config, file)
    check_loggers(config, file)
    try:
        opened = open_models(config)
        config = with_texts(settled(config, opened.base.headers))
        if device:
            check_device(config, opened, device)
        tasks = load_tasks(config)
        blueprint = draw_up(config, opened) if device else None
        if device:
            tasks.check_model(blueprint)
        estimates = Estimates(tasks.scale("dev"), config.evaluation.block_items)
        refuse_unfit(config, algorithm, settings, estimates, tasks)
        refuse_depth(config, opened.base.names())
        if config.evaluation.quantise:
            refuse_stacks({name: info.shape for name, info in opened.base.headers.items()})
        maker = _maker(config, opened, tasks, blueprint, weights)
        estimates.experts = tuple(expert.id for expert in maker.experts)
        if weights and config.model.strict:
            refuse_strangers(opened.base, opened.experts.values(), STRICT, weights=True)
        warnings = _doubts(config, opened, algorithm, estimates, weights)
        setup = Setup(
            maker.experts, maker.base, config.seed, _left(config.budget, origin), maker, estimates,
            config.evaluation.early_stopping, config.evaluation.racing is not None,
            arrival=config.order == "arrival", tasks=tuple(estimates.scale.weights),
            objectives=objectives_of(config, tasks), subset=config.evaluation.subset,
            constraints=len(config.constraints), owned={name: _owned(config, tasks, name) for name in config.experts},
        )  # fmt: skip
        starts = Starts() if origin else _starts(config, file, maker, opened, (algorithm, settings))
        search = _search(config, setup, algorithm, settings, starts)
        template = searched_file(config, maker)
    except BadInput as error:
        raise BadInput(given.sentence(error)) from error
    hashes = {s: items_hash(tasks, s) for s in SPLITS}
    plan = Plan(config, maker.digests, hashes, _stops(config, algorithm))
    identity = _identity(config, settings.model_dump(), plan, bool(tasks.items.select))
    identity |= {"origin": dict(origin)} if origin else {}
    warnings = (*given.notes, *warnings, *getattr(search, "remarks", ()))
    own = (maker.base, maker.experts, estimates, search, identity, maker, warnings, template)
    return Prepared(config, file, opened, tasks, plan, *own)


def _owned(config: Config, tasks: Tasks, expert: str) -> tuple[str, ...]:
    """The tasks of an expert, with those of a group one by one."""
    parts = tasks.parts("dev")
    return tuple(part for task in tasks_of(config, tasks, expert) for part in parts[task])


def _maker(
    config: Config, opened: Opened, tasks: Tasks, blueprint: ModelFolder | None, weights: bool
) -> RecipeMaker:  # fmt: skip
    base, sampled = opened.base, cache(lambda kind, expert: _sampled(config, tasks, blueprint, kind, expert))
    shapes = {name: info.shape for name, info in base.headers.items() if info.dtype.is_floating_point}
    changes = partial(task_sizes, base, list(opened.experts.values())) if weights else None
    return RecipeMaker(
        list(config.experts), base.names(), opened.digests() if weights else None, sampled, base.sizes(),
        partial(_count_layers, base), model_places(config), config.seed, config.statistics.offspring == "own",
        shapes, changes, config.statistics.passes,
    )  # fmt: skip


def model_places(config: Config) -> dict[str, str]:
    """Where base and experts are, by name."""
    return {"base": config.model.base, **config.experts}


def searched_file(config: Config, maker: RecipeMaker) -> RecipeSpace | None:
    """The search space of the mergekit file in which a configuration searches, where it does."""
    recipe = recipe_of(config.search)
    found = None if recipe is None else maker.space_in(recipe)
    assert found is None or isinstance(found, RecipeSpace)  # without corrections
    return found


def _doubts(
    config: Config, opened: Opened, algorithm: str, estimates: Estimates, weights: bool
) -> tuple[str, ...]:  # fmt: skip
    """Sentences that the user should read before the run."""
    return (
        *opened.warnings,
        *(opened.aligned() if weights else ()),
        *(suspicions(opened.base, opened.experts.values()) if weights else ()),
        *filter(None, [too_many(config.evaluation.threads)]),
        *_not_stopped(config, algorithm, estimates),
        *unprovable(config.constraints, estimates.scale),
    )


def _as_begun(config: Config, run: Storage) -> Config:
    """The configuration as a run in this folder understands it, which may be older than some keys."""
    if config.model.chat_template == "auto" and made_before(run, "model", "chat_template"):
        config = keeping_base_chat(config)
    return without_select(config) if made_before(run, "items", "select") else config


def overlap_of(prepared: Prepared) -> dict[str, Overlap]:
    """How many items of the run each expert was trained on, as far as the experts' folders say."""
    return overlaps(prepared.tasks.texts, {n: e.path for n, e in prepared.opened.experts.items()}, SPLITS)


def _left(budget: Budget, origin: Mapping[str, Any] | None) -> Budget:
    """What a budget leaves to the search itself. Where it leaves nothing, the search is not used, only checked."""
    left = (budget.candidates or 0) - int((origin or {}).get("candidates", 0))
    return budget.model_copy(update={"candidates": left}) if origin and left > 0 else budget


def as_it_is(prepared: Prepared, model: Expert) -> Expert:
    """A model in the form in which a report shows it: with its own labels, where merged models have those of all."""
    return replace(model, digest=prepared.plan.own_digest(model.name))


def materialiser_of(prepared: Prepared) -> Materialiser:
    """What builds models here; statistics that their recipes ask for and that are not kept are collected here, too."""
    statistics = statistics_of(prepared.plan, prepared.opened, prepared.tasks)
    return build_materialiser(prepared.plan, prepared.opened, statistics=statistics)


def materials_of(prepared: Prepared, recipe: Recipe) -> tuple[Materialiser, Companions]:
    """What writes the folder of a model: what builds its weights, and the files beside them. Base and experts have
    their own tokens, as in their scores.
    """
    own = {prepared.plan.own_digest(name): own for name, own in prepared.opened.own.items()}
    if isinstance(recipe, Expert) and recipe.digest in own:
        found = own[recipe.digest]
        return own_materialiser(prepared.config, found, recipe), found.companions
    return materialiser_of(prepared), prepared.opened.companions


def in_compute(prepared: Prepared, compute: str) -> Prepared:
    """The same with ``model.compute`` settled, where the configuration leaves it open."""
    if not is_open(prepared.config):
        return prepared
    config = computing(prepared.config, compute)
    identity = {**prepared.identity, "model": {**prepared.identity["model"], "compute": compute}}
    return replace(prepared, config=config, plan=replace(prepared.plan, config=config), identity=identity)


def prepare_run(run: Storage) -> Prepared:
    """The models, data and settings of a run that is in a folder.

    Raises BadInput where it is not there any more, or has other weights or items now.
    """
    prepared = prepare(config_of_run(run), run=run)
    if chosen := compute_of(run):
        prepared = in_compute(prepared, chosen)
    run_folder(prepared, run)
    return prepared


def run_folder(prepared: Prepared, run: Storage) -> RunFolder:
    """The run's folder.

    Raises BadInput where it holds a run of another configuration, or cannot be read.
    """
    return RunFolder(run, prepared.identity, defaults_of(prepared))


def defaults_of(prepared: Prepared) -> Callable[[str], Any]:
    """What gives the default of a dotted key of the configuration, such as ``search.F``."""

    def default(key: str) -> Any:
        section, _, rest = key.partition(".")
        if section != "search":
            return default_at(Config, key)
        own = prepared.identity["search"]
        while (inside := SEARCHES[str(own["algorithm"])].inside) and rest.startswith(f"{inside}."):
            own, rest = own[inside], rest.removeprefix(f"{inside}.")
        return default_at(SEARCHES[str(own["algorithm"])].settings, rest)

    return default


def _count_layers(base: Checkpoint, anew: bool) -> int:
    shapes = {name: info.shape for name, info in base.headers.items()}
    if anew:
        check_alike(shapes, base.config, base.path)
    return count_layers(shapes, base.path)


def block_of(config: Config, file: str, split: Split, count: int) -> int:
    """How many of a split's items the workers of a configuration score at a time.

    Raises BadInput for a search that is none.
    """
    return Plan(config, {}, {}, _stops(config, chosen_search(config, file)[0])).block(split, count)


def _starts(config: Config, file: str, maker: RecipeMaker, opened: Opened, search: tuple[str, Any]) -> Starts:
    """The models that the search begins with; those that are guessed lie in its space, if it has one with weights."""
    _, settings = innermost(*search, file)
    by_method = isinstance(settings, CoefficientSettings) and settings.recipe is None
    space = space_of(maker, settings) if by_method else None
    if space is not None and space.branches:
        space = next(iter(space.branches.values()))
    assert space is None or isinstance(space, Genome | Corrected)
    grams = cache(partial(task_grams, opened.base, list(opened.experts.values())))
    return starts_of(config, maker.experts, maker.base, opened.base.names(), space, grams)


def _search(config: Config, setup: Setup, algorithm: str, settings: Any, starts: Starts) -> Search:
    """The search of a configuration, which begins with some models where the configuration names them.

    Raises BadInput for settings that do not fit together.
    """
    setup = replace(setup, budget=_after(setup.budget, starts.count)) if starts.count else setup
    estimate = config.evaluation.estimate
    if estimate is None:
        search = SEARCHES[algorithm].build(setup, settings)
    else:
        refuse_estimate(config, algorithm)
        inner = SEARCHES[algorithm].build(replace(setup, early_stopping=False), settings)
        search = Estimating(inner, setup, estimate, config.finalists.count, config.finalists.front)
    return continued(starts.listed, search, starts.sequel) if starts.count else search


def _after(budget: Budget, count: int) -> Budget:
    """What a budget leaves to the search after the models that it begins with.

    Raises BadInput where it leaves nothing.
    """
    if budget.candidates is None:
        return budget
    if budget.candidates <= count:
        raise BadInput(
            f"start: {count} models are named, which count among the {budget.candidates} candidates of the "
            "budget, so nothing is left for the search; raise budget.candidates, or name fewer models."
        )
    return budget.model_copy(update={"candidates": budget.candidates - count})


def _stops(config: Config, algorithm: str) -> bool:
    """Whether a search may have its answer before the last item.

    ``early_stopping`` is not asked: batches show in scores, so they are the same with it and without it, and with them
    the decisions.
    """
    parts = SEARCHES[algorithm].partial or config.evaluation.estimate is not None
    return parts or SEARCHES[algorithm].incumbent


def _sampled(config: Config, tasks: Tasks, blueprint: ModelFolder | None, kind: str, expert: str) -> str:
    """The hash of the items that an expert's statistics are collected on.

    Raises BadInput where none can be collected.
    """
    collector = collector_named(kind)
    if isinstance(blueprint, Blueprint) and not collector.gradients:
        refuse_experts(blueprint.module, "search")
    refuse_tasks(config, tasks, expert, collector)
    return sample_hash(config, tasks, expert)


def _not_stopped(config: Config, algorithm: str, estimates: Estimates) -> Iterator[str]:
    """A sentence on the tasks for which no evaluation can stop early, if there are some."""
    names = [task for task, metric in estimates.scale.metrics.items() if not metric.judged]
    if names and config.evaluation.early_stopping and SEARCHES[algorithm].incumbent:
        yield (
            f"early stopping is off for {', '.join(names)}: the metric is computed from the answers to all items "
            "together, so nothing is certain about it before the last item"
        )


def _identity(config: Config, search: Mapping[str, Any], plan: Plan, selects: bool) -> dict[str, Any]:
    """What identifies a run: the contents of models and items, not the places of their files.

    Args:
        selects: whether there are select items.
    """
    identity: dict[str, Any] = config.model_dump(mode="json", exclude=set(FREE_KEYS))
    identity["search"] = with_content(search, "the configuration")
    for key in ("constraints", "objectives"):  # runs without them are those from before there were any
        if not identity[key]:
            del identity[key]
    del identity["model"]["strict"]  # it may refuse a run, and changes nothing in one
    identity["model"]["base"] = plan.digests["base"]
    # The base's own files are the keys' default: runs that are older than the keys have used them.
    if TOKENS not in plan.digests:
        identity["model"]["tokenizer"] = default_at(Config, "model.tokenizer")
    identity["model"]["chat_template"] = plan.digests.get(CHAT, default_at(Config, "model.chat_template"))
    identity["experts"] = {n: plan.digests[n] for n in config.experts}
    identity["heads"] = {n: d for n, d in plan.digests.items() if n.startswith("head of ")}
    identity["items"] = {split: found for split, found in plan.items.items() if selects or split != "select"}
    identity["evaluation"].pop("include_path")
    for entry in identity["evaluation"]["tasks"]:
        del entry["select"], entry["select_data"]  # the select items say it all
    # Scores of different releases must not be mixed: a forward pass or a prompt may have changed between them.
    identity["versions"] = {p: versions()[p] for p in SCORING_PACKAGES}
    return identity


def versions() -> dict[str, str]:
    """The versions of the packages that scores depend on."""
    return {p: importlib.metadata.version(p) for p in RECORDED_PACKAGES}
