"""A run read back from its folder: all that was proposed and scored. Needs neither its models nor its data."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from evolver import ledger
from evolver.config import Config, Loader, check_section
from evolver.errors import BadInput
from evolver.evaluation.scoring import Scale
from evolver.folder import file_of_run
from evolver.outcome import Finalist, Outcome
from evolver.records import Candidate, Result, Split, Stage
from evolver.storage import Storage

ABOUT = "about.json"
Pairs = tuple[tuple[Candidate, Result], ...]


@dataclass(frozen=True)
class History:
    """What a run has come to by now.

    Attributes:
        config: as it was called last.
        scales: how items make up scores, of both splits.
        stages: candidates with their results, by stage, in the order of their numbers.
        flying: candidates that were sent out and have no result yet.
        guessed: results of candidates that were scored ahead of being asked for.
        last: when the last result was written, in seconds since 1970 by its driver's clock; 0.0 before there is one.
    """

    config: Config
    scales: Mapping[Split, Scale]
    versions: Mapping[str, str]
    warnings: tuple[str, ...]
    stages: Mapping[Stage, Pairs]
    flying: tuple[Candidate, ...] = ()
    guessed: tuple[Result, ...] = ()
    last: float = 0.0

    @property
    def best(self) -> tuple[Candidate, Result] | None:
        """The candidate of the search with the highest dev score, the earliest of equals; None before there is one."""
        return best_of(self.stages["search"])

    def outcome(self) -> Outcome | None:
        """What the report says; None before the finalists are scored."""
        best, dev = self.best, {c.label: r for c, r in self.stages["baseline"]}
        report = {c.label: (c, r) for c, r in self.stages["report"] if c.label != "winner"}
        winner = [(c, r) for c, r in self.stages["report"] if best and r.recipe_id == best[0].recipe.id]
        wanted = [*self.config.experts, "base", "average"]
        if best is None or not winner or any(label not in report for label in wanted):
            return None
        rows = [Finalist(label, c.recipe, dev[label], r) for label, (c, r) in report.items()]
        last = Finalist("winner", best[0].recipe, best[1], winner[-1][1])
        asked = {(r.number, r.recipe_id) for _, r in self.stages["search"]}
        wasted = tuple(r for r in self.guessed if (r.number, r.recipe_id) not in asked and r.stage == "search")
        searched = self.stages["search"]
        return Outcome(
            self.config, (*rows, last), best[0], searched, self.scales, self.versions, self.warnings, wasted
        )  # fmt: skip


def best_of(pairs: Pairs) -> tuple[Candidate, Result] | None:
    """The candidate with the highest score of all items that was asked for them all, the earliest of equals."""
    complete = [(c, r) for c, r in pairs if c.limit is None and r.complete and r.score is not None]
    return max(complete, key=lambda pair: (pair[1].score or -math.inf, -pair[0].number), default=None)


def write_about(
    folder: Storage, scales: Mapping[Split, Scale], versions: Mapping[str, str], warnings: Sequence[str]
) -> None:  # fmt: skip
    """Write what a folder has to hold so that it can be read back without models and data."""
    about = {"versions": dict(versions), "warnings": list(warnings), "scales": {s: v.form() for s, v in scales.items()}}
    folder.write(ABOUT, json.dumps(about).encode())


Row = tuple[str, float, Candidate, Result | None]  # event, time, candidate, result
Kept = dict[str, list[Row]]


def read_history(folder: Storage, kept: Kept | None = None) -> History:
    """Read a run's folder, also while the run goes.

    Args:
        kept: what earlier calls have read of the ledger, by part; it is brought up to date. None: all is read.

    Raises BadInput where the folder is none of a run.
    """
    raw = yaml.load(file_of_run(folder, "config.yaml"), Loader=Loader)
    text = file_of_run(folder, ABOUT)
    try:
        about = json.loads(text)
        scales: dict[Split, Scale] = {s: Scale.from_form(form) for s, form in about["scales"].items()}
    except (ValueError, KeyError) as error:
        raise BadInput(f"{folder.location}/{ABOUT}: cannot be read ({error!r}); call the run again.") from error
    config = check_section(Config, raw, f"{folder.location}/config.yaml")
    kept = {} if kept is None else kept
    parts = ledger.read_parts(folder.folder("ledger"), kept)
    fresh = {name: kept[name] if table is None else _rows(table) for name, table in parts.items()}
    kept.clear()
    kept.update(fresh)
    stages: dict[Stage, dict[int, tuple[Candidate, Result]]] = {"baseline": {}, "search": {}, "report": {}}
    flying: dict[tuple[str, int], Candidate] = {}
    guessed: list[Result] = []
    last = 0.0
    for event, when, candidate, result in itertools.chain.from_iterable(fresh.values()):
        if result is None:
            flying[candidate.stage, candidate.number] = candidate
        elif event == "guessed":
            guessed.append(result)
        else:
            flying.pop((candidate.stage, candidate.number), None)
            stages[candidate.stage][candidate.number] = candidate, result
            last = max(last, when)
    ordered = {stage: tuple(found[n] for n in sorted(found)) for stage, found in stages.items()}
    return History(
        config, scales, about["versions"], tuple(about["warnings"]), ordered, tuple(flying.values()), tuple(guessed),
        last,
    )  # fmt: skip


def _rows(table: Any) -> list[Row]:
    return [
        (row["event"], row["time"].timestamp(), ledger.candidate_of(row),
         None if row["event"] == "asked" else ledger.result_of(row))
        for row in table.to_pylist(maps_as_pydicts="strict")
    ]  # fmt: skip


def runs_in(root: Storage) -> list[str]:
    """Names of the runs in a folder of all runs."""
    return [name for name in root.names() if root.folder(name).exists(ABOUT)]


def rows_of(history: History) -> list[dict[str, Any]]:
    """A row for each candidate: what was proposed, what it scored, what it took."""
    return [
        {
            "stage": c.stage, "number": c.number, "label": c.label, "proposer": c.proposer, "recipe_id": c.recipe.id,
            "parents": " ".join(c.parents), "status": r.status, "score": r.score, "bound": r.bound,
            "items": len(r.items), "cost": r.cost, "seconds": r.seconds.get("total"), "worker": r.worker,
            "reused": r.reused, "raced": r.raced, "reason": r.reason, **{f"task {t}": v for t, v in r.tasks.items()},
        }
        for pairs in history.stages.values() for c, r in pairs
    ]  # fmt: skip
