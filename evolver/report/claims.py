"""The section of a report on what the run may claim: which differences its items show, and how much of it is luck."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evolver.evaluation.overlap import Overlap
from evolver.evaluation.scores.comparison import RESAMPLES, Comparison, compare
from evolver.evaluation.scores.correction import corrected_best, obstacle, rounds_of
from evolver.evaluation.scores.discrimination import undecided
from evolver.evaluation.scores.resampling import SIGNIFICANCE
from evolver.records import Candidate, Result
from evolver.records.leaders import leaders
from evolver.report.margin import margin_lines
from evolver.report.text import escaped, listed, score_text
from evolver.runs.outcome import Finalist, Outcome


@dataclass(frozen=True)
class Claims:
    """What the statistics of a run say.

    Attributes:
        best: the candidate with the highest dev score, and its result.
        complete: how many models have a dev score of all items.
        corrected: the highest dev score after the bootstrap correction; None where it is left out.
        why_not: why it is left out, as a part of a sentence.
        ahead: the share of resamples of the report items in which the winner is ahead of the best expert, of the
            average, and of the best plain merge, by their labels.
        undecided: the tasks whose dev items do not tell the experts apart, with p-values.
    """

    best: tuple[Candidate, Result]
    complete: int
    corrected: float | None
    why_not: str
    ahead: Mapping[str, float]
    undecided: Mapping[str, float]

    def form(self) -> dict[str, Any]:
        """The figures, for programs."""
        return {
            "best_dev": self.best[1].score, "corrected_dev": self.corrected, "ahead": dict(self.ahead),
            "undecided_tasks": dict(self.undecided),
        }  # fmt: skip


def comparisons_of(outcome: Outcome) -> dict[str, Comparison]:
    """The paired comparisons of the winner with all other finalists on the report items, by label, as far as both have
    scores.
    """
    winner, scale, seed = outcome.winner.report, outcome.scales["report"], outcome.config.seed
    return {
        other.label: compare(winner.items, other.report.items, scale, seed)
        for other in outcome.finalists[:-1]
        if None not in (winner.score, other.report.score)
    }


def claims_of(outcome: Outcome, compared: Mapping[str, Comparison]) -> Claims:
    """The statistics of a run. They are seeded from its seed.

    Args:
        compared: the winner's comparisons with the other finalists.
    """
    dev, seed = outcome.scales["dev"], outcome.config.seed
    complete = leaders(outcome.searched)
    why_not = "only one candidate has a score of all dev items" if len(complete) < 2 else obstacle(dev)
    # In the order of the search, so that the earliest of equals is chosen, as the run does.
    in_turn = sorted(complete, key=lambda pair: pair[0].number)
    corrected = None if why_not else corrected_best([r.items for _, r in in_turn], dev, seed)
    experts = [r.items for r in _experts(outcome) if r.score is not None]
    return Claims(
        complete[0], len(complete), corrected, why_not,
        {f.label: compared[f.label].ahead for f in _rivals(outcome).values() if f.label in compared},
        undecided(experts, dev, seed) if len(experts) > 1 else {},
    )  # fmt: skip


def claims_section(found: Claims, outcome: Outcome) -> str:
    """The section as Markdown."""
    parts = [_margins(outcome), _luck(found, outcome), _order(found, outcome), _tasks(found, outcome)]
    return "\n\n".join(["## What these scores can show", *filter(None, [*parts, _training(outcome)])])


def _experts(outcome: Outcome) -> list[Result]:
    return [f.dev for f in outcome.finalists if f.label in outcome.config.experts]


def _rivals(outcome: Outcome) -> dict[str, Finalist]:
    """Whom the winner is compared with, by what each one is."""
    average = next(f for f in outcome.finalists if f.label == "average")
    return {"the best expert": outcome.best_expert, "the average": average, "the best plain merge": outcome.best_plain}


def _margins(outcome: Outcome) -> str:
    """What each set on which something is decided can show."""
    config = outcome.config
    first, *others = margin_lines(_experts(outcome), outcome.scales, config.worthwhile, config.seed)
    said = (
        f"**The smallest difference.** {first} The figures follow from the numbers of items and from how often models "
        "differ, not from the differences that were observed."
    )
    return "\n\n".join(filter(None, [said, "\n".join(f"- {line}" for line in others)]))


def _luck(found: Claims, outcome: Outcome) -> str:
    candidate, result = found.best
    scale, is_winner = outcome.scales["dev"], candidate.recipe.id == outcome.winner.recipe.id
    whose, also = "the winner's", ""
    if not is_winner:
        whose = f"that of candidate {candidate.number}"
        own = score_text(outcome.winner.dev.score, scale)
        also = f" The winner, which was chosen on the select items, too, has {own}."
    raw = score_text(result.score, scale)
    first = f"**The luck in the best dev score.** The highest dev score, {whose}, is {raw}.{also}"
    if found.corrected is None:
        return f"{first} It is not corrected for the choice among candidates: {escaped(found.why_not)}."
    return (
        f"{first} The highest of {found.complete} scores is partly luck. After a bootstrap correction of this choice, "
        f"{raw} becomes **{score_text(found.corrected, scale)}**: dev items were drawn with "
        f"replacement {rounds_of(scale):,} times, the candidate that is best on the drawn items was chosen, and its "
        "scores on the items that were not drawn were averaged. The correction is a partial one. It takes the "
        "candidates as given, but the search proposed most of them after it had seen scores on the same items, and "
        "this part of the luck remains. Only items that the search did not see, such as the report items, are free of "
        "it."
    )


def _order(found: Claims, outcome: Outcome) -> str:
    named: dict[str, list[str]] = {}
    for what, rival in _rivals(outcome).items():
        if rival.label in found.ahead:
            named.setdefault(rival.label, []).append(what)
    if not named:
        return ""
    first, *others = [
        f"of {escaped(label)} ({listed(whats)}) in {100 * found.ahead[label]:.1f} %" for label, whats in named.items()
    ]
    ahead = listed([f"{first} of these resamples", *others])
    return (
        f"**How sure the order is.** The report items were drawn again {RESAMPLES:,} times, with replacement within "
        f"each task, and the same ones for both models. The winner is ahead {ahead}."
    )


def _tasks(found: Claims, outcome: Outcome) -> str:
    if sum(r.score is not None for r in _experts(outcome)) < 2:
        return ""
    level = f"permutation test within items at {100 * SIGNIFICANCE:g} %"
    if not found.undecided:
        return f"**What the tasks tell apart.** The dev items of every task tell the experts apart ({level})."
    named = listed([f"{escaped(task)} (p = {p:.2g})" for task, p in found.undecided.items()])
    items, them = ("Its items", "it") if len(found.undecided) == 1 else ("Their items", "them")
    return (
        f"**Tasks that cannot tell the experts apart.** On the dev items of {named} the experts differ by no more than "
        f"chance ({level}). {items} say little about which model is better, so differences on {them} are mostly noise. "
        "More items, a harder or an easier task may help."
    )


def _training(outcome: Outcome) -> str:
    """What is known of the overlap of the items with the experts' training texts."""
    known = outcome.about.overlap
    unknown = [escaped(name) for name in outcome.config.experts if name not in known]
    said = [f"{warning[0].upper()}{warning[1:]}." for warning in map(escaped, overlap_warnings(known))]
    if clean := untrained_sentence(known):
        said.append(clean)
    if unknown:
        said.append(
            f"Of {listed(unknown)} it is not known, as no `training.json` in the folder lists the training texts."
        )
    return f"**Items among the experts' training texts.** {' '.join(said)}" if said else ""


def overlap_warnings(found: Mapping[str, Overlap]) -> list[str]:
    """A sentence for each expert that was trained on items."""
    return [
        f"expert {name} was trained on the texts of {listed(_counts(overlap))}, so its scores on them, and those of "
        "merges with it, may be too high"
        for name, overlap in found.items()
        if any(overlap.shared.values())
    ]


def _counts(overlap: Overlap) -> list[str]:
    return [f"{n} of {overlap.items[split]} {split} items" for split, n in overlap.shared.items() if n]


def untrained_sentence(found: Mapping[str, Overlap]) -> str:
    """A sentence on the experts that were trained on none of the run's items; empty if there are none."""
    names = [name for name, overlap in found.items() if not any(overlap.shared.values())]
    return f"None of the run's items is among the training texts of {listed(names)}." if names else ""
