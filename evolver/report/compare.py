"""Several runs side by side: what they found for how many items, their winners on shared items, and what differs."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evolver.errors import BadInput, file_sentence
from evolver.evaluation.scores.comparison import Comparison, compare, interval
from evolver.evaluation.scores.scoring import Scale
from evolver.ledger import ItemName, item_places
from evolver.records import ItemAnswer
from evolver.report.curve import BEST, DASHES, EXPERTS
from evolver.report.html import html_page
from evolver.report.text import escaped, markdown_table, of_task, score_text, signed
from evolver.runs.history import History, read_history
from evolver.runs.outcome import Outcome
from evolver.storage import Storage
from evolver.storage.paths import last_part

STEPS = 8  # rows of the table of best scores
PICTURE = "comparison.png"
# One for every run; dashes tell apart those that share a colour.
LINE_COLOURS, LINE_DASHES = (BEST, *EXPERTS), ("-", *DASHES)
Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Winner:
    """The winner of a run on the items that all finished runs share.

    Attributes:
        run: the run.
        what: what its search calls the winner.
        recipe: id of the winner's recipe.
        score: on the shared items; ``low`` and ``high`` are the ends of its 95 % interval.
        tasks: the metric of each task.
    """

    run: str
    what: str
    recipe: str
    score: float
    low: float
    high: float
    tasks: Mapping[str, float]


@dataclass(frozen=True)
class Compared:
    """Several runs, compared.

    Attributes:
        runs: their names; where two have the same name, their locations.
        curves: for every run the numbers of scored items at which the best dev score rose, with this score.
        alike: whether the dev scores of all runs mean the same: the same items, weights and metrics.
        scale: how the shared report items make up a score: by the weights of the first run.
        winners: of the runs that are finished.
        tests: every pair of winners, with a paired comparison of the first with the second.
        keys: the keys of the configurations that differ, each with the value in every run.
    """

    runs: tuple[str, ...]
    curves: Mapping[str, Curve]
    alike: bool
    scale: Scale
    winners: tuple[Winner, ...]
    tests: tuple[tuple[str, str, Comparison], ...]
    keys: tuple[tuple[str, tuple[str, ...]], ...]

    def form(self) -> dict[str, Any]:
        """For JSON."""
        adjusted = _holm([c.p for _, _, c in self.tests])
        return {
            "runs": self.runs,
            "curves": {n: {"spent": [x for x, _ in c], "best": [y for _, y in c]} for n, c in self.curves.items()},
            "alike": self.alike,
            "items": len(self.scale.tasks),
            "tasks": list(self.scale.weights),
            "winners": [
                [w.run, w.what, w.recipe, score_text(w.score, self.scale), _between(w.low, w.high, self.scale, False),
                 *(of_task(w.tasks.get(t), self.scale.metrics[t]) for t in self.scale.weights)]
                for w in self.winners
            ],
            "tests": [
                [a, b, signed(c.difference, self.scale), _between(c.low, c.high, self.scale), f"{c.p:.3g}", f"{p:.3g}"]
                for (a, b, c), p in zip(self.tests, adjusted, strict=True)
            ],
            "said": winners_said(self),
            "keys": self.keys,
        }  # fmt: skip


def compare_runs(folders: Sequence[Storage]) -> Compared:
    """Compare runs by their folders alone; models and data are not needed.

    Raises BadInput for fewer than two runs, for a folder that holds none, and for runs without shared report items.
    """
    if len({f.location for f in folders}) < 2:
        raise BadInput("evolver compare: a comparison is of at least two different runs; name their folders.")
    names = _names(folders)
    histories = {name: read_history(folder) for name, folder in zip(names, folders, strict=True)}
    scale, places = _shared(folders, names, histories)
    first = histories[names[0]].about
    outcomes = {name: o for name, history in histories.items() if (o := history.outcome()) is not None}
    answers = {name: found for name, o in outcomes.items() if (found := _answers(o, places[name])) is not None}
    winners = tuple(_winner(name, outcomes[name], items, scale) for name, items in answers.items())
    tests = tuple(
        (a, b, compare(answers[a], answers[b], scale, first.config.seed)) for a, b in itertools.combinations(answers, 2)
    )
    curves = {name: _curve(history) for name, history in histories.items()}
    return Compared(names, curves, _alike(folders, histories), scale, winners, tests, _differing(histories))


def _names(folders: Sequence[Storage]) -> tuple[str, ...]:
    """The names of the runs; where two have the same one, their locations."""
    names = [last_part(f.location) for f in folders]
    return tuple(names) if len(set(names)) == len(names) else tuple(f.location for f in folders)


def _shared(
    folders: Sequence[Storage], names: Sequence[str], histories: Mapping[str, History]
) -> tuple[Scale, dict[str, list[int]]]:
    """How the report items that all runs share make up a score, and their places in the answers of every run."""
    found = {name: item_places(folder)["report"] for name, folder in zip(names, folders, strict=True)}
    scales = {name: history.about.scales["report"] for name, history in histories.items()}
    ours, first = scales[names[0]], found[names[0]]

    def same(item: ItemName) -> bool:
        measured = [scales[n].metrics.get(scales[n].tasks[found[n][item]]) for n in names if item in found[n]]
        return len(measured) == len(names) and all(m is not None and m.form() == _form(measured[0]) for m in measured)

    items = [item for item in first if same(item)]
    if not items:
        raise BadInput(
            f"evolver compare: {', '.join(names)} share no report items that were scored by the same metric, so their "
            "winners cannot be compared; give runs of the same tasks and seed."
        )
    chosen = [first[item] for item in items]
    tasks = tuple(ours.tasks[p] for p in chosen)
    kept = [task for task in ours.weights if task in set(tasks)]
    right = tuple(ours.right[p] for p in chosen) if ours.right else ()
    scale = Scale(tasks, {t: ours.weights[t] for t in kept}, {t: ours.metrics[t] for t in kept}, right)
    return scale, {name: [found[name][item] for item in items] for name in names}


def _form(metric: Any) -> Any:
    return None if metric is None else metric.form()


def _answers(outcome: Outcome, places: Sequence[int]) -> list[ItemAnswer] | None:
    """The winner's answers to the shared items; None where it could not be scored."""
    report = outcome.winner.report
    return None if report.score is None else [report.items[p] for p in places]


def _winner(name: str, outcome: Outcome, items: Sequence[ItemAnswer], scale: Scale) -> Winner:
    low, high = interval(items, scale, outcome.config.seed)
    what = f"candidate {outcome.winning.number}"
    return Winner(name, what, outcome.winner.recipe.id, scale.score(items), low, high, scale.of_tasks(items))


def _curve(history: History) -> Curve:
    spent, best, found = 0, -math.inf, list[tuple[int, float]]()
    for candidate, result in history.stages["search"]:
        spent += result.cost
        if result.score is not None and candidate.question.limit is None and result.score > best:
            best = result.score
            found.append((spent, best))
    points = dict([*found, *([(spent, best)] if found else [])])  # of several after as many items, the last one
    return tuple(points.items())


def _alike(folders: Sequence[Storage], histories: Mapping[str, History]) -> bool:
    """Whether the dev scores of all runs mean the same."""
    scales = [history.about.scales["dev"].form() for history in histories.values()]
    items = [item_places(folder)["dev"] for folder in folders]
    return all(s == scales[0] for s in scales) and all(i == items[0] for i in items)


def _differing(histories: Mapping[str, History]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The keys in which the configurations differ, each with the value in every run."""
    flat = [dict(_keys(history.config.model_dump(mode="json"))) for history in histories.values()]
    names = dict.fromkeys(key for found in flat for key in found if key != "run")
    rows = ((key, tuple(found.get(key, "–") for found in flat)) for key in names)
    return tuple((key, values) for key, values in rows if len(set(values)) > 1)


def _keys(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The dotted keys of a configuration with their values as text; tasks are told by their names."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{prefix}{key}.")
        elif key == "tasks" and isinstance(value, list) and all(isinstance(v, Mapping) for v in value):
            for entry in value:
                inner = {k: v for k, v in entry.items() if k != "task"}
                yield from _keys(inner, f"{prefix}tasks[{entry['task']}].")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def comparison_text(found: Compared, picture: bool = False) -> str:
    """The comparison as Markdown, with its picture if there is one."""
    form = found.form()
    alike = "" if found.alike else (
        " The runs have other dev items, weights or metrics, so these scores do not mean the same in each of them."
    )  # fmt: skip
    parts = [
        f"# {', '.join(map(escaped, found.runs))}",
        f"## Best dev score against scored items\n\nThe best dev score of the search so far.{alike}",
        *([f"![best dev score against scored items]({PICTURE})"] if picture else []),
        markdown_table(["items scored", *map(escaped, found.runs)], _steps(found)),
        f"## Winners on {form['items']} shared report items\n\n{escaped(form['said'])}",
    ]
    if found.winners:
        head = ["run", "winner", "recipe", "score", "95 % interval", *map(escaped, form["tasks"])]
        rows = [[escaped(w[0]), w[1], f"`{w[2][:12]}`", *w[3:]] for w in form["winners"]]
        parts.append(markdown_table(head, rows))
    if found.tests:
        head = ["winner of", "against that of", "points", "95 % interval", "p (paired permutation)", "p (Holm)"]
        parts.append(markdown_table(head, [[escaped(a), escaped(b), *more] for a, b, *more in form["tests"]]))
    rows = [[f"`{key}`", *(escaped(v) for v in values)] for key, values in found.keys]
    keys = markdown_table(["key", *map(escaped, found.runs)], rows) if rows else "The configurations are the same."
    parts.append(f"## Keys that differ\n\n{keys}")
    return "\n\n".join(parts) + "\n"


def winners_said(found: Compared) -> str:
    """Which runs have winners, and how they are compared."""
    missing = [name for name in found.runs if name not in {w.run for w in found.winners}]
    out = [f"Tasks have the weights of {found.runs[0]}."]
    if missing:
        out.append(f"Without a winner that was scored on report items: {', '.join(missing)}.")
    same = [f"{a} and {b}" for a, b, c in found.tests if _recipe(found, a) == _recipe(found, b)]
    if same:
        out.append(f"The same model won in {'; '.join(same)}.")
    if len(found.tests) > 1:
        out.append("The column Holm corrects the p-values for the number of tests.")
    return " ".join(out)


def _recipe(found: Compared, run: str) -> str:
    return next(w.recipe for w in found.winners if w.run == run)


def _steps(found: Compared) -> list[list[str]]:
    """The best scores of all runs after some numbers of items."""
    most = max((curve[-1][0] for curve in found.curves.values() if curve), default=0)
    marks = dict.fromkeys(round(most * k / STEPS) for k in range(STEPS + 1))
    scale = found.scale
    return [[str(mark), *(score_text(_at(curve, mark), scale) for curve in found.curves.values())] for mark in marks]


def _at(curve: Curve, spent: int) -> float | None:
    """The best score after so many items."""
    return max((best for x, best in curve if x <= spent), default=None)


def _between(low: float, high: float, scale: Scale, difference: bool = True) -> str:
    words = [signed(x, scale) if difference else score_text(x, scale) for x in (low, high)]
    return " – ".join(words)


def _holm(ps: Sequence[float]) -> list[float]:
    """The p-values after the correction of Holm (1979) for the number of tests."""
    out, highest = [1.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda k: ps[k])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[place]))
        out[place] = highest
    return out


def write_comparison(target: Storage, found: Compared) -> None:
    """Write ``comparison.md``, the same as ``comparison.html``, and the picture.

    Raises BadInput where they cannot be written.
    """
    text = comparison_text(found, picture=True)
    try:
        target.write(PICTURE, _picture(found))
        target.write("comparison.md", text.encode())
        target.write("comparison.html", html_page(text, ", ".join(found.runs), target.read).encode())
    except OSError as error:
        raise BadInput(file_sentence(error, target.location)) from error


def _picture(found: Compared) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for place, (name, curve) in enumerate(found.curves.items()):
        look: dict[str, Any] = {
            "color": LINE_COLOURS[place % len(LINE_COLOURS)],
            "linestyle": LINE_DASHES[place // len(LINE_COLOURS) % len(LINE_DASHES)],
        }
        spent, best = zip(*curve, strict=True) if curve else ((), ())
        axes.step(spent, best, where="post", linewidth=2, marker="o", markersize=4, label=name, **look)
    axes.set_xlabel("items scored by the search")
    axes.set_ylabel("best dev score")
    axes.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
