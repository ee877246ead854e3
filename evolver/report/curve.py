"""The picture of a report: how the best dev score grew with the items that were scored."""

from __future__ import annotations

import io
import math
from typing import Any

from evolver.runs.outcome import Outcome

# Colours of Okabe and Ito (2008), which colour-blind people tell apart; the dashboard gives models the same ones.
# Dashes tell apart the experts that share a colour, and the merges without a search, which are all grey.
BEST, BASE, PLAIN_MERGE = "#d55e00", "#000000", "0.55"
EXPERTS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = (":", "--", "-.", (0, (8, 2)))


def looks(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Colour and dashes of the line of every finalist but the winner, by its label."""
    labels = [f.label for f in outcome.finalists[:-1]]
    experts = [label for label in labels if label in outcome.config.experts]
    others = [label for label in labels if label not in experts and label != "base"]
    found: dict[str, dict[str, Any]] = {"base": {"color": BASE, "linestyle": "-"}}
    for place, label in enumerate(experts):
        dashes = DASHES[place // len(EXPERTS) % len(DASHES)]
        found[label] = {"color": EXPERTS[place % len(EXPERTS)], "linestyle": dashes}
    return found | {n: {"color": PLAIN_MERGE, "linestyle": DASHES[k % len(DASHES)]} for k, n in enumerate(others)}


def curve(outcome: Outcome) -> bytes:
    """Best dev score of the search against items scored, with the plain models as lines."""
    from matplotlib.figure import Figure

    spent, best, xs, ys = 0, -math.inf, [0], [math.nan]
    points: list[tuple[int, float]] = []
    for _, result in outcome.searched:
        spent += result.cost
        if result.score is not None:
            points.append((spent, result.score))
            best = max(best, result.score) if result.feasible else best
        xs.append(spent)
        ys.append(best if best > -math.inf else math.nan)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.step(xs, ys, where="post", linewidth=2.5, color=BEST, label="best so far")
    axes.plot([x for x, _ in points], [y for _, y in points], ".", color="0.75", label="candidates scored in full")
    look = looks(outcome)
    for finalist in outcome.finalists[:-1]:
        if finalist.dev.score is not None:
            axes.axhline(finalist.dev.score, linewidth=1.2, label=finalist.label, **look[finalist.label])
    axes.set_xlabel("items scored by the search")
    axes.set_ylabel("dev score")
    axes.set_title(outcome.config.run)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
