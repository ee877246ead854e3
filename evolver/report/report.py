"""The report of a run: a verdict in one sentence, and the figures behind it. Only results are read."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from evolver.errors import BadInput, file_sentence
from evolver.evaluation.base import ItemText
from evolver.evaluation.scores.comparison import Comparison, interval
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Candidate, Result
from evolver.records.recipe import Recipe, ancestors, dump_recipe
from evolver.report.arms import arms_section
from evolver.report.claims import Claims, claims_of, claims_section, comparisons_of
from evolver.report.constraints import constraints_section
from evolver.report.curve import curve
from evolver.report.examples import examples_section, read_texts
from evolver.report.finals import finals_section
from evolver.report.front import front_section, front_summary
from evolver.report.html import html_page
from evolver.report.mixture import mixtures_of
from evolver.report.scores import score_rows, scores_section
from evolver.report.settings import setting_rows, settings_section
from evolver.report.starts import saving_of, starts_section
from evolver.report.text import (
    as_seen,
    as_served,
    budget_in_words,
    cost_rows,
    escaped,
    listed,
    markdown_table,
    median_or_zero,
    of_task,
    score_text,
    signed,
)
from evolver.report.uses import goes_on, uses_section
from evolver.report.verdict import verdict
from evolver.runs.files import SUMMARY_FILE, agreement_of
from evolver.runs.history import History, read_history, rows_of
from evolver.runs.outcome import Finalist, Outcome
from evolver.storage import Storage

# What ``evolver report`` writes beside the report: all candidates, every model × task score, the merges' settings.
CSV_FILES = ("candidates.csv", "scores.csv", "settings.csv")
# What can be wrong with answers, by the name of its count.
FLAWS = {
    "truncated": "the prompt was cut, or the answer was cut at its length limit",
    "invalid": "no answer was found in the text that the model wrote",
}


def write_report(
    folder: Storage, outcome: Outcome, agreement: Mapping[str, int], texts: Mapping[int, ItemText] | None = None
) -> None:
    """Write ``report.md``, the same as ``report.html`` with its picture, and ``summary.json`` for programs.

    Args:
        agreement: what scoring the exported winner again gave.
        texts: of the report items that are shown as examples, by their places.
    """
    folder.write("curve.png", curve(outcome))
    compared = comparisons_of(outcome)
    claims = claims_of(outcome, compared)
    folder.write(SUMMARY_FILE, json.dumps(summary(outcome, claims, compared), indent=1).encode())
    sections = [
        f"# {outcome.config.run}",
        _question(outcome),
        f"**{verdict(outcome)}**",
        "\n\n".join(f"> Warning: {w}." for w in outcome.about.warnings),
        table_of(outcome),
        finals_section(outcome),
        constraints_section(outcome),
        front_section(outcome),
        starts_section(outcome),
        arms_section(outcome),
        _against_others(compared, outcome.scales["report"]),
        claims_section(claims, outcome),
        examples_section(outcome, texts or {}),
        "![best dev score against scored items](curve.png)",
        _winner_section(outcome, agreement),
        _lineage(outcome.winner.recipe),
        settings_section(outcome),
        scores_section(outcome),
        _cost(outcome),
        _failures(outcome),
        uses_section(outcome),
        _provenance(outcome),
    ]
    text = "\n\n".join(s for s in sections if s) + "\n"
    folder.write("report.md", text.encode())
    folder.write("report.html", html_page(text, outcome.config.run, folder.read).encode())


def _question(outcome: Outcome) -> str:
    """What the run was to find out, and how."""
    config, dev = outcome.config, len(outcome.scales["dev"].tasks)
    heavy = {t.task: f", weight {t.weight:g}" if t.weight != 1 else "" for t in config.evaluation.tasks}
    tasks = listed([f"{escaped(t.task)} ({escaped(t.metric)}{heavy[t.task]})" for t in config.evaluation.tasks])
    settings = {key: value for key, value in config.search.items() if key != "algorithm"}
    said = yaml.safe_dump(settings, default_flow_style=True, sort_keys=False, width=math.inf).strip()[1:-1]
    search = f"`{config.search['algorithm']}`" + (f" ({said})" if settings else "")
    asked = (
        f"Is there a merge of {listed(list(config.experts))}, fine-tunes of `{config.model.base}`, that is better "
        f"than the best of them on {tasks}? Searched by {search} within {budget_in_words(config.budget)}, on {dev} dev "
        "items."
    )
    seen = as_seen(config.evaluation)
    return " ".join(filter(None, [asked, seen, _ended(outcome), as_served(config.evaluation), goes_on(outcome)]))


def _ended(outcome: Outcome) -> str:
    """What ended the search, where that is recorded."""
    ended = outcome.about.ended
    return f"The search ended because {ended.why}." if ended else ""


def summary(outcome: Outcome, claims: Claims, compared: Mapping[str, Comparison]) -> dict[str, Any]:
    """The outcome in numbers; ``against`` is the winner's difference to the best expert on the report items."""
    results = [r for _, r in outcome.searched]
    dev, report, expert = outcome.winner.dev, outcome.winner.report, outcome.best_expert
    against = compared.get(expert.label)
    return {
        "run": outcome.config.run,
        "budget": outcome.config.budget.model_dump(),
        "ended": outcome.about.ended.reason if outcome.about.ended else None,
        "verdict": verdict(outcome),
        "report_use": outcome.use,
        "winner": {"candidate": outcome.winning.number, "recipe": outcome.winner.recipe.id,
                   "dev": dev.score, "report": report.score},
        "recommended": outcome.recommended.label,
        **({"feasible": outcome.finals.winner.dev.feasible} if outcome.config.constraints else {}),
        "report": {f.label: f.report.score for f in outcome.finalists},
        **({"front": front_summary(outcome)} if outcome.about.objectives else {}),
        "best_expert": expert.label,
        "against": None if against is None else asdict(against),
        **claims.form(),
        "candidates": len(results),
        **({"start": saving.summary()} if (saving := saving_of(outcome.searched)) else {}),
        "items": sum(r.cost for r in results),
        "seconds": math.fsum(r.seconds.get("total", 0.0) for r in results if not r.reused),
        "failed": sum(r.status == "failed" for r in results),
    }  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A finished run, as its report is written again: from its folder alone."""

    run: Storage
    history: History
    outcome: Outcome
    agreement: Mapping[str, int]

    def write(self, target: Storage) -> str:
        """Write the report and the files of ``CSV_FILES``. Returns the verdict."""
        write_report(target, self.outcome, self.agreement, read_texts(self.run))
        tables = (rows_of(self.history), score_rows(self.outcome), setting_rows(self.outcome))
        for name, rows in zip(CSV_FILES, tables, strict=True):
            target.write(name, _csv(list(rows)).encode())
        return verdict(self.outcome)


def finished(run: Storage) -> Finished:
    """The run in a folder.

    Raises BadInput if the folder holds no run, or a run whose finalists are not scored yet.
    """
    history = read_history(run)
    outcome = history.outcome()
    agreement = agreement_of(run)
    if outcome is None or agreement is None:
        raise BadInput(f"{run.location}: the run is not finished; continue it first (evolver resume).")
    return Finished(run, history, outcome, agreement)


def write_again(run: Storage, target: Storage) -> str:
    """Write the report of a run again, and its tables as CSV. Returns the verdict.

    Raises BadInput as ``finished`` does, and where nothing can be written.
    """
    found = finished(run)
    try:
        return found.write(target)
    except OSError as error:
        raise BadInput(file_sentence(error, target.location)) from error


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list({key: None for row in rows for key in row}), restval="")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def table_of(outcome: Outcome) -> str:
    """Winner, base, experts and plain merges: scores, intervals, tasks."""
    scale = outcome.scales["report"]
    flawed = [name for name in FLAWS if any(f.report.counts.get(name) for f in outcome.finalists)]
    select = ["select"] if "select" in outcome.scales else []
    head = ["model", "dev", *select, "report", "95 % interval", *(_headline(t, scale) for t in scale.weights), *flawed]
    rows = [_row(f, outcome, flawed) for f in outcome.finalists]
    sizes = f"Dev: {len(outcome.scales['dev'].tasks)} items, the only ones that the search saw. "
    if select:
        sizes += f"Select: {len(outcome.scales['select'].tasks)} items, on which the winner was chosen. "
    sizes += f"Report: {len(scale.tasks)} other items, scored once. Tasks: on the report items."
    flaws = " ".join(f"{name.capitalize()}: {what}, in % of the report items." for name, what in FLAWS.items())
    none = "" if flawed else " No prompt or answer was truncated, no answer was invalid."
    return markdown_table(head, rows) + "\n\n" + sizes + (f" {flaws}" if flawed else none)


def _headline(task: str, scale: Scale) -> str:
    """The task's name, and its metric if lower values of it are better."""
    metric = scale.metrics[task]
    return f"{escaped(task)} ({metric.name}, lower is better)" if metric.negative else escaped(task)


def _row(finalist: Finalist, outcome: Outcome, flawed: Sequence[str]) -> list[str]:
    name, scale = f"**{finalist.label}**" if finalist.label == "winner" else finalist.label, outcome.scales["report"]
    dev = [score_text(finalist.dev.score, outcome.scales["dev"])]
    if "select" in outcome.scales:
        dev.append(score_text(finalist.select.score, outcome.scales["select"]) if finalist.select else "")
    if finalist.report.score is None:
        return [name, *dev, f"failed: {escaped(finalist.report.reason)}", "", *["" for _ in (*scale.weights, *flawed)]]
    low, high = interval(finalist.report.items, scale, outcome.config.seed)
    tasks = [of_task(finalist.report.tasks.get(t), scale.metrics[t]) for t in scale.weights]
    flaws = [f"{100 * finalist.report.counts.get(f, 0.0) / len(scale.tasks):.1f}" for f in flawed]
    between = f"{score_text(low, scale)} – {score_text(high, scale)}"
    return [name, *dev, score_text(finalist.report.score, scale), between, *tasks, *flaws]


def _against_others(compared: Mapping[str, Comparison], scale: Scale) -> str:
    """Paired tests of the winner against all other finalists."""
    rows = []
    for label, c in compared.items():
        between = f"{signed(c.low, scale)} – {signed(c.high, scale)}"
        rows.append([label, signed(c.difference, scale), between, f"{c.p:.3g}", f"{100 * c.ahead:.1f} %"])
    head = ["winner against", "points", "95 % interval", "p (paired permutation)", "winner ahead (of resamples)"]
    return "## Paired tests on the report set\n\n" + markdown_table(head, rows)


def _winner_section(outcome: Outcome, agreement: Mapping[str, int]) -> str:
    candidate, models = outcome.winning, len({r.recipe_id for _, r in outcome.searched})
    same = f"{agreement['equal']} of {agreement['items']}"
    plain = outcome.recommended.label if outcome.recommended is not outcome.winner else ""
    where, which = ("the ledger", f", {plain},") if plain else ("`recipe.json`", "")
    mixed = "".join(f" {sentence}" for sentence in mixtures_of(outcome.winner.recipe))
    return (
        f"## The winner\n\nOne of {models} models, proposed by `{candidate.proposer}` as candidate "
        f"{candidate.number}, recipe `{candidate.recipe.id}` ({len(dump_recipe(candidate.recipe))} bytes, "
        f"{where}). The model in the folder `best/`{which} was loaded again and scored on the dev items; its scores "
        f"are those in the ledger on {same} items.{mixed}"
    )


def _lineage(recipe: Recipe) -> str:
    """Everything that the winner is made of, down to the experts; what is used stands above what uses it."""
    rows = [[f"`{n.id[:8]}`", n.describe(), ", ".join(f"`{i.id[:8]}`" for i in n.inputs)] for n in ancestors(recipe)]
    return "## Its lineage\n\n" + markdown_table(["model", "made by", "of"], rows)


def _cost(outcome: Outcome) -> str:
    results = [r for _, r in outcome.searched]
    fresh = [r for r in results if not r.reused and r.status == "ok"]
    full = len(outcome.scales["dev"].tasks)
    spent = {
        k: math.fsum(r.seconds.get(k, 0.0) for r in results if not r.reused)
        for k in ("materialise", "forward", "total")
    }
    rows = [
        ["candidates", str(len(results))],
        ["of these, known from earlier candidates, at no cost", str(sum(r.reused for r in results))],
        ["items scored", str(sum(r.cost for r in results))],
        ["tokens", f"{math.fsum(r.counts.get('tokens', 0.0) for r in fresh):.0f}"],
        ["seconds of evaluation", f"{spent['total']:.1f}"],
        ["of these: materialising", f"{spent['materialise']:.1f}"],
        ["of these: scoring", f"{spent['forward']:.1f}"],
        ["of these: the rest", f"{spent['total'] - spent['materialise'] - spent['forward']:.1f}"],
        ["seconds per candidate, median", f"{median_or_zero(r.seconds.get('total', 0.0) for r in fresh):.2f}"],
        *_waste_rows("candidates scored ahead on wrong guesses, in addition to the above", outcome.wasted),
        *_waste_rows(
            "candidates after a failure that was tried again, which the search no longer asks for", outcome.lost
        ),
        *cost_rows(
            outcome.config.pool,
            spent["total"] + math.fsum(r.seconds.get("total", 0.0) for r in (*outcome.wasted, *outcome.lost)),
        ),
    ]
    parts = ["## What the search cost", markdown_table(["", ""], rows), _savings_table(outcome.searched, full, outcome)]
    return "\n\n".join(p for p in parts if p)


def _waste_rows(what: str, wasted: Sequence[Result]) -> Iterable[list[str]]:
    """What was scored beside the search and its budget."""
    if wasted:
        yield [what, str(len(wasted))]
        yield ["their items", str(sum(r.cost for r in wasted))]
        yield ["their seconds", f"{math.fsum(r.seconds.get('total', 0.0) for r in wasted):.1f}"]


def _savings_table(searched: Sequence[tuple[Candidate, Result]], full: int, outcome: Outcome) -> str:
    """How many items each way of scoring fewer items has saved, compared with scoring all items of every model."""
    last: dict[str, tuple[Candidate, Result]] = {}  # of each model the evaluation that knows most
    for candidate, result in searched:
        known = last.get(result.recipe_id)
        if result.status == "ok" and (known is None or len(result.items) > len(known[1].items)):
            last[result.recipe_id] = (candidate, result)
    partial = [(c, r) for c, r in last.values() if not r.complete and r.loss is None]
    ways = {
        "could no longer reach the score to beat": [r for c, r in partial if not r.raced and c.question.limit is None],
        f"lost a race, at an error rate of {outcome.config.evaluation.racing}": [r for _, r in partial if r.raced],
        "did not go on to the next rung": [r for c, r in partial if not r.raced and c.question.limit is not None],
    }
    rows = [[way, str(len(rs)), str(sum(full - len(r.items) for r in rs))] for way, rs in ways.items() if rs]
    return markdown_table(["not scored in full", "models", "items saved"], rows) if rows else ""


def _failures(outcome: Outcome) -> str:
    failed = [(c, r) for c, r in outcome.searched if r.status == "failed"]
    if not failed:
        return ""
    rows = [[str(c.number), escaped(r.reason)] for c, r in failed]
    again = "The same command with `--retry-failed` tries them again and continues the search from the first of them."
    return "\n\n".join(["## Failed candidates", markdown_table(["candidate", "reason"], rows), again])


def _provenance(outcome: Outcome) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in outcome.about.versions.items())
    same = (
        "The same configuration gives the same candidates and the same winner, with one worker or many, interrupted "
        "or not; this holds on processors of the same kind, since others round the sums of forward passes "
        "differently."
    )
    if outcome.config.order == "arrival":
        same = (
            "The search learnt results in the order in which they arrived (`order: arrival`). The same command repeats "
            "this run from the ledger in this folder; in another folder, other timing leads to other candidates."
        )
    compute = outcome.config.model.compute
    passes = f"Forward passes ran in {compute}. " if compute != "auto" else ""
    return (
        "## How to reproduce\n\n"
        f"Run `evolver run config.yaml` with the configuration file beside this report; its seed is "
        f"{outcome.config.seed}. {passes}Versions: {versions}. {same}"
    )
