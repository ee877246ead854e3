"""The history of a run, read from its folder: all that was proposed and scored. Models and data are not needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from evolver import ledger
from evolver.config import Config
from evolver.records import STAGES, Candidate, Result, Stage, split_of
from evolver.records.graph import NodeTable
from evolver.records.leaders import leaders
from evolver.runs.about import About, read_about
from evolver.runs.finals import Finals, finals
from evolver.runs.origin import Origin, Use, read_origin, uses_of
from evolver.runs.outcome import Finalist, Outcome
from evolver.storage import Storage

Pairs = tuple[tuple[Candidate, Result], ...]


@dataclass(frozen=True)
class History:
    """The candidates and results of a run up to now.

    Attributes:
        stages: candidates with their results, by stage, in the order of their numbers.
        guessed: results of candidates that were scored ahead of being asked for.
        orphaned: results after a failure that was taken back later.
        uses: which runs have used report items of this run's family, the earliest first.
        origin: the run that this one goes on from, if it does.
    """

    about: About
    stages: Mapping[Stage, Pairs]
    guessed: tuple[Result, ...] = ()
    orphaned: tuple[Result, ...] = ()
    uses: tuple[Use, ...] = ()
    origin: Origin | None = None

    @property
    def config(self) -> Config:
        return self.about.config

    @property
    def best(self) -> tuple[Candidate, Result] | None:
        """The candidate of the search with the highest score of all items, the earliest of equals; None before there
        is one. Candidates that were asked for a part of the items only do not count.
        """
        return next(iter(leaders(self.stages["search"], 1)), None)

    @property
    def finals(self) -> Finals | None:
        """Who is in the finals; None before a candidate and all baselines are scored."""
        return finals(self.stages, self.config, self.about.scales, self.about.objectives)

    @property
    def recommended(self) -> tuple[Candidate, Result] | None:
        """The model that the run recommends, with its dev result; before its finals, the best candidate so far."""
        found = self.finals
        if found is None or not found.held:
            return self.best
        return found.recommended.candidate, found.recommended.dev

    @property
    def wasted(self) -> tuple[Result, ...]:
        """Results of guesses that were wrong: the search has not asked for them, up to now."""
        asked = {(r.number, r.recipe_id) for _, r in self.stages["search"]}
        return tuple(r for r in self.guessed if (r.number, r.recipe_id) not in asked and r.stage == "search")

    @property
    def lost(self) -> tuple[Result, ...]:
        """Orphaned results of models that the run has not asked for again, up to now."""
        asked = {(split_of(r.stage), r.recipe_id) for pairs in self.stages.values() for _, r in pairs}
        return tuple(r for r in self.orphaned if (split_of(r.stage), r.recipe_id) not in asked)

    def outcome(self) -> Outcome | None:
        """The outcome for the report; None before the finalists are scored."""
        held, dev = self.finals, {c.label: r for c, r in self.stages["baseline"]}
        if held is None or not held.held:
            return None
        first, select = held.winner, {c.label: c.select for c in held.everybody}
        report = {c.label: (c, r) for c, r in self.stages["report"] if c.label in dev}
        winner = [r for _, r in self.stages["report"] if r.recipe_id == first.recipe.id]
        wanted = [*self.config.experts, "base", "average"]
        if not winner or any(label not in report for label in wanted):
            return None
        rows = [Finalist(label, c.recipe, dev[label], r, select.get(label)) for label, (c, r) in report.items()]
        last = Finalist("winner", first.recipe, first.dev, winner[-1], first.select)
        found = {r.recipe_id: r for _, r in self.stages["report"]}
        front = [
            Finalist(c.label, c.recipe, c.dev, found[c.recipe.id], c.select)
            for c in held.front if c.recipe.id in found  # versions before there were fronts reported the winner alone
        ]  # fmt: skip
        uses = tuple(use for use in self.uses if use.draw == self.config.evaluation.report_draw)
        return Outcome(
            self.about, (*rows, last), held, self.stages["search"], self.wasted, self.lost, tuple(front), uses,
            self.origin,
        )  # fmt: skip


def history_of(
    about: About, pairs: Iterable[tuple[Candidate, Result]], guessed: Iterable[Result] = (),
    orphaned: Iterable[Result] = (),
) -> History:  # fmt: skip
    """The history that consists of these results. Of two results with the same number, the later one counts."""
    stages: dict[Stage, dict[int, tuple[Candidate, Result]]] = {stage: {} for stage in STAGES}
    for candidate, result in pairs:
        stages[candidate.stage][candidate.number] = candidate, result
    ordered = {stage: tuple(found[n] for n in sorted(found)) for stage, found in stages.items()}
    return History(about, ordered, tuple(guessed), tuple(orphaned))


def read_history(folder: Storage) -> History:
    """Read a run's folder; the run may be going on meanwhile.

    Raises BadInput if the folder is not that of a run, or if something in it cannot be read.
    """
    about, place = read_about(folder), folder.folder("ledger")
    pairs: list[tuple[Candidate, Result]] = []
    guessed: list[Result] = []
    orphaned: list[Result] = []
    parts = ledger.standing(ledger.read_all_parts(place))
    nodes = ledger.nodes_of(parts.values())
    for name, part in parts.items():
        for row in part.to_pylist(maps_as_pydicts="strict"):
            if row["event"] == "guessed":
                guessed.append(ledger.result_of(row))
            elif row["event"] == "orphaned":
                orphaned.append(ledger.result_of(row))
            elif row["event"] == "finished":
                with contextlib.suppress(ledger.LostRecipe):  # the driver writes it again when it comes to it
                    pairs.append((_candidate(row, nodes, f"{place.location}/{name}"), ledger.result_of(row)))
    return replace(
        history_of(about, pairs, guessed, orphaned), uses=tuple(uses_of(folder)), origin=read_origin(folder)
    )  # fmt: skip


def _candidate(row: Mapping[str, Any], nodes: NodeTable, file: str) -> Candidate:
    try:
        return ledger.candidate_of(row, nodes)
    except ledger.LostRecipe:
        raise
    except ValueError as error:
        reason = f"the recipe of candidate {row['number']} of stage {row['stage']} cannot be read"
        raise ledger.damaged(file, reason) from error


def rows_of(history: History) -> list[dict[str, Any]]:
    """A row for each candidate: what was proposed, what it scored, what it took."""
    return [
        {
            "stage": c.stage, "number": c.number, "label": c.label, "proposer": c.proposer, "recipe_id": c.recipe.id,
            "parents": " ".join(c.parents), "status": r.status, "score": r.score, "bound": r.bound,
            "items": len(r.items), "cost": r.cost, "seconds": r.seconds.get("total"), "worker": r.worker,
            "reused": r.reused, "raced": r.raced, "reason": r.reason,
            **({"violation": r.violation} if history.config.constraints else {}),
            **{f"task {t}": v for t, v in r.tasks.items()},
        }
        for pairs in history.stages.values() for c, r in pairs
    ]  # fmt: skip
