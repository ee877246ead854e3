"""A run from beginning to end: this module puts the parts together. A run that was stopped continues from there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace

from evolver.config import Config
from evolver.config.reading import ConfigText
from evolver.driver.again import record_report_use, search_of
from evolver.driver.card import companion_files
from evolver.driver.check import score_again
from evolver.driver.foresight import foresight
from evolver.driver.prepare import (
    Prepared,
    as_it_is,
    in_compute,
    materials_of,
    overlap_of,
    prepare,
    run_folder,
    versions,
)
from evolver.driver.searching import SearchStage
from evolver.driver.starts import plain_merges
from evolver.errors import BadInput, file_sentence
from evolver.evaluation.scores.feasibility import guards
from evolver.ledger import Ledger, write_items
from evolver.loggers import Tracked, Trackers, build_loggers, tracked
from evolver.loggers.pace import Pace, Remaining
from evolver.loggers.terminal import Display
from evolver.loop import Judging, evolve
from evolver.merging.export import beside_of, export, write_heads
from evolver.pool import Pool
from evolver.records import SPLITS, Candidate, Result
from evolver.records.recipe import Recipe, dump_recipe
from evolver.report.claims import overlap_warnings
from evolver.report.examples import compared_items, read_texts, write_texts
from evolver.report.report import write_report
from evolver.report.verdict import verdict
from evolver.runs.about import About, Job, write_about
from evolver.runs.clock import Clock
from evolver.runs.files import AGREEMENT_FILE, RECIPE_FILE, agreement_of
from evolver.runs.finals import Finals
from evolver.runs.folder import RunFolder, compute_of
from evolver.runs.history import History, read_history
from evolver.runs.outcome import Outcome
from evolver.search.plain import Listed
from evolver.storage import Storage
from evolver.version import __version__
from evolver.workers.compute import ComputeChoice, is_open
from evolver.workers.opened import check_memory
from evolver.workers.pools import PoolMaker
from evolver.workers.worker import choose_compute

Chooser = Callable[[Config], ComputeChoice]


def run(
    given: ConfigText, results: Storage, make_pool: PoolMaker, display: Display, device: str, name: str | None = None,
    job: Job | None = None, choose: Chooser = choose_compute, retry_failed: bool = False,
) -> Storage:  # fmt: skip
    """Run a configuration, or the rest of it, and return the run's folder.

    Args:
        given: the configuration.
        results: folder of all runs.
        make_pool: makes the pool of a split.
        display: where to tell how it goes.
        device: on which the exported winner is checked.
        name: of the run, instead of the configuration's.
        job: the Ray job that this is, if it is one.
        choose: chooses the dtype of forward passes where workers are; a run is asked once for it.
        retry_failed: whether candidates that failed in an earlier call are tried again.

    Raises BadInput for anything that the user has to correct.
    """
    prepared = prepare(given, name, device=device, run=results.folder(name or given.parsed().run))
    prepared = _in_chosen_compute(prepared, results.folder(prepared.config.run), device, choose, display)
    folder = run_folder(prepared, results.folder(prepared.config.run))
    listeners = build_loggers(prepared.config, given.origin, folder.storage)
    # A pool that the cluster can never offer is refused here, before anything is written.
    try:
        pool = make_pool(prepared.plan, "dev", prepared.tasks)
    except BadInput as error:
        raise BadInput(f"{given.origin}: {error}") from error
    try:
        if folder.takes_over:
            display.say(
                f"{folder.location}: an earlier run of this name had another configuration and scored nothing, so "
                "this run replaces it"
            )
        folder.create(given.contained().text)
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
            for line in foresight(prepared):
                display.say(line)
            if retry_failed:
                display.say(_retried(ledger.retry_failed()))
            if listeners:
                trackers.begin(_tracked(prepared, folder))
            outcome = _stages(prepared, folder, ledger, pool, make_pool, display, trackers)
            _finish(prepared, folder, outcome, display, device)
            trackers.finish(folder.storage)
    except OSError as error:
        raise BadInput(f"{file_sentence(error, folder.location)} All scores are kept.") from error
    finally:
        pool.close()
    return folder.storage


def _retried(failures: int) -> str:
    """What the user is told of the candidates that are tried again."""
    if not failures:
        return "no candidate has failed in an earlier call, so none is tried again"
    return f"{failures} failed before: the search continues from the first of them, and they are tried again"


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
    overlap = overlap_of(prepared)
    warnings = (*prepared.warnings, *prepared.tasks.warnings, *overlap_warnings(overlap))
    job = job and replace(job, location=folder.location)
    return About(
        prepared.config, prepared.tasks.scales, versions(), warnings, job, folder.owner, overlap,
        objectives=prepared.objectives,
    )  # fmt: skip


def _stages(
    prepared: Prepared, folder: RunFolder, ledger: Ledger, pool: Pool, make_pool: PoolMaker, display: Display,
    trackers: Trackers,
) -> Outcome:  # fmt: skip
    """Baselines and search on the dev items, the finals on the select items, and the winner on the report items."""
    prepared = replace(prepared, search=search_of(prepared, folder, ledger))
    plain = Listed(_baselines(prepared), "baseline")
    clock = Clock(folder.storage)
    pace = _pace(prepared, plain.total, clock)

    def watch(candidate: Candidate, result: Result) -> None:
        pace.result(result)
        display.result(candidate, result, pace.left())
        trackers.result(candidate, result)

    display.stage("baselines", plain.total)
    evolve(plain, pool, ledger, watch)
    judge = _judge(prepared, plain)
    for result in plain.results.values():
        prepared.estimates.learn(judge(result))
    display.stage("search", prepared.search.total)
    SearchStage(prepared, folder.storage, ledger, pool, display, judge).search(watch, clock)
    pool.close()  # its resources are the next one's

    def hold(listed: Listed) -> None:
        with contextlib.closing(make_pool(prepared.plan, listed.split, prepared.tasks)) as pool:
            display.stage(listed.stage, listed.total)
            evolve(listed, pool, ledger, watch)

    finals = _finals(read_history(folder.storage))
    if prepared.tasks.items.select:
        hold(_select(finals))
        finals = _finals(read_history(folder.storage))
    record_report_use(prepared, folder)
    hold(_report(prepared, finals))
    outcome = read_history(folder.storage).outcome()
    if outcome is None:
        raise RuntimeError("all finalists are scored, but there is no outcome")
    return outcome


def _judge(prepared: Prepared, baselines: Listed) -> Judging:
    """What tells by how much a candidate breaks the run's constraints.

    Raises BadInput where a model that they compare with could not be scored.
    """
    config = prepared.config
    scale, experts = prepared.tasks.scale("dev"), list(config.experts)
    return guards(config.constraints, scale, baselines.results, experts, config.seed).judged


def _pace(prepared: Prepared, baselines: int, clock: Clock) -> Pace:
    """What lies ahead of a run; at its end the exported winner is scored on the dev items once more."""
    dev, select, report = (len(prepared.tasks.items.of(split)) for split in SPLITS)
    fixed = len(prepared.experts) + len(("average", "task_arithmetic"))
    budget = prepared.config.budget
    stages = {
        "baseline": Remaining(baselines, dev),
        "search": Remaining(prepared.search.total, dev, budget.items, time_left=lambda: clock.left(budget.minutes)),
        "select": Remaining(fixed + prepared.config.finalists.count if select else 0, select, builds=True),
        "report": Remaining(fixed + len(("base", "winner")), report, builds=True),
        "check": Remaining(1, dev, builds=True),
    }
    return Pace(stages, prepared.config.pool.num_workers)


def _finish(prepared: Prepared, folder: RunFolder, outcome: Outcome, display: Display, device: str) -> None:
    """Write the best model, check it by loading and scoring it again, and write the report."""
    storage, best = folder.storage, outcome.recommended
    text = dump_recipe(best.recipe).encode()
    agreement = _checked_before(storage, text, display)
    if agreement is None:
        display.say(f"writing the best model to {folder.location}/best")
        materialiser, companions = materials_of(prepared, best.recipe)
        beside = beside_of(prepared.opened.base)
        for sentence in beside.warnings:
            display.say(f"warning: {sentence}")
        with storage.whole_folder("best") as place:
            texts = companion_files(prepared, outcome)
            export(best.recipe, materialiser, place, texts, companions=companions)
            beside.copy_to(place)
            write_heads(place, prepared.opened.placed_heads)
            agreement = score_again(prepared, place, best.dev.items, device, order=best.dev.order)
        storage.write(AGREEMENT_FILE, json.dumps(agreement).encode())
        storage.write(RECIPE_FILE, text)  # last: only a folder that was checked counts as written
    found = compared_items(outcome)
    write_texts(storage, prepared.tasks.show("report", found.shown if found else []))
    write_report(storage, outcome, agreement, read_texts(storage))
    display.say(verdict(outcome))
    display.say(f"report: {folder.location}/report.md")


def _checked_before(storage: Storage, text: bytes, display: Display) -> dict[str, int] | None:
    """What the check of this very winner said, if its folder was written and checked before."""
    try:
        agreement = agreement_of(storage)
    except BadInput as error:
        display.say(f"warning: {error} The model is checked again now.")
        return None
    whole = agreement is not None and storage.exists("best") and storage.exists(RECIPE_FILE)
    return agreement if whole and storage.read(RECIPE_FILE) == text else None


def _tracked(prepared: Prepared, folder: RunFolder) -> Tracked:
    """What the loggers are told of a run."""
    facts = {"evolver": __version__, **versions(), "configuration": folder.owner}
    return tracked(prepared.config, prepared.identity["search"], folder.storage, facts)


def _baselines(prepared: Prepared) -> list[tuple[str, Recipe]]:
    """Base, experts, simple average, and task arithmetic with equal weights at every mass of the configuration."""
    experts, base = prepared.experts, prepared.base
    shown = [as_it_is(prepared, model) for model in (base, *experts)]
    return [*((model.name, model) for model in shown), *plain_merges(prepared.config, experts, base)]


def _finals(history: History) -> Finals:
    """Who is in the finals.

    Raises BadInput where no candidate of the search has a score.
    """
    found = history.finals
    if found is None:
        reasons = sorted({r.reason for _, r in history.stages["search"] if r.status == "failed"})
        raise BadInput(f"search: no candidate could be scored ({reasons[0] if reasons else 'none was proposed'}).")
    return found


def _select(finals: Finals) -> Listed:
    """Everybody in the finals, to be scored on the select items."""
    fixed = (*finals.experts, *finals.plain)
    # Each candidate gets its own number, because a larger budget may lead to other finalists.
    numbers = [*range(len(fixed)), *(len(fixed) + c.candidate.number for c in finals.searched)]
    return Listed([(c.label, c.recipe) for c in finals.everybody], "select", numbers)


def _report(prepared: Prepared, finals: Finals) -> Listed:
    """What is scored on the report items: base, every expert, the plain merges, the winner of the search and, where
    there are several objectives, the front.
    """
    base = [("base", as_it_is(prepared, prepared.base))]
    fixed = [*base, *((c.label, c.recipe) for c in (*finals.experts, *finals.plain))]
    searched = [("winner", finals.winner), *((c.label, c) for c in finals.front if c != finals.winner)]
    numbers = [*range(len(fixed)), *(len(fixed) + c.candidate.number for _, c in searched)]
    return Listed([*fixed, *((label, c.recipe) for label, c in searched)], "report", numbers)
