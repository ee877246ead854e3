"""Evaluations per minute of a whole search, beside mergekit-evolve, on a machine without a GPU; prints Markdown.

``python tests/benchmarks/mergekit_evolve.py --peer ENVIRONMENT``, where ENVIRONMENT holds mergekit 0.1.4,
transformers 4.57, lm-eval 0.4.9.1, datasets 3, cma 4.0, ray, wandb, pandas and a CPU build of torch. Both searches
merge the same four fine-tunes of demo-llm by task arithmetic and score the same items of the same four tasks. What
comes before a worker is warm is left out on both sides: the peer's first generation, our baselines and candidate 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from evolver.ledger import read_table  # noqa: E402
from evolver.report.text import markdown_table  # noqa: E402
from evolver.storage import storage_at  # noqa: E402
from evolver.storage.paths import expand  # noqa: E402

CONFIG = ROOT / "configs" / "demo-llm.yaml"
ITEMS = 60  # of each task
POPULATION = 3  # of the peer's CMA-ES: its first generation warms up and is not counted, so it is a small one
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
PACKAGES = ("mergekit", "transformers", "lm_eval", "cma", "ray", "torch")
# On a CPU the peer scores in no other way: from disk its harness is given no device. It ignores the batch size here.
PEER = "mergekit-evolve, in memory"
STRATEGY = ("--strategy", "pool", "--in-memory")
# CMA-ES needs every score in full, so early stopping changes nothing for it; it speeds up challengers of an incumbent.
SEARCHES: dict[str, tuple[dict[str, Any], bool]] = {
    "`cmaes`, every candidate scored in full": ({"algorithm": "cmaes", "method": "task_arithmetic"}, False),
    "`cmaes`, early stopping on": ({"algorithm": "cmaes", "method": "task_arithmetic"}, True),
    "demo-llm's `evolver` with merger, early stopping on": ({}, True),
}


def main() -> None:
    """Measure both sides and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="environment with mergekit-evolve")
    parser.add_argument("--candidates", type=int, default=6, help="candidates that are timed, of each search")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count() or 1, help="CPU threads of either side")
    parser.add_argument("--cache", type=Path, default=Path(expand("$EVOLVER_CACHE/benchmarks/mergekit-evolve")))
    given = parser.parse_args()
    if given.candidates < 2:
        parser.error("--candidates: give 2 or more")
    # A plain SIGTERM would skip every `finally`, and leave Ray and the peer running without us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    world, size = prepare(given.cache), (given.candidates, given.threads)
    figures = {PEER: said(PEER, peer_run(given.peer.absolute(), world, *size))}
    for name in SEARCHES:
        figures[f"Evolver, {name}"] = said(name, our_run(world, name, *size))
    print(page(given.peer, size, figures))


def said(name: str, figure: Figure) -> Figure:
    """The figure, after telling of it: a whole measurement takes half an hour."""
    print(f"{name}: {figure.seconds:.2f} s a candidate", file=sys.stderr, flush=True)
    return figure


@dataclass(frozen=True)
class World:
    """What both sides search on: full models as Hugging Face folders, and tasks of exactly the scored items."""

    base: Path
    experts: dict[str, Path]
    tasks: Path
    entries: list[dict[str, Any]]
    search: dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """Seconds of a warm candidate, and the best score that was seen, as a check that both sides do the same work."""

    seconds: float
    best: float


def prepare(cache: Path) -> World:
    """The models and tasks, made where they are not there yet."""
    raw = yaml.safe_load(CONFIG.read_text())
    base = Path(expand(raw["model"]["base"]))
    experts = {name: cache / name for name in raw["experts"]}
    write_model(base, None, cache / "base")
    for name, adapter in raw["experts"].items():
        write_model(base, ROOT / adapter, experts[name])
    entries = [{"metric": "acc", **t, "dev": ITEMS, "report": 1} for t in raw["evaluation"]["tasks"]]
    for entry in entries:
        entry["report_task"] = f"{entry['task']}_report"
        write_tasks(Path(expand(raw["evaluation"]["include_path"])), entry, cache / "tasks")
    return World(cache / "base", experts, cache / "tasks", entries, raw["search"])


def write_model(base: Path, adapter: Path | None, folder: Path) -> None:
    """The base, with an adapter merged into it, as a folder that transformers 4 and 5 read alike."""
    if folder.is_dir():
        return
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    partial = folder.with_name(f".{folder.name}")
    model.save_pretrained(partial)
    for file in (*base.glob("tokenizer*"), *base.glob("chat_template*")):
        shutil.copy(file, partial)
    # Names of transformers 5 that transformers 4 does not know; it would take theta for 10,000 without a word.
    config = json.loads((partial / "config.json").read_text())
    change(partial / "config.json", {"rope_theta": config["rope_parameters"]["rope_theta"], "torch_dtype": "bfloat16"})
    change(partial / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    partial.rename(folder)


def change(file: Path, values: dict[str, Any]) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}, indent=2))


def write_tasks(source: Path, entry: dict[str, Any], folder: Path) -> None:
    """A task of the scored items alone, and one of the item after them that our run has to report on."""
    folder.mkdir(parents=True, exist_ok=True)
    task = yaml.safe_load((source / f"{entry['task']}.yaml").read_text())
    lines = list(dict.fromkeys((source / f"{entry['task']}.jsonl").read_text().splitlines()))
    for name, part in {entry["task"]: lines[:ITEMS], entry["report_task"]: lines[ITEMS : ITEMS + 1]}.items():
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(part) + "\n")
        task |= {"task": name, "dataset_kwargs": {"data_files": str(data)}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def peer_run(peer: Path, world: World, count: int, threads: int) -> Figure:
    """The second generation of the peer and what follows: everything between two lines that its driver prints."""
    with tempfile.TemporaryDirectory(prefix="mke-") as folder:
        genome = Path(folder) / "genome.yaml"
        genome.write_text(yaml.safe_dump(genome_of(world)))
        command = [
            str(peer / "bin" / "mergekit-evolve"), str(genome), "--storage-path", f"{folder}/storage", *STRATEGY,
            "--no-merge-cuda", "--num-gpus", "1", "--task-search-path", str(world.tasks), "--no-save-final-model",
            "--force-population-size", str(POPULATION), "--max-fevals", str(POPULATION + count - 1),
        ]  # fmt: skip
        with ray_head(peer, Path(folder), threads) as environment:
            marks, best = followed(command, environment, Path(folder))
    evaluated = sum(size for _, size in marks[1:])
    if evaluated < count:
        raise SystemExit(f"mergekit-evolve evaluated {evaluated} candidates after its first generation")
    return Figure((marks[-1][0] - marks[1][0]) / evaluated, best / len(world.entries))


def genome_of(world: World) -> dict[str, Any]:
    """The peer's configuration: one weight for each expert, as many numbers as our search tunes."""
    genome = {
        "merge_method": "task_arithmetic",
        "base_model": str(world.base),
        "models": [str(path) for path in world.experts.values()],
    }
    tasks = [{"name": e["task"], "metric": f"{e['metric']},none"} for e in world.entries]
    return {"genome": genome, "tasks": tasks, "limit": ITEMS, "apply_chat_template": False}


@contextmanager
def ray_head(peer: Path, folder: Path, threads: int) -> Iterator[dict[str, str]]:
    """A Ray of our own that claims to have a GPU, which the peer's actors ask for; gives the environment to join it.

    Without OMP_NUM_THREADS Ray would give an actor of one CPU one thread: the peer shall have as many as we have.
    """
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        **OFFLINE,
        "HF_HOME": str(folder / "huggingface"),
        "OMP_NUM_THREADS": str(threads),
        "PATH": f"{peer / 'bin'}:{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    (folder / "token").write_text(os.urandom(32).hex())
    command = [
        str(peer / "bin" / "ray"), "start", "--head", "--block", f"--port={port}",
        "--num-cpus=2", "--num-gpus=1", f"--temp-dir={folder / 'ray'}", "--include-dashboard=false",
        f"--object-store-memory={2**28}", f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    log = folder / "ray-start.log"
    with log.open("w") as file:
        head = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(head, port, log)
        yield environment
    finally:
        end(head)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(head: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until Ray has said that it runs."""
    for _ in range(240):
        if head.poll() is not None:
            break
        if "Ray runtime started" in log.read_text():
            return
        time.sleep(0.5)
    raise SystemExit(f"Ray does not start on port {port}:\n{log.read_text()[-2000:]}")


def end(process: subprocess.Popen[Any]) -> None:
    """End a process with all that it started, and nothing else: others may run Ray on this machine."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=20)
    for member in alive:
        member.kill()
    psutil.wait_procs(alive, timeout=20)


def followed(
    command: Sequence[str], environment: dict[str, str], folder: Path
) -> tuple[list[tuple[float, int]], float]:
    """When the driver said that it evaluates so many candidates, and that it is done (0), and the best score it told.

    CMA-ES ends with the generation that passes its budget, and then has the mean scored: hence the counting.
    """
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    marks, best, last = list[tuple[float, int]](), math.nan, deque[str](maxlen=40)
    try:
        for line in process.stdout:
            last.append(line)
            if line.startswith("Received"):
                marks.append((time.perf_counter(), int(line.split()[1])))
            elif "OPTIMIZATION COMPLETE" in line:
                marks.append((time.perf_counter(), 0))
            elif line.startswith("New best score:"):
                best = float(line.split(":")[1])
        status = process.wait()
    finally:
        end(process)
    if status:
        raise SystemExit(f"mergekit-evolve failed:\n{''.join(last)}")
    return marks, best


def our_run(world: World, name: str, count: int, threads: int) -> Figure:
    """Wall-clock seconds from result to result in our ledger, whatever passes between them included."""
    search, stop = SEARCHES[name]
    config = {
        "run": "peer",
        "model": {"base": str(world.base)},
        "experts": {name: str(path) for name, path in world.experts.items()},
        "search": search or world.search,
        "budget": {"candidates": count + 1},
        "baselines": {"masses": [1.0]},
        "evaluation": {
            "include_path": str(world.tasks),
            "threads": threads,
            "early_stopping": stop,
            "tasks": world.entries,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [sys.executable, str(ROOT / "evolve.py"), str(file), "--results", folder]
        done = subprocess.run(
            command, env={**os.environ, **OFFLINE}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise SystemExit(f"our run failed:\n{done.stdout[-2000:]}")
        rows = read_table(storage_at(folder).folder("peer").folder("ledger")).to_pylist()
    found = [r for r in rows if r["stage"] == "search" and r["event"] == "finished"]
    found.sort(key=lambda r: r["time"])
    if any(r["status"] != "ok" or r["reused"] for r in found[1:]):
        raise SystemExit("a candidate failed or was known already")
    seconds = (found[-1]["time"] - found[0]["time"]).total_seconds() / (len(found) - 1)
    return Figure(seconds, max(r["score"] for r in found if r["score"] is not None))


def page(peer: Path, size: tuple[int, int], figures: dict[str, Figure]) -> str:
    """The table, in which each of our rows is held against the peer."""
    rows = [
        [name, f"{f.seconds:.2f}", f"{60 / f.seconds:.1f}", f"{figures[PEER].seconds / f.seconds:.1f}", f"{f.best:.4f}"]
        for name, f in figures.items()
    ]
    setting = (
        f"SmolLM2-135M-Instruct in bfloat16, four fine-tunes, {4 * ITEMS} multiple-choice items of demo-llm's four "
        f"tasks (the same items), at least {size[0]} candidates of each search once its worker is warm, {size[1]} "
        f"threads on both sides, {psutil.cpu_count()} cores, {platform.machine()}. "
        f"Theirs: {peer_versions(peer)}. "
        f"Ours: {', '.join(f'{p} {version(p)}' for p in ('transformers', 'lm_eval', 'torch'))}."
    )
    head = ["search", "seconds of a candidate", "evaluations a minute", "ratio", "best score seen"]
    return "\n\n".join(["## Whole searches beside mergekit-evolve", setting, markdown_table(head, rows)])


def peer_versions(peer: Path) -> str:
    """What the peer's environment holds."""
    code = "import importlib.metadata as m, sys; print(', '.join(f'{p} {m.version(p)}' for p in sys.argv[1:]))"
    command = [str(peer / "bin" / "python"), "-c", code, *PACKAGES]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


if __name__ == "__main__":
    main()
