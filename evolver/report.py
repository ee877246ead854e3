"""The report of a run: a verdict in one sentence, and what it rests on. Reads results only."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evolver.config import Config
from evolver.evaluation.comparison import Comparison, compare, interval
from evolver.evaluation.scoring import Scale
from evolver.folder import write_text
from evolver.records import Candidate, Recipe, Result, dump_recipe

LEVEL = 0.05


@dataclass(frozen=True)
class Finalist:
    """A model that was scored on the report set: its dev result and its report result."""

    label: str
    recipe: Recipe
    dev: Result
    report: Result


@dataclass(frozen=True)
class Outcome:
    """All that a report says of a run. The winner is the last of the finalists."""

    config: Config
    finalists: tuple[Finalist, ...]
    winning: Candidate
    searched: tuple[tuple[Candidate, Result], ...]
    scales: Mapping[str, Scale]
    versions: Mapping[str, str]

    @property
    def winner(self) -> Finalist:
        return self.finalists[-1]

    @property
    def best_dev(self) -> Result:
        return self.winner.dev

    @property
    def best_expert(self) -> Finalist:
        """The expert with the highest report score: the hardest one to beat."""
        return _highest(f for f in self.finalists if f.label in self.config.experts)

    @property
    def best_plain(self) -> Finalist:
        """The merge without a search (simple average, tuned task arithmetic) with the highest report score."""
        return _highest(f for f in self.finalists[:-1] if f.label != "base" and f.label not in self.config.experts)


def verdict(outcome: Outcome) -> str:
    """Two plain sentences: is the winner better than the best expert, and than the best plain merge, and how surely?"""
    expert, plain = outcome.best_expert, outcome.best_plain
    if None in (outcome.winner.report.score, expert.report.score, plain.report.score):
        return "No verdict: the winner, an expert or a plain merge could not be scored on the report set."
    against = compare(outcome.winner.report.items, expert.report.items, outcome.scales["report"], outcome.config.seed)
    numbers = _in_words(against, len(outcome.scales["report"].tasks))
    if against.difference <= 0:
        first = f"No improvement: the winner does not beat the best expert, {expert.label} ({numbers})."
    elif against.p >= LEVEL:
        first = f"No clear improvement: the winner leads the best expert, {expert.label}, within noise ({numbers})."
    else:
        first = f"Improvement: the winner beats the best expert, {expert.label} ({numbers})."
    return f"{first} {_against_plain(outcome)}"


def _against_plain(outcome: Outcome) -> str:
    """Whether the search was worth it: the winner against the best merge that needs no search."""
    plain = outcome.best_plain
    against = compare(outcome.winner.report.items, plain.report.items, outcome.scales["report"], outcome.config.seed)
    says = "beats" if against.difference > 0 and against.p < LEVEL else "is not clearly better than"
    if against.difference < 0 and against.p < LEVEL:
        says = "is worse than"
    numbers = f"{100 * against.difference:+.1f} points, p = {against.p:.3g}"
    return f"It {says} the best merge without a search, {plain.label} ({numbers})."


def _in_words(c: Comparison, items: int) -> str:
    interval = f"95 % interval {100 * c.low:+.1f} to {100 * c.high:+.1f}"
    return f"{100 * c.difference:+.1f} points on {items} report items, {interval}, p = {c.p:.3g}"


def write_report(folder: Path, outcome: Outcome, agreement: Mapping[str, int]) -> None:
    """Write ``report.md`` and ``curve.png``."""
    picture = folder / "curve.png"
    temporary = picture.with_name(".curve.tmp")
    temporary.write_bytes(_curve(outcome))
    temporary.replace(picture)
    sections = [
        f"# {outcome.config.run}",
        f"**{verdict(outcome)}**",
        _table(outcome),
        _against_others(outcome),
        "![best dev score against scored items](curve.png)",
        _winner_section(outcome, agreement),
        _cost(outcome),
        _failures(outcome),
        _provenance(outcome),
    ]
    write_text(folder / "report.md", "\n\n".join(s for s in sections if s) + "\n")


def model_card(outcome: Outcome, rebuild: str) -> str:
    """The README of the exported model; ``rebuild`` says how mergekit makes it, or why it does not."""
    config = outcome.config
    parents = "\n".join(f"- {location}" for location in [config.model.base, *config.experts.values()])
    lines = ["Merged models", "", f"- base: `{config.model.base}`"]
    lines += [f"- {name}: `{location}`" for name, location in config.experts.items()]
    return f"""---
base_model:
{parents}
library_name: transformers
tags:
- merge
- evolver
---
# {config.run}

A merge of fine-tunes of one base, found by Evolver ({config.search["algorithm"]}) without training.

{verdict(outcome)}

{_table(outcome)}

{chr(10).join(lines)}

The licences of all parents apply. The exact recipe is in `recipe.json`; weights are rebuilt from it bit for bit.
{rebuild}
"""


def _highest(finalists: Iterable[Finalist]) -> Finalist:
    return max(finalists, key=lambda f: f.report.score if f.report.score is not None else -math.inf)


def _table(outcome: Outcome) -> str:
    tasks = list(outcome.scales["report"].weights)
    head = ["model", "dev", "report", "95 % interval", *tasks]
    rows = [_row(f, outcome, tasks) for f in outcome.finalists]
    sizes = f"Dev: {len(outcome.scales['dev'].tasks)} items, the only ones that the search saw. "
    sizes += f"Report: {len(outcome.scales['report'].tasks)} other items, scored once. Tasks: on the report items."
    return markdown_table(head, rows) + "\n\n" + sizes


def _row(finalist: Finalist, outcome: Outcome, tasks: Sequence[str]) -> list[str]:
    name = f"**{finalist.label}**" if finalist.label == "winner" else finalist.label
    if finalist.report.score is None:
        return [name, _number(finalist.dev.score), f"failed: {finalist.report.reason}", "", *["" for _ in tasks]]
    low, high = interval(finalist.report.items, outcome.scales["report"], outcome.config.seed)
    means = [_number(finalist.report.tasks.get(t)) for t in tasks]
    return [
        name,
        _number(finalist.dev.score),
        _number(finalist.report.score),
        f"{100 * low:.1f} – {100 * high:.1f}",
        *means,
    ]


def _against_others(outcome: Outcome) -> str:
    """Paired tests of the winner against everybody else."""
    rows = []
    for other in outcome.finalists[:-1]:
        if other.report.score is None or outcome.winner.report.score is None:
            continue
        c = compare(outcome.winner.report.items, other.report.items, outcome.scales["report"], outcome.config.seed)
        rows.append(
            [other.label, f"{100 * c.difference:+.1f}", f"{100 * c.low:+.1f} – {100 * c.high:+.1f}", f"{c.p:.3g}"]
        )
    head = ["winner against", "points", "95 % interval", "p (paired permutation)"]
    return "## Paired tests on the report set\n\n" + markdown_table(head, rows)


def _winner_section(outcome: Outcome, agreement: Mapping[str, int]) -> str:
    candidate = outcome.winning
    same = f"{agreement['equal']} of {agreement['items']}"
    return (
        "## The winner\n\n"
        f"Candidate {candidate.number} of {len(outcome.searched)}, proposed by `{candidate.proposer}`, recipe "
        f"`{candidate.recipe.id}` ({len(dump_recipe(candidate.recipe))} bytes, in `recipe.json`). The folder `best/`, "
        f"loaded anew and scored on the dev items, gives the ledger's score on {same} items."
    )


def _cost(outcome: Outcome) -> str:
    results = [r for _, r in outcome.searched]
    fresh = [r for r in results if not r.reused and r.status == "ok"]
    full = len(outcome.scales["dev"].tasks)
    rows = [
        ["candidates", str(len(results))],
        ["of these known already, at no cost", str(sum(r.reused for r in results))],
        ["of these stopped early", str(sum(not r.complete for r in fresh))],
        ["items scored", str(sum(r.cost for r in results))],
        ["items saved by stopping early", str(sum(full - len(r.items) for r in fresh))],
        ["seconds of evaluation", f"{math.fsum(r.seconds.get('total', 0.0) for r in fresh):.1f}"],
        ["seconds a candidate, median", f"{_median(r.seconds.get('total', 0.0) for r in fresh):.2f}"],
    ]
    return "## What the search cost\n\n" + markdown_table(["", ""], rows)


def _failures(outcome: Outcome) -> str:
    failed = [(c, r) for c, r in outcome.searched if r.status == "failed"]
    if not failed:
        return ""
    rows = [[str(c.number), r.reason] for c, r in failed]
    return "## Failed candidates\n\n" + markdown_table(["candidate", "reason"], rows)


def _provenance(outcome: Outcome) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in outcome.versions.items())
    return (
        "## How to reproduce\n\n"
        f"`python evolve.py config.yaml` with the configuration beside this file, seed {outcome.config.seed}. "
        f"Versions: {versions}. The same configuration gives the same candidates and the same winner, with one worker "
        "or many, interrupted or not; in bfloat16 on a CPU this holds on processors that compute alike."
    )


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else 0.0


def _curve(outcome: Outcome) -> bytes:
    """Best dev score of the search against items scored, with the plain models as lines."""
    from matplotlib.figure import Figure

    spent, best, xs, ys = 0, -math.inf, [0], [math.nan]
    points: list[tuple[int, float]] = []
    for _, result in outcome.searched:
        spent += result.cost
        if result.score is not None:
            points.append((spent, result.score))
            best = max(best, result.score)
        xs.append(spent)
        ys.append(best if best > -math.inf else math.nan)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.step(xs, ys, where="post", linewidth=2, label="best so far")
    axes.plot([x for x, _ in points], [y for _, y in points], ".", color="0.6", label="candidates scored in full")
    for number, finalist in enumerate(outcome.finalists[:-1]):
        if finalist.dev.score is not None:
            axes.axhline(finalist.dev.score, linestyle="--", linewidth=1, color=f"C{number + 1}", label=finalist.label)
    axes.set_xlabel("items scored by the search")
    axes.set_ylabel("dev score")
    axes.set_title(outcome.config.run)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
