"""What the dashboard takes of runs of a thousand to a hundred thousand candidates, and Optuna's of the same trials.

Run by ``make benchmark-dashboard``; writes results/benchmarks/dashboard.md. The ledgers are made up: every candidate
has a recipe and 200 answers of its own.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet as pq
from playwright.sync_api import Browser, Error, Page, sync_playwright

from evolver.config import Config
from evolver.dashboard import views
from evolver.dashboard.overview import Overview
from evolver.dashboard.status import status_of
from evolver.evaluation.scores.metrics import JUDGED
from evolver.evaluation.scores.scoring import Scale
from evolver.ledger.ledger import JOIN_FROM
from evolver.ledger.parts import part_bytes
from evolver.ledger.rows import SCHEMA, row_of
from evolver.records import Candidate, Result
from evolver.records.recipe import Expert, Merge, Rule
from evolver.report.text import markdown_table
from evolver.runs.about import About, write_about
from evolver.storage import storage_at

PAGE = Path("results/benchmarks/dashboard.md")
COUNTS = (1_000, 10_000, 100_000)
PEER = 10_000  # trials
ITEMS, TASKS, WORKERS = 200, ("maths", "code"), 8
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BASE, EXPERTS = Expert("base", "00"), tuple(Expert(n, n) for n in ("maths", "code", "safety"))


def main() -> None:
    """Measure, print, and write the page."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for count in COUNTS:
            run = Path(folder) / str(count) / "night"
            make_run(run, count)
            rows.append([f"{count:,}", *read_figures(run), f"{in_browser(browser, run.parent):.1f}"])
            print(rows[-1], flush=True)
        peer = optuna_in_browser(browser, Path(folder) / "study.db")
        ours = float(rows[COUNTS.index(PEER)][-1])
    write_page(rows, peer, ours)


def make_run(run: Path, count: int) -> None:
    """A run's folder with ``count`` candidates, in parts as a ledger joins them."""
    storage = storage_at(run)
    config = {
        "run": "night", "model": {"base": "base"}, "experts": {e.name: e.name for e in EXPERTS},
        "search": {"algorithm": "tpe"}, "budget": {"candidates": count},
        "evaluation": {"tasks": [{"task": t, "dev": ITEMS // 2, "report": 10} for t in TASKS]},
    }  # fmt: skip
    storage.write("config.yaml", json.dumps(config).encode())
    scale = Scale(TASKS * (ITEMS // 2), dict.fromkeys(TASKS, 1.0), dict.fromkeys(TASKS, JUDGED))
    write_about(storage, About(Config.model_validate(config), {"dev": scale, "report": scale}, {}))
    parts, number = storage.folder("ledger"), 0
    for first in range(0, count, JOIN_FROM // 2):
        found = list(candidates(first, min(count, first + JOIN_FROM // 2), scale))
        lines = [line for c, r in found for line in (row_of(c, None), row_of(c, r))]
        data = part_bytes(pa.Table.from_pylist(lines, schema=SCHEMA))
        parts.create(f"part-{number:08d}-{number + len(lines) - 1:08d}.parquet", data)
        number += len(lines)


def candidates(first: int, last: int, scale: Scale) -> Iterator[tuple[Candidate, Result]]:
    """Candidates that grow better, with answers drawn at random."""
    rng = np.random.default_rng(first)
    for number in range(first, last):
        weights = tuple(rng.dirichlet([1.0] * len(EXPERTS)).tolist())
        recipe = Merge("task_arithmetic", EXPERTS, BASE, (Rule.of({"weight": weights, "lambda": 1.0}),))
        items = tuple((rng.random(ITEMS) < 0.4 + 0.1 * np.log10(number + 1) / 5).astype(float).tolist())
        seconds = {"total": 1.0, "materialise": 0.2, "forward": 0.7}
        done = Result(
            number, recipe.id, "ok", scale.score(items), None, True, items, scale.of_tasks(items), seconds,
            {"tokens": 9000.0}, worker=f"worker {number % WORKERS}",
        )  # fmt: skip
        yield Candidate(number, recipe, "tpe"), done


def read_figures(run: Path) -> list[str]:
    """MiB of the ledger; seconds of reading it by pyarrow alone, of a first look, and of a look after one more part."""
    files = sorted((run / "ledger").glob("part-*"))
    began = time.perf_counter()
    for file in files:
        pq.read_table(file)
    bare = time.perf_counter() - began
    began = time.perf_counter()
    overview = Overview(storage_at(run))
    look(overview)
    first = time.perf_counter() - began
    last = max(int(f.stem.split("-")[-1]) for f in files) + 1
    scale = overview.about.scales["dev"]
    (candidate, result) = next(candidates(0, 1, scale))
    candidate, result = (replace(x, number=len(overview.rows("search"))) for x in (candidate, result))
    line = pa.Table.from_pylist([row_of(candidate, result)], schema=SCHEMA)
    storage_at(run / "ledger").create(f"part-{last:08d}.parquet", part_bytes(line))
    began = time.perf_counter()
    overview.refresh()
    size = look(overview)
    again = time.perf_counter() - began
    size_of_ledger = sum(f.stat().st_size for f in files) / 2**20
    return [f"{size_of_ledger:.0f}", f"{bare:.2f}", f"{first:.2f}", f"{first / bare:.1f}", f"{again:.2f}",
            f"{size / 1024:.0f}"]  # fmt: skip


def look(overview: Overview) -> int:
    """Make a run's page; its bytes."""
    return len(json.dumps(views.details(overview, status_of(overview, "night"))))


def in_browser(browser: Browser, results: Path) -> float:
    """Seconds from opening a run's page to its curve and its heat map, the server having just started."""
    command = [sys.executable, "-m", "evolver", "dashboard", str(results), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    page = browser.new_page()
    try:
        address = server.stdout.readline().strip()
        page.goto(address.replace("/?", "/static/style.css?"))  # in, and nothing read yet
        return seconds_to(page, f"{address.partition('/?')[0]}/run/night", "#curve .main-svg", "#heat .main-svg")
    finally:
        end(page, server)


def seconds_to(page: Page, address: str, *shown: str) -> float:
    """Seconds from opening an address to all that is to be shown there."""
    began = time.perf_counter()
    page.goto(address)
    for selector in shown:
        page.wait_for_selector(selector, timeout=300_000)
    return time.perf_counter() - began


def end(page: Page, server: subprocess.Popen[Any]) -> None:
    page.close()
    server.terminate()
    server.wait(30)


def optuna_in_browser(browser: Browser, file: Path) -> float:
    """The same of Optuna's dashboard on a study of as many trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=f"sqlite:///{file}", study_name="night", direction="maximize")
    kinds = {f"weight[{e.name}]": optuna.distributions.FloatDistribution(0, 1) for e in EXPERTS}
    rng = np.random.default_rng(0)
    study.add_trials(
        [optuna.trial.create_trial(params={k: float(rng.random()) for k in kinds}, distributions=kinds,
                                   value=float(rng.random())) for _ in range(PEER)]
    )  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("optuna-dashboard")
    quiet = subprocess.DEVNULL
    server = subprocess.Popen([program, f"sqlite:///{file}", "--port", str(port)], stdout=quiet, stderr=quiet)
    page = browser.new_page()
    try:
        while True:
            try:
                page.goto(f"http://127.0.0.1:{port}/dashboard")
                break
            except Error:
                time.sleep(0.2)
        return seconds_to(page, f"http://127.0.0.1:{port}/dashboard/studies/1", "text=Best Trial", ".main-svg")
    finally:
        end(page, server)


def write_page(rows: list[list[str]], peer: float, ours: float) -> None:
    """The page of figures."""
    head = [
        "candidates", "ledger (MiB)", "reading it, pyarrow alone (s)", "a first look (s)", "÷",
        "a look after one more result (s)", "page (KiB)", "in Chromium, from the address to its plots (s)",
    ]  # fmt: skip
    text = f"""# The dashboard

Made by `make benchmark-dashboard`, on {os.cpu_count()} cores of {platform.machine()}, in one run. Candidates are made
up: {ITEMS} items of {len(TASKS)} tasks, {len(EXPERTS)} experts, {WORKERS} workers. A look is all that a run's page
shows, as JSON; the browser's figure has a server in it that was started just before.

{markdown_table(head, rows)}

Optuna's dashboard, with {PEER:,} trials of a study in SQLite, opened in the same way: {peer:.1f} s, which is
{peer / ours:.1f} times ours.
"""
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
