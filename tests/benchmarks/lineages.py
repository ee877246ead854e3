"""What long lineages cost: bytes of the ledger and of messages for each candidate, and the time of writing and reading.

Run by ``make benchmark-lineages``; writes results/benchmarks/lineages.md. ``--times FILE`` only measures the times with
the code that is imported, and ``--before FILE`` compares with such a file, which other code wrote.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import random
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pyarrow as pa

from evolver.config import Config
from evolver.evaluation.scores.metrics import JUDGED
from evolver.evaluation.scores.scoring import Scale
from evolver.ledger import Ledger
from evolver.ledger.parts import part_bytes
from evolver.ledger.rows import SCHEMA, row_of
from evolver.records import Candidate, Question, Result
from evolver.records.recipe import Cross, Expert, Merge, Recipe, Rule, dump_recipe
from evolver.report.text import markdown_table
from evolver.runs.about import About, write_about
from evolver.runs.history import read_history
from evolver.storage import local, storage_at

PAGE = Path("results/benchmarks/lineages.md")
ACCEPTED = (100, 1_000, 3_000)
ITEMS, MEMBERS, WINDOW = 240, 5, 64
CANDIDATES = 5_000  # each of two rows
ROUNDS = 3
EXPERTS = [Expert(f"expert{i}", f"{i + 1:020x}") for i in range(MEMBERS)]
BASE = Expert("base", "0" * 20)


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=Path)
    parser.add_argument("--before", type=Path)
    given = parser.parse_args()
    found = {name: times(make) for name, make in SEARCHES.items()}
    if given.times:
        given.times.write_text(json.dumps(found))
        return
    before = json.loads(given.before.read_text()) if given.before else {}
    write_page(list(sizes()), found, before)


def evolver(count: int, accepted: float) -> Iterator[tuple[Candidate, Result]]:
    """Candidates of a population in which this share of them replaces its parent, with their results."""
    draw = random.Random(0)
    population: list[Recipe] = list(EXPERTS)
    for number in range(count):
        i = number % MEMBERS
        partner = population[draw.choice([j for j in range(MEMBERS) if j != i])]
        child = Cross(population[i], (partner,), "evolver", 0.5, 0.5, draw.getrandbits(32))
        yield pair(number, child, (population[i].id, partner.id), draw)
        if draw.random() < accepted:
            population[i] = child


def coefficients(count: int) -> Iterator[tuple[Candidate, Result]]:
    """Candidates of a search over the coefficients of a merge."""
    draw = random.Random(0)
    for number in range(count):
        weights = tuple(draw.random() for _ in EXPERTS)
        recipe = Merge("task_arithmetic", tuple(EXPERTS), BASE, (Rule.of({"weight": weights, "lambda": 1.0}),))
        yield pair(number, recipe, (), draw)


def pair(number: int, recipe: Recipe, parents: tuple[str, ...], draw: random.Random) -> tuple[Candidate, Result]:
    """A candidate, and a result with answers drawn at random."""
    items = tuple(float(draw.random() < 0.5) for _ in range(ITEMS))
    score = sum(items) / ITEMS
    result = Result(number, recipe.id, "ok", score, score, True, items, {"t": score}, {"total": 1.5}, worker="w")
    return Candidate(number, recipe, "evolver", parents, Question(bar=0.5)), result


SEARCHES: dict[str, Callable[[], Iterator[tuple[Candidate, Result]]]] = {
    "coefficients of a merge": lambda: coefficients(CANDIDATES),
    "Evolver, one of ten accepted": lambda: evolver(CANDIDATES, 0.1),
}


def sizes() -> Iterator[list[str]]:
    """For each number of acceptances: bytes a candidate then takes, with whole recipes and with nodes."""
    from evolver.records.graph import texts_of
    from evolver.workers.telling import Told

    whole_schema = SCHEMA.set(SCHEMA.get_field_index("nodes"), pa.field("recipe", pa.string()))
    told, held = Told(), set[str]()
    rows: dict[str, list[dict[str, Any]]] = {"whole": [], "nodes": []}
    messages: dict[str, list[int]] = {"whole": [], "nodes": []}
    for candidate, result in evolver(max(ACCEPTED), 1.0):
        messages["nodes"].append(len(told.pack(0, candidate)))
        lines = [row_of(candidate, None, held), row_of(candidate, result, held)]
        lines[1]["nodes"] = []
        held |= texts_of(candidate.recipe, held).keys()
        rows["nodes"].append(lines[0])
        rows["nodes"].append(lines[1])
        number = candidate.number + 1
        if any(0 <= n - number < WINDOW for n in ACCEPTED):
            text = dump_recipe(candidate.recipe)
            fields = {**vars(candidate), "recipe": text, "question": vars(candidate.question)}
            messages["whole"].append(len(zlib.compress(json.dumps(fields, separators=(",", ":")).encode())))
            rows["whole"] += [{**{k: v for k, v in line.items() if k != "nodes"}, "recipe": text} for line in lines]
        if number in ACCEPTED:
            yield [f"{number:,}"] + [
                f"{x:,.0f}"
                for kind, schema in (("whole", whole_schema), ("nodes", SCHEMA))
                for x in (
                    statistics.mean(messages[kind][-WINDOW:]),
                    *ledger_bytes(rows[kind][-2 * WINDOW :], schema),
                )
            ]


def ledger_bytes(rows: list[dict[str, Any]], schema: pa.Schema) -> tuple[float, float]:
    """Bytes of a candidate's two small parts, and of its share of a wide part."""
    tables = [pa.Table.from_pylist([row], schema=schema) for row in rows]
    small = sum(len(part_bytes(table, small=True)) for table in tables)
    return small / WINDOW, len(part_bytes(pa.concat_tables(tables))) / WINDOW


def times(make: Callable[[], Iterator[tuple[Candidate, Result]]]) -> dict[str, float]:
    """Seconds of processor time, medians: to write the ledger, to open it again, and to read it for a report."""
    pairs, rounds = list(make()), []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder, no_sync():
            place = storage_at(folder)
            place.write("config.yaml", json.dumps(about().config.model_dump(mode="json")).encode())
            write_about(place, about())
            rounds.append(
                {
                    "write": seconds(lambda place=place: write(place, pairs)),
                    "open": seconds(lambda place=place: Ledger(place.folder("ledger"), "me").close()),
                    "read": seconds(lambda place=place: read_history(place)),
                }
            )
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def write(place: Any, pairs: list[tuple[Candidate, Result]]) -> None:
    """Write a ledger as a run does."""
    with contextlib.closing(Ledger(place.folder("ledger"), "me")) as ledger:
        for candidate, result in pairs:
            ledger.write_asked(candidate)
            ledger.write_result(candidate, result)


def about() -> About:
    """What a run's folder says beside its ledger."""
    config = {
        "run": "night", "model": {"base": "base"}, "experts": {e.name: e.name for e in EXPERTS},
        "search": {"algorithm": "tpe"}, "budget": {"candidates": CANDIDATES},
        "evaluation": {"tasks": [{"task": "t", "dev": ITEMS, "report": 10}]},
    }  # fmt: skip
    scale = Scale(["t"] * ITEMS, {"t": 1.0}, {"t": JUDGED})
    return About(Config.model_validate(config), {"dev": scale, "report": scale}, {})


def no_sync() -> contextlib.AbstractContextManager[Any]:
    """Disks are not what is measured here."""
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(local, "_sync"))
    stack.enter_context(mock.patch("os.fsync"))
    return stack


def seconds(action: Callable[[], object]) -> float:
    """Processor time of one call."""
    gc.collect()
    began = time.process_time()
    action()
    return time.process_time() - began


def write_page(rows: list[list[str]], now: dict[str, Any], before: dict[str, Any]) -> None:
    """The Markdown page."""
    head = ["acceptances", "message, whole recipe", "rows, whole recipe", "joined rows, whole recipe", "message, nodes",
            "rows, nodes", "joined rows, nodes"]  # fmt: skip
    timed = [
        [search, what, *([f"{before[search][what]:.2f}"] if before else ["–"]), f"{now[search][what]:.2f}"]
        for search in now
        for what in ("write", "open", "read")
    ]
    setting = (
        f"A population of {MEMBERS} in which every child replaces its parent, the longest lineages that there can be; "
        f"{ITEMS} answers a candidate, {psutil.cpu_count()} cores, {platform.machine()}. Made by `make "
        "benchmark-lineages`."
    )
    of_bytes = (
        f"Bytes for each candidate, means of the last {WINDOW} before so many acceptances. A message goes to a worker "
        "that has had all earlier ones. A candidate has two rows, each in a small file of its own at first; later, 256 "
        "rows are joined in one file. Whole recipe: each row and message holds all nodes of its recipe, as it was "
        "before nodes had ids of their own in them."
    )
    of_times = (
        f"Seconds of processor time for a ledger of {2 * CANDIDATES:,} rows, medians of {ROUNDS}, without forcing "
        "files to the disk: to write it row by row, to open it for going on, and to read all of it for a report."
    )
    title = "# Long lineages: what a candidate takes in the ledger and in messages"
    tables = markdown_table(head, rows), markdown_table(["search", "", "whole recipes", "nodes"], timed)
    text = "\n\n".join([title, setting, of_bytes, tables[0], of_times, tables[1]])
    PAGE.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
