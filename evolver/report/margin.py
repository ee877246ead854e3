"""Sentences on which differences sets of items can show. They are said before a run and in its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evolver.evaluation.scores.power import DISCORDANCES, Margin, assumed_margin, measured_margin
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Result, Split
from evolver.report.text import listed, points

TEST = (
    "A set of items can show a difference between two models if a paired test (two-sided, at 5 %) finds it with a "
    "probability of 80 %."
)
# The sets on which something is decided.
DECIDING: tuple[Split, ...] = ("select", "report")


def margin_lines(
    experts: Sequence[Result], scales: Mapping[Split, Scale], worthwhile: float, seed: int
) -> list[str]:  # fmt: skip
    """Which differences between two models each set of items can show, and how many items ``worthwhile`` takes.

    Args:
        experts: the dev results of the experts, as far as there are some. Without at least two, what a set can show is
            said for models that score differently on 10, 20 and 30 % of the items.
        scales: how the items of each set make up scores.
        worthwhile: the difference that matters, in points.
        seed: of resampling.
    """
    answers = [r.items for r in experts if r.score is not None]
    found = {split: scales[split] for split in DECIDING if split in scales}
    tasks = [] if len(answers) > 1 else list(dict.fromkeys(t for scale in found.values() for t in scale.unjudged))
    if tasks:
        why = f"the metric of {listed(tasks)} is no mean of scores from 0 to 1"
        return [f"Which differences the items can show is not known before the experts are scored, since {why}."]
    lines, premise = [TEST], ""
    for split, scale in found.items():
        if len(answers) > 1:
            margin = measured_margin(answers, scales["dev"], scale, seed)
            premise = _premise(margin)
            said = f"{points(margin.smallest, scale)} points between models that differ as often"
            said = f"can show a difference of {said}{_needed([margin], scale, worthwhile)}"
        else:
            said = _assumed([assumed_margin(scale, d) for d in DISCORDANCES], scale, worthwhile)
        lines.append(f"The {len(scale.tasks)} {split} items {said}{_documents(scale)}")
    return [" ".join(filter(None, [lines[0], premise])), *lines[1:]]


def _premise(margin: Margin) -> str:
    return (
        f"On {100 * margin.discordance:.1f} % of the dev items, two experts score differently (median of all pairs). A "
        "merge often differs less from an expert, and then smaller differences can be shown, too."
    )


def _assumed(margins: Sequence[Margin], scale: Scale, worthwhile: float) -> str:
    shown = [m for m in margins if m.possible]
    if shown:
        smallest = listed([points(m.smallest, scale) for m in shown], "or")
        shares = listed([f"{100 * m.discordance:g}" for m in shown], "or")
        said = f"can show a difference of {smallest} points between models that score differently on {shares} % of them"
    else:
        said = f"can show no difference between models that score differently on {100 * DISCORDANCES[-1]:g} % of them"
    return f"{said}{_needed(margins, scale, worthwhile)}"


def _needed(margins: Sequence[Margin], scale: Scale, worthwhile: float) -> str:
    difference = worthwhile / 100 if scale.shares else worthwhile
    counts = listed([f"{m.needed(difference):,}" for m in margins], "or")
    at = "" if len(margins) == 1 else f" (on {listed([f'{100 * m.discordance:g}' for m in margins], 'or')} %)"
    unit = "point" if worthwhile == 1 else "points"
    return f"; for {worthwhile:g} {unit} (`worthwhile`) it would take {counts} items{at}."


def _documents(scale: Scale) -> str:
    if not scale.clusters:
        return ""
    return f" They come from {max(scale.clusters) + 1} documents; items of the same document count as related."
