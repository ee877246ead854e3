"""Sentences on which differences a set of items can show. They are said before a run and in its report."""

from __future__ import annotations

from collections.abc import Sequence

from evolver.evaluation.scores.power import DISCORDANCES, Margin, assumed_margin, measured_margin, unforeseeable
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Result, Split
from evolver.report.text import listed, points

TEST = "paired test, two-sided 5 %, power 80 %"


def margin_sentence(
    experts: Sequence[Result], dev: Scale, scale: Scale, split: Split, worthwhile: float, seed: int
) -> str:
    """Which differences between two models a set of items can show, and how many items ``worthwhile`` takes.

    Args:
        experts: the dev results of the experts, as far as there are some. Without at least two, what the set can show
            is said for models that answer 10, 20 and 30 % of the items differently.
        dev, scale: how dev items and the items of the set make up scores.
        split: name of the set.
        worthwhile: the difference that matters, in points.
        seed: of resampling.
    """
    answers = [r.items for r in experts if r.score is not None]
    if len(answers) > 1:
        return _measured(measured_margin(answers, dev, scale, seed), scale, split, worthwhile)
    tasks = unforeseeable(scale)
    if tasks:
        return (
            f"Which difference the {len(scale.tasks)} {split} items can show is not known before the experts are "
            f"scored, since the metric of {listed(tasks)} is no mean of scores from 0 to 1."
        )
    return _assumed([assumed_margin(scale, d) for d in DISCORDANCES], scale, split, worthwhile)


def _measured(margin: Margin, scale: Scale, split: Split, worthwhile: float) -> str:
    return (
        f"Two experts answer {100 * margin.discordance:.1f} % of the dev items differently (median of all pairs). If "
        f"two models differ as often, the {margin.items} {split} items can show a difference of "
        f"{points(margin.smallest, scale)} points ({TEST}). {_needed([margin], scale, worthwhile)}{_documents(scale)}"
    )


def _assumed(margins: Sequence[Margin], scale: Scale, split: Split, worthwhile: float) -> str:
    shown, items = [m for m in margins if m.possible], f"{len(scale.tasks)} {split} items"
    if shown:
        smallest = listed([points(m.smallest, scale) for m in shown], "or")
        shares = listed([f"{100 * m.discordance:g}" for m in shown], "or")
        said = f"The {items} can show a difference of {smallest} points if two models answer {shares} % of the items"
    else:
        said = (
            f"The {items} can show no difference at all if two models answer {100 * DISCORDANCES[-1]:g} % of the items"
        )
    return f"{said} differently ({TEST}). {_needed(margins, scale, worthwhile)}{_documents(scale)}"


def _needed(margins: Sequence[Margin], scale: Scale, worthwhile: float) -> str:
    difference = worthwhile / 100 if scale.shares else worthwhile
    counts = listed([f"{m.needed(difference):,}" for m in margins], "or")
    at = "" if len(margins) == 1 else f" (at {listed([f'{100 * m.discordance:g}' for m in margins], 'or')} %)"
    unit = "point" if worthwhile == 1 else "points"
    return f"A difference of {worthwhile:g} {unit}, which is what `worthwhile` says, would take {counts} items{at}."


def _documents(scale: Scale) -> str:
    if not scale.clusters:
        return ""
    return f" The items come from {max(scale.clusters) + 1} documents; items of the same document count as related."
