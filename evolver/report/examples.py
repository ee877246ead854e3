"""The examples of a report: items on which the winner and the best expert differ, with what both answered.

Scores and answers come from the ledger. Only the texts of the items that are shown have a file of their own in the
run's folder, so that a report can be written again without the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evolver.evaluation.base import ItemText, shortened
from evolver.evaluation.scores.metrics import closeness
from evolver.records import own_score
from evolver.report.text import escaped, fenced, markdown_table
from evolver.runs.outcome import Outcome
from evolver.storage import Storage

EXAMPLES_FILE = "examples.json"
# Examples of each kind, and characters of a prompt and of an answer.
MOST = 4
PROMPT_LENGTH, ANSWER_LENGTH = 600, 300

Texts = Mapping[int, ItemText]


@dataclass(frozen=True)
class Differences:
    """Places of report items where the winner is better than the best expert (``won``) and worse (``lost``), by task.

    The places of a task stand in the order of the size of the difference, those of equal size in the run's order.
    """

    won: Mapping[str, Sequence[int]]
    lost: Mapping[str, Sequence[int]]

    @property
    def shown(self) -> list[int]:
        """Those that a report shows."""
        return [*few(self.won), *few(self.lost)]


def compared_items(outcome: Outcome) -> Differences | None:
    """Where the winner and the best expert differ; None where one of them has no report scores."""
    ours, theirs, scale = outcome.winner.report, outcome.best_expert.report, outcome.scales["report"]
    if None in (ours.score, theirs.score):
        return None
    won: dict[str, list[int]] = {}
    lost: dict[str, list[int]] = {}
    for task, places in scale.places.items():
        right = np.asarray([scale.right[p] if scale.right else 0.0 for p in places])
        own = (np.asarray([own_score(r.items[p]) for p in places]) for r in (ours, theirs))
        a, b = (closeness(scale.metrics[task], scores, right) for scores in own)
        gain = a - b
        order = np.argsort(-np.abs(gain), kind="stable")
        won[task] = [places[k] for k in order if gain[k] > 0]
        lost[task] = [places[k] for k in order if gain[k] < 0]
    return Differences(won, lost)


def few(places: Mapping[str, Sequence[int]]) -> list[int]:
    """The first ``MOST`` places, taken from the tasks in turn."""
    deepest = max(map(len, places.values()), default=0)
    in_turn = [members[k] for k in range(deepest) for members in places.values() if k < len(members)]
    return in_turn[:MOST]


def write_texts(folder: Storage, texts: Texts) -> None:
    """Keep the texts of the items that the report shows, by their places."""
    form = {
        str(place): [shortened(part, PROMPT_LENGTH) for part in (text.prompt, text.right)]
        for place, text in sorted(texts.items())
    }
    folder.write(EXAMPLES_FILE, json.dumps(form, ensure_ascii=False, indent=1).encode(errors="replace"))


def read_texts(folder: Storage) -> dict[int, ItemText]:
    """The inverse of ``write_texts``; nothing where a run has no such file, or one that cannot be read."""
    try:
        form = json.loads(folder.read(EXAMPLES_FILE))
        return {int(place): ItemText(*map(str, text)) for place, text in form.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def examples_section(outcome: Outcome, texts: Texts) -> str:
    """The section of a report; nothing where there are no scores to compare.

    Args:
        texts: of the items that are shown, by their places; those of runs of earlier versions are not kept.
    """
    found = compared_items(outcome)
    if found is None:
        return ""
    expert, items = outcome.best_expert.label, outcome.scales["report"].places
    counts = {task: (len(found.won[task]), len(found.lost[task])) for task in items}
    rows = [[escaped(t), str(w), str(n), str(len(items[t]) - w - n)] for t, (w, n) in counts.items()]
    won, lost = (sum(column) for column in zip(*counts.values(), strict=True))
    total = sum(map(len, items.values()))
    said = (
        f"On {won} of {total} report items the winner answers better than {expert}, on {lost} worse, and on the other "
        f"{total - won - lost} equally well."
    )
    table = markdown_table(["task", "won", "lost", "equal"], rows)
    parts = [f"## Where the winner and {expert} differ", " ".join([said, *_missing(found, outcome, texts)]), table]
    for kind, chosen, all_of in (("Won", found.won, won), ("Lost", found.lost, lost)):
        shown = [place for place in few(chosen) if place in texts or _words(outcome, place)[0]]
        if shown:
            parts.append(f"### {kind}: {len(shown)} of {all_of}")
            parts += [part for place in shown for part in _example(place, outcome, texts)]
    return "\n\n".join(parts)


def _missing(found: Differences, outcome: Outcome, texts: Texts) -> Iterator[str]:
    """What is missing in the examples, and why."""
    shown, tasks = found.shown, outcome.scales["report"].tasks
    unshown = sorted({tasks[p] for p in shown if p not in texts})
    if unshown:
        yield f"The run's folder does not hold the texts of the items of {', '.join(map(escaped, unshown))}."
    mute = sorted({tasks[p] for p in shown if not _words(outcome, p)[0]})
    if mute and not (outcome.winner.report.said and outcome.best_expert.report.said):
        yield "An earlier version of Evolver made this run and kept scores only, so no answers are shown."
    elif mute:
        yield (
            f"The kind of evaluation of {', '.join(map(escaped, mute))} gives scores but no answers in words, so the "
            "scores are shown."
        )


def _example(place: int, outcome: Outcome, texts: Texts) -> Iterator[str]:
    """One item: its prompt, the right answer, and both answers."""
    text, expert = texts.get(place), outcome.best_expert
    yield f"**{escaped(outcome.scales['report'].tasks[place])}**, report item {place + 1}:"
    if text is not None:
        yield fenced(text.prompt)
    ours, theirs = map(_in_a_line, _words(outcome, place))
    if not ours:
        ours, theirs = (f"score {own_score(f.report.items[place]):.4g}" for f in (outcome.winner, expert))
    right = f"- right: {_in_a_line(text.right)}\n" if text is not None and text.right else ""
    yield f"{right}- **winner**: {ours}\n- {expert.label}: {theirs}"


def _words(outcome: Outcome, place: int) -> tuple[str, str]:
    """What the winner and the best expert said, in words; empty where one of them is not known."""
    ours, theirs = outcome.winner.report.said, outcome.best_expert.report.said
    both = (ours[place], theirs[place]) if max(0, place) < min(len(ours), len(theirs)) else ("", "")
    return both if all(both) else ("", "")


def _in_a_line(text: str) -> str:
    return escaped(shortened(" ".join(text.split()), ANSWER_LENGTH))
