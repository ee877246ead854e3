"""The experts of a merge before it is made: tables of what their task vectors have in common, warnings, a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import combinations

from evolver.merging.alignment.orders import DIFFERENT_BELOW
from evolver.merging.likeness import Likeness
from evolver.report.compare import LINE_COLOURS, LINE_DASHES
from evolver.report.text import listed, markdown_table

# Task vectors whose norms differ by such a factor: in a plain sum, only the largest is seen.
UNEQUAL = 4.0
# Cosines from which on two experts are nearly one model, and below which they undo each other.
TWINS, OPPOSITE = 0.95, -0.05
# The norm of a task vector, in norms of the base, from which on it is no usual fine-tune.
LARGE = 0.3
NO_LAYER = "outside"


def experts_text(names: Sequence[str], model: Likeness, layers: Mapping[int | None, Likeness]) -> str:
    """The tables and the warnings, in Markdown."""
    by_layer = [_row(NO_LAYER if layer is None else str(layer), found) for layer, found in layers.items()]
    head = ["layer", *(f"‖τ‖ {n}" for n in names), "cosine", "conflict", "effective rank", "overlap", "by chance"]
    cosines = [[n, *(f"{c:.3f}" for c in row)] for n, row in zip(names, model.cosines, strict=True)]
    sizes = [
        [n, f"{norm:.4g}", f"{100 * share:.3g} %", "–" if model.ranks is None else f"{model.ranks[i]:.1f}"]
        for i, (n, norm, share) in enumerate(zip(names, model.norms, model.relative, strict=True))
    ]
    parts = [
        "## Size of the task vectors",
        markdown_table(["expert", "‖τ‖", "of the base's norm", "effective rank"], sizes),
        "## Cosines between task vectors",
        markdown_table(["", *names], cosines),
        "## By layer",
        markdown_table(head, [*by_layer, _row("all", model)]),
        LEGEND,
        *warnings(names, model),
    ]
    return "\n\n".join(parts)


def ancestry_text(rows: Mapping[str, float]) -> str:
    """A table of the mean cosines of MLP rows with the base's, and what is to be done about low ones."""
    low = [name for name, cosine in rows.items() if cosine < DIFFERENT_BELOW]
    said = (
        f"**Look at this.** {listed(low)}: their hidden units are not at the places of the base's, as of models with "
        "another ancestry; model.align: auto brings them into the base's order."
        if low
        else "Their hidden units are at the places of the base's, so there is nothing to align."
    )
    table = markdown_table(["expert", "mean cosine of MLP rows"], [[n, f"{c:.3f}"] for n, c in rows.items()])
    return f"## Ancestry\n\n{table}\n\n{said}"


def warnings(names: Sequence[str], model: Likeness) -> list[str]:
    """What may spoil a merge, a sentence each; nothing of it keeps the models from being merged."""
    out = []
    moved = [(n, norm) for n, norm in zip(names, model.norms, strict=True) if norm > 0]
    if len(moved) > 1:
        (least, small), (most, large) = min(moved, key=lambda p: p[1]), max(moved, key=lambda p: p[1])
        if large > UNEQUAL * small:
            out.append(
                f"The task vector of {most} is {large / small:.1f} times as long as that of {least}, so it drowns the "
                "other in a plain sum; let the search tune weights, or begin it with start: [nan], which makes all "
                "experts count equally."
            )
    for (i, a), (j, b) in combinations(enumerate(names), 2):
        if (cosine := model.cosines[i][j]) > TWINS:
            out.append(f"{a} and {b} are nearly the same model (cosine {cosine:.3f}), so what they know counts twice.")
        elif cosine < OPPOSITE:
            out.append(
                f"{a} and {b} pull against each other (cosine {cosine:.3f}), so a sum loses what both have learned; "
                "methods that elect signs, such as ties, may keep more."
            )
    far = [n for n, share in zip(names, model.relative, strict=True) if share > LARGE]
    if far:
        out.append(
            f"{listed(far)} lie{'s' if len(far) == 1 else ''} far from the base (more than {LARGE:g} of its norm): "
            "look whether the base is the right one."
        )
    return [f"**Look at this.** {said}" for said in out]


def experts_picture(names: Sequence[str], model: Likeness, layers: Mapping[int | None, Likeness]) -> bytes:
    """The cosines as a map, and norms, sign conflict, effective rank and overlap by layer, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 3).flat
    places = [str(layer) if layer is not None else NO_LAYER for layer in layers]
    found = list(layers.values())
    by_expert = {
        "‖τ‖ ÷ ‖θ₀‖": [[part.relative[i] for part in found] for i in range(len(names))],
        "effective rank": [
            [part.ranks[i] if part.ranks else float("nan") for part in found] for i in range(len(names))
        ],
    }
    shared = {
        "scalars with conflicting signs": [[part.conflict for part in found], [by_chance(len(names))] * len(found)],
        "overlap of the strongest directions": [
            [float("nan") if part.overlap is None else part.overlap for part in found], [p.chance for p in found],
        ],
    }  # fmt: skip
    plot = next(axes)
    image = plot.imshow(model.cosines, vmin=-1, vmax=1, cmap="RdBu_r")
    plot.set_xticks(range(len(names)), names, rotation=45, ha="right")
    plot.set_yticks(range(len(names)), names)
    plot.set_title("cosines between task vectors")
    figure.colorbar(image, ax=plot)
    for title, lines in {**by_expert, **shared}.items():
        plot = next(axes)
        labels = names if title in by_expert else ["measured", "by chance"]
        for number, (line, label) in enumerate(zip(lines, labels, strict=True)):
            dashes = LINE_DASHES[number // len(LINE_COLOURS) % len(LINE_DASHES)]
            plot.plot(places, line, dashes, color=LINE_COLOURS[number % len(LINE_COLOURS)], label=label)
        plot.set_title(title)
        plot.set_xlabel("layer")
        plot.set_ylim(bottom=0)
        plot.legend(fontsize="small")
    next(axes).set_axis_off()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def by_chance(experts: int) -> float:
    """The share of scalars in which some of so many random signs differ."""
    return 1.0 - 2.0 ** (1 - experts)


def _row(label: str, found: Likeness) -> list[str]:
    count = len(found.norms)
    pairs = [found.cosines[i][j] for i, j in combinations(range(count), 2)]
    return [
        label, *(f"{norm:.3g}" for norm in found.norms), f"{sum(pairs) / len(pairs):.3f}" if pairs else "–",
        f"{100 * found.conflict:.0f} %", "–" if found.ranks is None else f"{sum(found.ranks) / count:.1f}",
        "–" if found.overlap is None else f"{found.overlap:.3f}",
        "–" if found.overlap is None else f"{found.chance:.3f}",
    ]  # fmt: skip


LEGEND = f"""\
τ is an expert minus the base. *cosine* is the mean over all pairs. *conflict* is the share of the scalars that at least
two experts change in which two of them disagree in sign; of experts whose signs are random it is 1 - 2 / 2ⁿ, which is
50 % for two and 88 % for four. *effective rank* is the number of equally strong directions
of a matrix, (Σ σ²)² / Σ σ⁴, as a mean over matrices and experts. *overlap* says how far the strongest input directions
of two experts lie in each other's span, from 0 to 1; *by chance* is what random directions would have. {NO_LAYER} means
the tensors that belong to no layer, such as embeddings."""
