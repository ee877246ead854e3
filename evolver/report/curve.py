"""The picture of a report: how the best dev score grew with the items that were scored."""

from __future__ import annotations

import io
import math

from evolver.runs.outcome import Outcome


def curve(outcome: Outcome) -> bytes:
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
