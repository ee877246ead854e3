"""A run from end to end: puts the parts together, and goes on where an earlier call of it stopped."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evolver import __version__, loggers
from evolver.checkpoints.doubts import doubts
from evolver.checkpoints.weights import Checkpoint
from evolver.config import FREE_KEYS, Config, check_section, computing, expand, load, renamed
from evolver.driver.card import candidate_card, licence_of, model_card
from evolver.errors import BadInput, nearest
from evolver.evaluation.scores.estimates import Estimates, first_unjudged
from evolver.evaluation.tasks import SplitScorer, Tasks, load_tasks
from evolver.ledger import Ledger, write_items
from evolver.loggers import Tracked, Trackers
from evolver.loggers.pace import Pace, Remaining
from evolver.loggers.terminal import Display
from evolver.loop import Guesses, evolve
from evolver.merging import mergekit, methods
from evolver.merging.export import export, write_heads
from evolver.merging.settings.genome import Genome, genome
from evolver.merging.settings.placed import fixed_rules
from evolver.pool import Pool
from evolver.records import Candidate, Expert, Merge, Recipe, Result, Rule, Split, dump_recipe
from evolver.report.report import verdict, write_report
from evolver.runs.about import About, Job, write_about
from evolver.runs.folder import RunFolder, compute_of, file_of_run
from evolver.runs.history import History, history_of
from evolver.runs.outcome import Outcome
from evolver.search import SEARCHES, Search
from evolver.search.ahead import ahead
from evolver.search.base import Ordered, Setup
from evolver.search.halving import HalvingSettings
from evolver.search.optuna_samplers import CoefficientSettings
from evolver.search.plain import Listed
from evolver.storage import Storage
from evolver.threads import too_many
from evolver.workers.compute import Choice, is_open, refuse_compute, settled
from evolver.workers.worker import (
    Opened,
    Plan,
    build_materialiser,
    build_model,
    check_memory,
    choose_compute,
    items_hash,
    open_models,
)

PoolMaker = Callable[[Plan, Split, Tasks], Pool]
Chooser = Callable[[Config], Choice]
SPLITS: tuple[Split, Split] = ("dev", "report")
JUDGES = ("torch", "transformers", "lm-eval")
PACKAGES = ("torch", "transformers", "lm-eval", "optuna", "safetensors", "numpy", "ray")


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
    warnings: tuple[str, ...]


def prepare(file: str, name: str | None = None, weights: bool = True, device: str | None = None) -> Prepared:
    """Check a configuration: all that can be known from headers and task files, before any candidate is built.

    Args:
        weights: whether base and experts are read for their digests, without which nothing can be run.
        device: on which a model has to find room; None: not here.

    Raises BadInput, one sentence with file, key and remedy.
    """
    config = load(file) if name is None else renamed(load(file), name)
    algorithm, settings = _algorithm(config, file)
    loggers.check(config, file)
    try:
        opened = open_models(config)
        config = settled(config, opened.base.headers)
        if device:
            check_memory(config, opened, device)
            if config.model.compute != "auto":
                refuse_compute(config.model.compute, device)
        tasks = load_tasks(config)
        estimates = Estimates(tasks.scale("dev"), config.evaluation.block_items)
        _can_race(config, algorithm, estimates)
        workshop = _Workshop(config, opened, opened.digests() if weights else None)
        warnings = tuple(doubts(opened.base, opened.experts.values())) if weights else ()
        warnings += tuple(filter(None, [too_many(config.evaluation.threads)]))
        setup = Setup(
            workshop.experts, workshop.base, config.seed, config.budget, workshop, estimates,
            config.evaluation.early_stopping, config.evaluation.racing is not None,
            arrival=config.order == "arrival", tasks=tuple(tasks.scale("dev").weights),
        )  # fmt: skip
        search = SEARCHES[algorithm].build(setup, settings)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error
    items: dict[Split, str] = {"dev": items_hash(tasks, "dev"), "report": items_hash(tasks, "report")}
    plan = Plan(config, workshop.digests, items, _stops(algorithm, settings))
    identity = _identity(config, settings.model_dump(), plan)
    return Prepared(
        config, file, opened, tasks, plan, workshop.base, workshop.experts, estimates, search, identity, warnings
    )


def in_compute(prepared: Prepared, compute: str) -> Prepared:
    """The same with ``model.compute`` settled, where the configuration leaves it open."""
    if not is_open(prepared.config):
        return prepared
    config = computing(prepared.config, compute)
    identity = {**prepared.identity, "model": {**prepared.identity["model"], "compute": compute}}
    return replace(prepared, config=config, plan=replace(prepared.plan, config=config), identity=identity)


def prepare_run(run: Storage) -> Prepared:
    """What a run that is in a folder stands on.

    Raises BadInput where it is not there any more, or has other weights or items now.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(file_of_run(run, "config.yaml"))
        prepared = prepare(str(file))
    if chosen := compute_of(run):
        prepared = in_compute(prepared, chosen)
    RunFolder(run, prepared.identity)
    return prepared


def planned_merge(file: str) -> tuple[Recipe, tuple[str, ...], Checkpoint]:
    """The merge that a configuration's search makes, what it tunes of it (its numbers here are examples), the base.

    Raises BadInput, for a search that makes none, too.
    """
    config = load(file)
    _, settings = _algorithm(config, file)
    if isinstance(settings, HalvingSettings):
        _, settings = _named(settings.of, file, "search.of.")
    opened = open_models(config)
    workshop = _Workshop(config, opened)
    if isinstance(settings, CoefficientSettings):
        space = workshop.space(settings.method, settings.layer_groups, settings.tune, settings.settings)
        return space.decode(space.encode_equal(1.0)), space.tune, opened.base
    merger = getattr(settings, "merger", None)
    if merger is None:
        raise BadInput(f"{file}: search: this search merges by no method, so no settings are in force.")
    return workshop.merger(merger)(workshop.experts), (), opened.base


def run(
    file: str, results: Storage, make_pool: PoolMaker, display: Display, device: str, name: str | None = None,
    job: Job | None = None, choose: Chooser = choose_compute,
) -> Storage:  # fmt: skip
    """Run a configuration, or the rest of it, and return the run's folder.

    Args:
        file: the configuration.
        results: folder of all runs.
        make_pool: makes the pool of a split.
        display: where to tell how it goes.
        device: on which the exported winner is checked.
        name: of the run, instead of the configuration's.
        job: the Ray job that this is, if it is one.
        choose: chooses the dtype of forward passes where workers are; a run is asked once for it.

    Raises BadInput for anything that the user has to mend.
    """
    prepared = prepare(file, name, device=device)
    prepared = _in_chosen_compute(prepared, results.folder(prepared.config.run), device, choose, display)
    folder = RunFolder(results.folder(prepared.config.run), prepared.identity)
    listeners = loggers.build(prepared.config, file, folder.storage)
    # A pool that the cluster can never offer is refused here, before anything is written.
    try:
        pool = make_pool(prepared.plan, "dev", prepared.tasks)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error
    try:
        folder.create(Path(file).read_text())
        write_items(
            folder.storage, {s: [(i.task, i.index, i.hash) for i in prepared.tasks.items.of(s)] for s in SPLITS}
        )
        about = _about(prepared, folder, job)
        write_about(folder.storage, about)
        with (
            contextlib.closing(Ledger(folder.storage.folder("ledger"), folder.owner, display.say)) as ledger,
            contextlib.closing(Trackers(listeners, display.say)) as trackers,
        ):
            for warning in (*about.warnings, *ledger.warnings):
                display.say(f"warning: {warning}")
            if listeners:
                trackers.begin(_tracked(prepared, folder))
            outcome = _stages(prepared, about, ledger, pool, make_pool, display, trackers)
            _finish(prepared, folder, outcome, display, device)
            trackers.finish(folder.storage)
    except OSError as error:
        raise BadInput(
            f"{error.filename or folder.location}: cannot be read or written ({error.strerror or error}); all "
            "scores are kept: make room or mend the rights, and run the same command again."
        ) from error
    finally:
        pool.close()
    return folder.storage


def _in_chosen_compute(
    prepared: Prepared, folder: Storage, device: str, choose: Chooser, display: Display
) -> Prepared:  # fmt: skip
    """With the dtype in which the run has computed so far or, at its beginning, the faster one where workers are."""
    if not is_open(prepared.config):
        return prepared
    chosen = compute_of(folder)
    try:
        if chosen is None:
            choice = choose(prepared.config)
            display.say(f"forward passes run in {choice.compute}: {choice.why}")
            chosen = choice.compute
        prepared = in_compute(prepared, chosen)
        check_memory(prepared.config, prepared.opened, device)
    except BadInput as error:
        raise BadInput(f"{prepared.file}: {error}") from error
    return prepared


def _about(prepared: Prepared, folder: RunFolder, job: Job | None) -> About:
    scales = {split: prepared.tasks.scale(split) for split in SPLITS}
    warnings = (*prepared.warnings, *prepared.tasks.warnings)
    return About(prepared.config, scales, _versions(), warnings, job and replace(job, location=folder.location))


def _stages(
    prepared: Prepared, about: About, ledger: Ledger, pool: Pool, make_pool: PoolMaker, display: Display,
    trackers: Trackers,
) -> Outcome:  # fmt: skip
    """Baselines, search, and the finalists on the report set."""
    pairs: list[tuple[Candidate, Result]] = []
    plain = Listed(_baselines(prepared), "baseline")
    pace = _pace(prepared, plain.total)

    def watch(candidate: Candidate, result: Result) -> None:
        pairs.append((candidate, result))
        pace.result(result)
        display.result(candidate, result, pace.left())
        trackers.result(candidate, result)

    display.stage("baselines", plain.total)
    evolve(plain, pool, ledger, watch)
    for result in plain.results.values():
        prepared.estimates.learn(result)
    display.stage("search", prepared.search.total)
    evolve(prepared.search, pool, ledger, watch, _guesses(prepared))
    pool.close()  # its resources are the next one's
    winner = _winner(history_of(about, pairs))
    finalists = _finalists(prepared, plain, winner)
    # Each winner has a number of its own: a raised budget may bring another one.
    fixed = len(finalists) - 1
    listed = Listed(finalists, "report", [*range(fixed), fixed + winner.number])
    pool = make_pool(prepared.plan, "report", prepared.tasks)
    try:
        display.stage("report", listed.total)
        evolve(listed, pool, ledger, watch)
    finally:
        pool.close()
    outcome = history_of(about, pairs, ledger.wasted()).outcome()
    if outcome is None:
        raise RuntimeError("all finalists are scored and there is no outcome")
    return outcome


def _pace(prepared: Prepared, baselines: int) -> Pace:
    """What lies ahead of a run; at its end the exported winner is scored on the dev items once more."""
    dev, report = (len(prepared.tasks.items.of(split)) for split in SPLITS)
    finalists = len(prepared.experts) + len(("base", "average", "task_arithmetic", "winner"))
    stages = {
        "baseline": Remaining(baselines, dev),
        "search": Remaining(prepared.search.total, dev, prepared.config.budget.items),
        "report": Remaining(finalists, report, builds=True),
        "check": Remaining(1, dev, builds=True),
    }
    return Pace(stages, prepared.config.pool.num_workers)


def _guesses(prepared: Prepared) -> Guesses | None:
    """What is scored ahead by workers that would be idle."""
    search, config = prepared.search, prepared.config
    if not (config.pool.ahead and config.order == "exact" and isinstance(search, Ordered)):
        return None
    return partial(ahead, search)


def _finish(prepared: Prepared, folder: RunFolder, outcome: Outcome, display: Display, device: str) -> None:
    """Write the best model, check it by loading and scoring it anew, and write the report."""
    storage, winner = folder.storage, outcome.winner
    text = dump_recipe(winner.recipe).encode()
    whole = all(storage.exists(name) for name in ("best", "best.json", "recipe.json"))
    if not (whole and storage.read("recipe.json") == text):
        display.say(f"writing the best model to {folder.location}/best")
        materialiser = build_materialiser(prepared.plan, prepared.opened)
        heads = {n: (prepared.opened.experts[n].path, h) for n, h in prepared.opened.heads.items()}
        with storage.whole_folder("best") as best:
            export(winner.recipe, materialiser, best, texts(prepared, outcome))
            write_heads(best, heads)
            agreement = score_again(prepared, best, outcome.best_dev.items, device)
        storage.write("best.json", json.dumps(agreement).encode())
        storage.write("recipe.json", text)  # last: only a folder that was checked counts as written
    write_report(storage, outcome, json.loads(storage.read("best.json")))
    display.say(verdict(outcome))
    display.say(f"report: {folder.location}/report.md")


def texts(prepared: Prepared, outcome: Outcome) -> dict[str, str]:
    """The card of the best model and, where mergekit can make it, mergekit's configuration."""
    rebuild, files = _rebuilt(prepared, outcome.winner.recipe)
    return {"README.md": model_card(outcome, rebuild, _licences(prepared)), **files}


def texts_of(prepared: Prepared, about: About, candidate: Candidate, result: Result) -> dict[str, str]:
    """The same of any candidate."""
    rebuild, files = _rebuilt(prepared, candidate.recipe)
    return {"README.md": candidate_card(about, candidate, result, rebuild, _licences(prepared)), **files}


def _rebuilt(prepared: Prepared, recipe: Recipe) -> tuple[str, dict[str, str]]:
    """How mergekit makes a model, in words, and its configuration where it does."""
    config, digests = prepared.config, prepared.plan.digests
    locations = {digests[n]: str(expand(p)) for n, p in {"base": config.model.base, **config.experts}.items()}
    dtype = None if config.model.dtype == "auto" else config.model.dtype
    try:
        text = mergekit.dump(recipe, locations, prepared.opened.base.names(), dtype)
    except mergekit.Inexpressible as why:
        return f"mergekit cannot make this model: {why}.", {}
    return f"mergekit makes it, too: `mergekit-yaml {mergekit.FILE} OUT`.", {mergekit.FILE: text}


def _licences(prepared: Prepared) -> dict[str, str | None]:
    config, opened = prepared.config, prepared.opened
    found = {config.model.base: licence_of(opened.base.path)}
    return found | {location: licence_of(opened.experts[n].path) for n, location in config.experts.items()}


def score_again(prepared: Prepared, best: Path, recorded: Sequence[float], device: str) -> dict[str, int]:
    """Load an exported folder as any user would and score it on the first dev items: do they say what was recorded?"""
    config = prepared.config
    torch.set_num_threads(config.evaluation.threads)
    live = build_model(config, prepared.opened, device, best)
    fresh = answers(prepared.tasks.scorer(live, "dev"), len(recorded), prepared.plan.block("dev", len(recorded)))
    live.close()
    return {"items": len(recorded), "equal": sum(a == b for a, b in zip(recorded, fresh, strict=True))}


def answers(scorer: SplitScorer, count: int, block: int) -> list[float]:
    """The answers to the first items, scored so many at a time as a run does: in bfloat16 batches show in scores."""
    return [v for s in range(0, count, block) for v in scorer.score(s, min(s + block, count)).items]


def block_of(config: Config, file: str, split: Split, count: int) -> int:
    """How many of a split's items the workers of a configuration score at a time.

    Raises BadInput for a search that is none.
    """
    return Plan(config, {}, {}, _stops(*_algorithm(config, file))).block(split, count)


def _stops(algorithm: str, settings: Any) -> bool:
    """Whether a search may have its answer before the last item. Not asked: early_stopping. Switched on or off, the
    same batches give the same decisions.
    """
    return isinstance(settings, HalvingSettings) or SEARCHES[algorithm].incumbent


def _algorithm(config: Config, file: str) -> tuple[str, Any]:
    """The search and its settings, with those of the search inside of it filled in."""
    name, settings = _named(config.search, file, "search.")
    if isinstance(settings, HalvingSettings):
        _, inside = _named(settings.of, file, "search.of.")
        settings = settings.model_copy(update={"of": inside.model_dump()})
    return name, settings


def _named(section: Mapping[str, Any], file: str, prefix: str) -> tuple[str, Any]:
    name = section.get("algorithm")
    if not isinstance(name, str) or name not in SEARCHES:
        raise BadInput(f"{file}: {prefix}algorithm: unknown search {name!r}; {nearest(str(name), SEARCHES)}")
    return name, check_section(SEARCHES[name].settings, section, file, prefix)


def _can_race(config: Config, algorithm: str, estimates: Estimates) -> None:
    """Raises BadInput for a race that is asked for where none can be held."""
    if config.evaluation.racing is None:
        return
    if not SEARCHES[algorithm].incumbent:
        able = ", ".join(n for n, a in SEARCHES.items() if a.incumbent)
        raise BadInput(
            f"evaluation.racing: {algorithm} holds its candidates against no incumbent; leave racing out, or search "
            f"with {able}."
        )
    if not config.evaluation.early_stopping:
        raise BadInput("evaluation.racing: a race stops early; leave it out, or write early_stopping: true.")
    task = first_unjudged(estimates.scale)
    if task is not None:
        raise BadInput(
            f"evaluation.racing: the items of {task} are not judged one by one, from 0 to 1; leave racing out, or "
            "choose another metric."
        )


def _identity(config: Config, search: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """What makes two calls the same run: contents of models and items, not where they lie."""
    identity: dict[str, Any] = config.model_dump(mode="json", exclude=set(FREE_KEYS))
    identity["search"] = dict(search)
    identity["model"]["base"] = plan.digests["base"]
    identity["experts"] = {n: plan.digests[n] for n in config.experts}
    identity["heads"] = {n: d for n, d in plan.digests.items() if n.startswith("head of ")}
    identity["items"] = dict(plan.items)
    identity["evaluation"].pop("include_path")
    # Scores of different releases must not be mixed: a forward pass or a prompt may have changed between them.
    identity["versions"] = {p: _versions()[p] for p in JUDGES}
    return identity


def _tracked(prepared: Prepared, folder: RunFolder) -> Tracked:
    """What the loggers are told of a run."""
    facts = {"evolver": __version__, **_versions(), "configuration": folder.owner}
    return loggers.tracked(prepared.config, prepared.identity["search"], folder.storage, facts)


def _baselines(prepared: Prepared) -> list[tuple[str, Recipe]]:
    """Base, experts, simple average, and task arithmetic with equal weights at every mass of the configuration."""
    experts, base = prepared.experts, prepared.base
    out: list[tuple[str, Recipe]] = [("base", base), *((e.name, e) for e in experts)]
    out.append(("average", Merge("simple", experts, base)))
    for mass in prepared.config.baselines.masses:
        values = {"weight": (1.0 / len(experts),) * len(experts), "lambda": mass, "normalize": False}
        out.append((f"task_arithmetic@{mass:g}", Merge("task_arithmetic", experts, base, (Rule.of(values),))))
    return out


def _winner(history: History) -> Candidate:
    """The best candidate of the search on the dev set."""
    if history.best is None:
        reasons = sorted({r.reason for _, r in history.stages["search"] if r.status == "failed"})
        raise BadInput(f"search: no candidate could be scored ({reasons[0] if reasons else 'none was proposed'}).")
    return history.best[0]


def _finalists(prepared: Prepared, plain: Listed, winner: Candidate) -> list[tuple[str, Recipe]]:
    """What is scored on the report set: base, every expert, average, task arithmetic as tuned on dev, the winner."""
    recipes = dict(_baselines(prepared))
    tuned = [n for n in recipes if n.startswith("task_arithmetic@")]
    best = max(tuned, key=lambda n: -math.inf if (score := plain.results[n].score) is None else score)
    return [*((n, r) for n, r in recipes.items() if n not in tuned or n == best), ("winner", winner.recipe)]


def _versions() -> dict[str, str]:
    return {p: importlib.metadata.version(p) for p in PACKAGES}


class _Workshop:
    """The making half, as the algorithms see it; without digests, names stand for them."""

    def __init__(self, config: Config, opened: Opened, digests: dict[str, str] | None = None) -> None:
        self.digests = digests or {n: n for n in ("base", *config.experts)}
        self.base = Expert("base", self.digests["base"])
        self.experts = tuple(Expert(n, self.digests[n]) for n in config.experts)
        self._names = opened.base.names()

    def space(self, method: str, groups: int, tune: Sequence[str] | None, settings: Mapping[str, Any]) -> Genome:
        found = methods.get(method, "search.method")
        return genome(found, self.experts, self.base, self._names, groups, tune, settings, "search")

    def merger(self, settings: Mapping[str, Any]) -> Callable[[Sequence[Recipe]], Recipe]:
        given = dict(settings)
        method = methods.get(str(given.pop("method", "simple")), "search.merger.method")
        rules = fixed_rules(method, given, [e.name for e in self.experts], self._names, "search.merger")
        return lambda members: Merge(method.name, tuple(members), self.base, rules)
