"""Figures of the main job on demo-llm's real model: seconds of a candidate against copy and bare forward passes.

Run by ``make benchmark``; writes results/benchmarks/main-job.md. Every ratio is of medians measured in one process, the
compared parts taking turns, so that a change of the machine's speed meets both.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil
import torch
import yaml
from bare import bare_forward

from evolver.checkpoints.weights import Checkpoint
from evolver.config.reading import config_at
from evolver.driver.prepare import Prepared, prepare
from evolver.ledger import Ledger
from evolver.records import Candidate
from evolver.records.recipe import Cross, Merge, Recipe, Rule
from evolver.report.text import markdown_table
from evolver.workers.worker import Worker

ROUNDS = 7
CONFIG = "configs/demo-llm.yaml"
PAGE = Path("results/benchmarks/main-job.md")


def main() -> None:
    """Measure, print, and write the page."""
    prepared = prepare(config_at(CONFIG))
    first, peak = cold_start()
    worker = Worker(prepared.plan, "dev", tasks=prepared.tasks)
    rows, splits = [], []
    for name, recipes in kinds(prepared).items():
        median = candidate_seconds(worker, recipes)
        limit = median["copy"] + median["bare forward"]
        ratio = f"{median['total'] / limit:.2f}"
        splits.append([name, *(f"{median[k]:.3f}" for k in ("materialise", "forward", "overhead", "total"))])
        rows.append([f"{name}: candidate ÷ (one copy + bare forward passes)", ratio, "≤ 2"])
        print(name, median, "ratio", ratio, flush=True)
    sent, received = ray_bytes()
    rows += [
        [
            "bytes of a candidate's message, with the longest lineage of a released run (75 acceptances)",
            f"{sent:.0f}",
            "≤ 10,240",
        ],
        ["bytes of a result's message, with 1,000 items", f"{received:.0f}", "≤ 10,240"],
        ["seconds from the command to the first candidate's score", f"{first:.1f}", "–"],
        ["peak memory of the command (MiB)", f"{peak / 2**20:.0f}", "–"],
    ]
    write_page(rows, splits, median, len(worker.scale.tasks))


def kinds(prepared: Prepared) -> dict[str, list[Recipe]]:
    """Fresh candidates of the two forms of Evolver, from a population in which one member has evolved."""
    experts, base = prepared.experts, prepared.base
    evolved = Cross(experts[0], (experts[1],), "evolver", 0.5, 0.5, 1)
    values = {"weight": (1 / len(experts),) * len(experts), "lambda": 1.5, "normalize": False}
    children = [Cross(evolved, (experts[2],), "evolver", 0.5, 0.5, 100 + n) for n in range(ROUNDS + 2)]
    merged: list[Recipe] = [Merge("task_arithmetic", (c, *experts[1:]), base, (Rule.of(values),)) for c in children]
    return {"Evolver offspring": list(children), "Evolver offspring, merged with its population": merged}


def candidate_seconds(worker: Worker, recipes: list[Recipe]) -> dict[str, float]:
    """Medians over fresh candidates, after two that warm the caches."""
    found: dict[str, list[float]] = {}
    ledger = Ledger(Path(tempfile.mkdtemp()), "benchmark")
    for number, recipe in enumerate(recipes):
        candidate = Candidate(number, recipe, "benchmark")
        result = worker.evaluate(candidate)
        if result.status != "ok":
            raise SystemExit(f"a candidate failed: {result.reason}")
        seconds = dict(result.seconds)
        seconds["total"] += timed(lambda c=candidate, r=result: (ledger.write_asked(c), ledger.write_result(c, r)))
        seconds["overhead"] = seconds["total"] - seconds["materialise"] - seconds["forward"]
        seconds["copy"] = timed(lambda: copy_model(worker))
        seconds["bare forward"] = timed(bare_forward(worker))
        if number >= 2:
            for key, value in seconds.items():
                found.setdefault(key, []).append(value)
    return {k: statistics.median(v) for k, v in found.items()}


@cache
def copies(base: Checkpoint) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of tensors of the model's size, made once."""
    sources = [base.tensor(name).clone() for name in base.names()]
    return [(torch.empty_like(s), s) for s in sources]


def copy_model(worker: Worker) -> None:
    """One copy of all weights, memory to memory."""
    for target, source in copies(worker.materialiser.base):
        target.copy_(source)


def timed(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def cold_start() -> tuple[float, float]:
    """Seconds from the command to the first score, and the peak memory of the whole small run, of a fresh process."""
    raw = yaml.safe_load(Path(CONFIG).read_text())
    raw["budget"], raw["baselines"] = {"candidates": 3}, {"masses": [1.0]}
    raw["evaluation"]["tasks"] = [{**t, "dev": 20, "report": 20} for t in raw["evaluation"]["tasks"]]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.yaml"
        config.write_text(yaml.safe_dump(raw))
        began = time.perf_counter()
        command = [sys.executable, "evolve.py", str(config), "--results", folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        first = 0.0
        for line in process.stdout:
            first = first or (time.perf_counter() - began if line.startswith("baselines 1/") else 0.0)
        _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit("the small run failed")
    return first, usage.ru_maxrss * 1024.0


def ray_bytes() -> tuple[float, float]:
    """Bytes of the largest messages to and from Ray actors: the longest lineage, and many items."""
    from evolver.records import Result
    from evolver.records.recipe import Expert
    from evolver.workers.messages import pack_candidate, pack_result

    population: list[Recipe] = [Expert(f"expert{i}", f"{i:020x}") for i in range(5)]
    seeds = random.Random(0)
    for step in range(75):  # every challenge of a released run accepted: the longest lineage that it can have
        i = step % 5
        population[i] = Cross(population[i], (population[(i + 1) % 5],), "evolver", 0.5, 0.5, seeds.getrandbits(32))
    candidate = Candidate(75, Merge("simple", tuple(population), Expert("base", "0" * 20)), "evolver+merger")
    generator = torch.Generator().manual_seed(0)
    items = tuple(torch.randint(0, 2, (1000,), generator=generator).double().tolist())
    result = Result(75, candidate.recipe.id, "ok", 0.5, 0.5, True, items, {"task": 0.5}, {"total": 1.0})
    return len(pack_candidate(candidate)), len(pack_result(result))


def write_page(rows: list[list[str]], splits: list[list[str]], median: dict[str, float], items: int) -> None:
    """The Markdown page."""
    cores = f"{psutil.cpu_count()} cores, {platform.machine()}"
    setting = (
        f"SmolLM2-135M-Instruct in bfloat16, {items} dev items of demo-llm, {cores}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; medians of {ROUNDS} fresh candidates. Made by `make benchmark`."
    )
    limits = (
        f"One copy of the model takes {median['copy']:.3f} s, the bare forward passes {median['bare forward']:.3f} s "
        "(the same batches, outputs thrown away). Forward contains the metrics; overhead is the rest, with both synced "
        "writes of the ledger."
    )
    head = ["candidate", "materialise", "forward", "overhead", "total"]
    text = "\n\n".join(
        [
            "# The main job: what a candidate costs",
            setting,
            markdown_table(["figure", "measured", "must reach"], rows),
            "Seconds of a warm candidate:",
            markdown_table(head, splits),
            limits,
        ]
    )
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
