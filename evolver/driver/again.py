"""A finished search, used again: a new run that takes over what an earlier one has scored, and goes on from it.

``evolver retarget`` and ``evolver fork`` make such runs. The new run has a folder of its own. Its ledger begins with
the candidates of the earlier search and with everything that models scored in the earlier run, as measured by the new
configuration. So nothing that was scored is scored again, and the earlier run's folder is not needed afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from evolver.config import Config
from evolver.config.changes import FREE_EVALUATION_KEYS, FREE_TASK_KEYS, SCORE_SECTIONS, differences
from evolver.config.reading import ConfigText
from evolver.driver.prepare import Prepared, defaults_of, in_compute, prepare, run_folder
from evolver.errors import BadInput
from evolver.evaluation.tasks import Tasks
from evolver.ledger import (
    ItemName,
    Ledger,
    LostRecipe,
    candidate_of,
    item_places,
    nodes_of,
    read_all_parts,
    result_of,
    standing,
)
from evolver.records import SPLITS, Candidate, Question, Result, Split, split_of
from evolver.records.canonical import content_hash
from evolver.records.order import OWN
from evolver.runs.about import About
from evolver.runs.files import IDENTITY_FILE, holds_a_run, mapping_of
from evolver.runs.folder import RunFolder, compute_of, made_before
from evolver.runs.history import History, read_history
from evolver.runs.origin import (
    Origin,
    Use,
    copy_uses,
    draw_of,
    read_origin,
    record_own_report,
    record_use,
    report_items_used,
    taken_over,
    uses_of,
    write_origin,
)
from evolver.search import Search
from evolver.search.continued import continued
from evolver.storage import Storage, storage_at
from evolver.storage.paths import last_part

KnownResult = tuple[Candidate, Result]


@dataclass(frozen=True)
class Wish:
    """How a run is to go on from an earlier one.

    Attributes:
        kind: the command: retarget or fork.
        candidates: how many candidates the search may propose beside those of the earlier run; None: as many as the
            budget of the configuration says.
        fresh_report: draw report items that no run of the family has used.
        score_new_tasks: score all candidates on tasks that the earlier run did not have.
    """

    kind: str
    candidates: int | None = None
    fresh_report: bool = False
    score_new_tasks: bool = False


def go_on(
    earlier: Storage, given: ConfigText, results: Storage, name: str | None, wish: Wish, device: str | None
) -> ConfigText:
    """Make the folder of a run that goes on from an earlier one, unless it is there, and return its configuration.

    The run itself is then carried out as any other, and continued as any other.

    Args:
        earlier: the folder of the earlier run.
        given: the configuration of the new run.
        results: the folder of all runs, in which the new run gets its own.
        name: of the new run, instead of the configuration's.
        device: on which models are scored.

    Raises BadInput, before anything is written, where the two runs do not score the same models on the same items.
    """
    name = name or given.parsed().run
    folder, history = results.folder(name), read_history(earlier)
    owner = content_hash(mapping_of(earlier, IDENTITY_FILE, "restore the file from a copy"))
    _refuse_folder(earlier, owner, folder, given, wish)
    text = _told(earlier, history, given, wish, folder)
    prepared = prepare(text, name, device=device)
    if chosen := compute_of(earlier):
        prepared = in_compute(prepared, chosen)
    try:
        Same(earlier, history.about, prepared).check(wish)
        listed, known = _inherited(earlier, history, prepared)
    except BadInput as error:
        raise BadInput(f"{given.origin}: {error}") from error
    if (before := taken_over(folder)) is not None:
        listed = listed[: before["candidates"]]  # the earlier run may have been extended since this one began
    prepared = replace(
        prepared, identity={**prepared.identity, "origin": {"run": owner, "candidates": len(listed)}}
    )  # fmt: skip
    text = _with_budget(text, wish, len(listed))
    _write(earlier, run_folder(prepared, folder), text, listed, known, wish)
    return text


def _refuse_folder(earlier: Storage, owner: str, folder: Storage, given: ConfigText, wish: Wish) -> None:
    """Raises BadInput where the new run's folder is that of another run."""
    if folder.location.rstrip("/") == earlier.location.rstrip("/"):
        raise BadInput(
            f"{given.origin}: run: {folder.location} is the run that evolver {wish.kind} goes on from; write another "
            "name, or give one with --run."
        )
    if holds_a_run(folder) and (taken_over(folder) or {}).get("run") != owner:
        raise BadInput(
            f"{given.origin}: run: {folder.location} holds another run, which does not go on from "
            f"{earlier.location}; write another name, or give one with --run."
        )


def _told(earlier: Storage, history: History, given: ConfigText, wish: Wish, folder: Storage) -> ConfigText:
    """The configuration with what follows from the earlier run."""
    config, mapping = given.parsed(), given.mapping(Config.model_fields)
    if "report_draw" not in config.evaluation.model_fields_set or wish.fresh_report:
        draw = _fresh_draw(earlier, history, folder) if wish.fresh_report else history.config.evaluation.report_draw
        mapping["evaluation"] = {**mapping["evaluation"], **({"report_draw": draw} if draw else {})}
    # Runs that are older than the key have kept the base's template.
    if config.model.chat_template == "auto" and made_before(earlier, "model", "chat_template"):
        mapping["model"] = {**mapping["model"], "chat_template": "base"}
    return replace(given, text=yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True))


def _with_budget(text: ConfigText, wish: Wish, taken: int) -> ConfigText:
    """The configuration with the budget of the whole search, in which the candidates that are taken over count."""
    mapping, budget = text.mapping(Config.model_fields), text.parsed().budget
    if wish.candidates is None and wish.kind == "retarget":
        mapping["budget"] = {"candidates": taken}
    elif (more := wish.candidates or budget.candidates) is not None:
        mapping["budget"] = {**budget.limits, "candidates": taken + more}
    return replace(text, text=yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True))


def _fresh_draw(earlier: Storage, history: History, folder: Storage) -> int:
    """The first set of report items that no run of the family has drawn; that of the run itself if it is there."""
    if holds_a_run(folder):
        return draw_of(mapping_of(folder, IDENTITY_FILE, "choose another run name"))
    draws = [history.config.evaluation.report_draw, *(use.draw for use in uses_of(_root(earlier)))]
    return 1 + max(draws)


def _root(earlier: Storage) -> Storage:
    """The first run of the family of a run, or the run itself where that one is not there any more."""
    origin = read_origin(earlier)
    root = earlier if origin is None else storage_at(origin.root)
    return root if holds_a_run(root) else earlier


@dataclass(frozen=True)
class Same:
    """Whether what an earlier run has scored counts in a new one.

    Args:
        earlier: the folder of the earlier run.
        about: what that run was.
        prepared: the new run.
    """

    earlier: Storage
    about: About
    prepared: Prepared

    def check(self, wish: Wish) -> None:
        """Raises BadInput that names the key in which the runs differ."""
        for key, was, now in self._changed():
            what = "other weights" if key.startswith(("experts.", "model.base", "heads.")) else f"{was!r} → {now!r}"
            remedy = "install that version" if key.startswith("versions.") else "set the key to its old value"
            raise BadInput(
                f"{key}: the scores of {self.earlier.location} do not count with another value ({what}); {remedy}, or "
                "start a search of its own with `evolver run`."
            )
        new = [] if wish.score_new_tasks else self._new_tasks()
        if new:
            place = [e.task for e in self.prepared.config.evaluation.tasks].index(new[0])
            raise BadInput(
                f"evaluation.tasks[{place}].task: {new[0]} was never scored in {self.earlier.location}; leave the task "
                "out, or add --score-new-tasks, which scores all candidates again on all items of this configuration."
            )
        self._check_items()
        self._check_examples()
        self._check_measured()

    def _changed(self) -> Iterator[tuple[str, Any, Any]]:
        """The keys on which answers depend and which differ, with both values."""
        old = mapping_of(self.earlier, IDENTITY_FILE, "restore the file from a copy")
        default, now = defaults_of(self.prepared), self.prepared.identity
        for key, a, b in differences(_chosen(old, SCORE_SECTIONS), _chosen(now, SCORE_SECTIONS)):
            if not (a is None and b == default(key)):
                yield key, a, b
        ours, theirs = (c.evaluation.model_dump(mode="json") for c in (self.prepared.config, self.about.config))
        free = {"tasks", "include_path", *FREE_EVALUATION_KEYS}
        yield from differences(_without(theirs, free), _without(ours, free), "evaluation.")
        before = {entry["task"]: entry for entry in theirs["tasks"]}
        free = set(FREE_TASK_KEYS) | (set() if "select" in self.about.scales else {"select", "select_data"})
        for place, entry in enumerate(ours["tasks"]):
            found = before.get(entry["task"], entry)
            yield from differences(_without(found, free), _without(entry, free), f"evaluation.tasks[{place}].")

    def _new_tasks(self) -> list[str]:
        known = {entry.task for entry in self.about.config.evaluation.tasks}
        return [e.task for e in self.prepared.config.evaluation.tasks if e.task not in known]

    def _check_items(self) -> None:
        """Raises BadInput where a task of both runs has items that the earlier run did not have."""
        known, new = item_places(self.earlier), self._new_tasks()
        for split in SPLITS:
            old_draw, draw = (c.evaluation.report_draw for c in (self.about.config, self.prepared.config))
            if split not in self.about.scales or (split == "report" and draw != old_draw):
                continue
            for item in self.prepared.tasks.items.of(split):
                entry = self.prepared.tasks.owner(split, item)
                if (item.task, item.hash) not in known[split] and entry.task not in new:
                    place = self.prepared.config.evaluation.tasks.index(entry)
                    raise BadInput(
                        f"evaluation.tasks[{place}].{split}: {entry.task} has other {split} items than in "
                        f"{self.earlier.location}, since its data or the other tasks have changed; restore the data, "
                        "or start a search of its own with `evolver run`."
                    )

    def _check_measured(self) -> None:
        """Raises BadInput for a constraint that only a worker can measure, and that the earlier run did not have."""
        before = self.about.config.constraints
        for number, constraint in enumerate(self.prepared.config.constraints):
            if constraint.task is None and [constraint] != before[number : number + 1]:
                raise BadInput(
                    f"constraints[{number}]: the models of {self.earlier.location} were not measured for it while they "
                    "were scored; leave the constraint out, or start a search of its own with `evolver run`."
                )

    def _check_examples(self) -> None:
        """Raises BadInput where the examples in prompts would be drawn from other documents than before."""
        before = {content for places in item_places(self.earlier).values() for _, content in places}
        now = {item.hash for split in SPLITS for item in self.prepared.tasks.items.of(split)}
        if (before ^ now) & self.prepared.tasks.example_pool:
            drawn = self.prepared.config.evaluation.report_draw != self.about.config.evaluation.report_draw
            remedy = "leave --fresh-report out" if drawn else "write select: 0 for every task"
            raise BadInput(
                "evaluation.tasks: the few-shot examples in prompts come from the documents that are not scored, so "
                f"other sets of items would change all prompts and scores; {remedy}, or start a search of its own with "
                "`evolver run`."
            )


def _chosen(mapping: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: mapping[key] for key in keys if key in mapping}


def _without(mapping: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _inherited(earlier: Storage, history: History, prepared: Prepared) -> tuple[list[Candidate], list[KnownResult]]:
    """The candidates that the new search begins with, and the results that are known.

    Raises BadInput where nothing was scored.
    """
    kept = {str(n) for n, constraint in enumerate(prepared.config.constraints) if constraint.task is None}
    measured = measured_anew(item_places(earlier), prepared.tasks, kept)
    known: dict[tuple[str, Split], KnownResult] = {}
    for candidate, result in _scored(earlier):
        key = result.recipe_id, split_of(result.stage)
        again = measured(result)
        if again is not None and (key not in known or len(again.items) > len(known[key][1].items)):
            known[key] = candidate, again
    listed = [c for pair in history.stages["search"] if (c := _asked_again(pair, known)) is not None]
    if not listed:
        raise BadInput(
            f"run: no candidate of {earlier.location} has a result that could be used; continue that run first "
            "(evolver resume)."
        )
    return listed, list(known.values())


def _asked_again(pair: KnownResult, known: Mapping[tuple[str, Split], KnownResult]) -> Candidate | None:
    """A candidate of the earlier search with a question to which the known result is the answer; one that was scored
    on all items is asked for all. None for a candidate of which nothing is known.
    """
    candidate, result = pair
    plain = replace(candidate, question=Question())
    _, again = known.get((candidate.recipe.id, "dev"), (None, None))
    if (result.status == "failed" and again is None) or result.transient:
        return None
    if result.complete or (again is not None and (again.complete or again.status == "failed")):
        return plain
    return None if again is None else plain.asking(limit=len(again.items))


def _scored(earlier: Storage) -> Iterator[KnownResult]:
    """Everything that models scored in a run, whether its search asked for it or not."""
    parts = standing(read_all_parts(earlier.folder("ledger"))).values()
    nodes = nodes_of(parts)
    for part in parts:
        for row in part.to_pylist(maps_as_pydicts="strict"):
            has_result = row["event"] in ("finished", "guessed", "orphaned", "inherited")
            if has_result and not row["reused"] and not row["transient"]:
                with contextlib.suppress(LostRecipe):
                    yield candidate_of(row, nodes), result_of(row)


def measured_anew(
    before: Mapping[Split, Mapping[ItemName, int]], tasks: Tasks, kept: Collection[str] = ()
) -> Callable[[Result], Result | None]:
    """What gives the result that answers of an earlier run have in a new one: of the same answers, other scores.

    Args:
        kept: the numbers of the constraints whose violations still count; the others are found out anew.
        before: the place of every item in the answers of the earlier run.
        tasks: those of the new run. Items that the earlier run did not have end the answers.
    """
    scales = tasks.scales
    places = {split: [before[split].get((i.task, i.hash)) for i in tasks.items.of(split)] for split in scales}

    def again(result: Result) -> Result | None:
        split = split_of(result.stage)
        if result.status == "failed":
            return replace(result, raced=False)
        if split not in scales or (result.order != OWN and not result.complete):
            return None
        chosen = []
        for place in places[split]:
            if place is None or place >= len(result.items):
                break
            chosen.append(place)
        if not chosen:
            return None
        scale, items = scales[split], tuple(result.items[p] for p in chosen)
        whole = len(items) == len(scale.tasks)
        said = tuple(result.said[p] for p in chosen) if len(result.said) == len(result.items) else ()
        found = result.probability_of(len(before[split]))
        probabilities = tuple(found[p] for p in chosen) if set(chosen) <= found.keys() else ()
        score = scale.score(items) if whole else None
        bound = score if whole else scale.bound(items)
        return replace(
            result, score=score, bound=bound, complete=whole, items=items, tasks=scale.of_tasks(items), said=said,
            probabilities=probabilities, order=OWN, raced=False, given=0, reused=False,
            violations={n: v for n, v in result.violations.items() if n in kept},
        )  # fmt: skip

    return again


def _write(
    earlier: Storage,
    folder: RunFolder,
    text: ConfigText,
    listed: Sequence[Candidate],
    known: Sequence[KnownResult],
    wish: Wish,
) -> None:
    """Write the folder of the new run. After a crash the same is written again, as far as it is missing."""
    root = _root(earlier)
    folder.create(text.text)
    write_origin(folder.storage, Origin(wish.kind, earlier.location, root.location, len(listed)))
    draw = draw_of(folder.identity)
    with contextlib.suppress(OSError):  # a folder that may not be written keeps no record; the copy then counts alone
        record_own_report(root)
        if wish.fresh_report:
            record_use(root, _use(folder, draw))
    copy_uses(root, folder.storage)
    with contextlib.closing(Ledger(folder.storage.folder("ledger"), folder.owner)) as ledger:
        ledger.inherit(listed, known)


def search_of(prepared: Prepared, folder: RunFolder, ledger: Ledger) -> Search:
    """The search of a run. Where the run goes on from an earlier one, it begins with the candidates of that one.

    Raises BadInput where the ledger lacks some of them.
    """
    if not prepared.taken_over:
        return prepared.search
    if len(ledger.listed) != prepared.taken_over:
        raise BadInput(
            f"{folder.location}: {len(ledger.listed)} of {prepared.taken_over} candidates are there that it takes over "
            "from an earlier run; call the command again that began this run."
        )
    return continued(ledger.listed, prepared.search if prepared.searches_on else None)


def record_report_use(prepared: Prepared, folder: RunFolder) -> None:
    """Record that a run is about to be scored on its report items, where it belongs to a family of runs."""
    use = _use(folder, prepared.config.evaluation.report_draw)
    report_items_used(folder.storage, use, read_origin(folder.storage))


def _use(folder: RunFolder, draw: int) -> Use:
    return Use(last_part(folder.location), folder.owner, draw)
