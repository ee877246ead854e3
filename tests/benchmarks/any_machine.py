"""The main job on any computer, busy or old: ``make benchmark-machine`` writes results/benchmarks/any-machine.md.

Older processors are imitated: torch and oneDNN are told not to use what they lack. Every figure is taken in a process
of its own, from the command on, as a user gets it; busy processes are loops that never wait.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "results" / "benchmarks" / "any-machine.md"
LEVELS = {
    "this processor": {},
    "AVX-512 without bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
DEMO, LLM = "configs/demo.yaml", "configs/demo-llm.yaml"
BURN = "while True: pass"
# The child's own job: candidates of a configuration, scored by a worker one after the other.
CANDIDATES = """
import json, sys, time
from evolver.threads import let_threads_sleep
let_threads_sleep()
from dataclasses import replace
from evolver.workers.compute import is_open
from evolver.config.changes import computing
from evolver.config.reading import config_at
from evolver.records import Candidate
from evolver.records.recipe import Merge, Rule
from evolver.driver.prepare import in_compute, prepare
from evolver.workers.worker import Worker, choose_compute

file, compute, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
prepared, choosing = prepare(config_at(file)), 0.0
if is_open(prepared.config):
    began = time.perf_counter()
    chosen = choose_compute(prepared.config).compute
    choosing = time.perf_counter() - began
    prepared = in_compute(prepared, chosen if compute == "auto" else compute)
worker, taken = Worker(prepared.plan, "dev", tasks=prepared.tasks), []
for n in range(count):
    rule = Rule.of({"weight": 1 / len(prepared.experts), "lambda": 1.0 + 0.25 * n, "normalize": False})
    recipe = Merge("task_arithmetic", prepared.experts, prepared.base, (rule,))
    result = worker.evaluate(Candidate(n, recipe, "bench"))
    assert result.status == "ok", result.reason
    taken.append(result.seconds["total"])
print(json.dumps({"seconds": taken, "compute": prepared.config.model.compute, "choosing": choosing}))
"""


def main() -> None:
    """Measure what is asked for, print it, and put it into the page; what is not asked for stays there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--mergekit", help="mergekit-yaml of an environment with mergekit, for the part merging")
    given = parser.parse_args()
    kept = _kept()
    for part in given.parts:
        kept[part] = PARTS[part](given.mergekit)
        print(f"\n{kept[part]}\n", flush=True)
        PAGE.write_text("\n\n".join([HEAD.format(machine=_machine()), *(kept[p] for p in PARTS if p in kept)]) + "\n")


def candidates(_: str | None) -> str:
    """Seconds of a candidate, by model, processor and dtype, idle and beside busy processes."""
    rows = []
    for file, narrow in ((LLM, True), (DEMO, False)):
        for level, environment in LEVELS.items():
            rows.append([_title(file), level, *_of_level(file, environment, narrow)])
            print(rows[-1], flush=True)
    head = ["candidate of", "processor", "chosen", "first", "later", "in the other dtype", "÷ the better dtype",
            "beside two busy processes", "busy ÷ idle", "choosing took"]  # fmt: skip
    return (
        "## Seconds of a candidate\n\nOn two threads; medians of the later ones. The goals are 1.1 for the time over "
        "the better dtype's, and 2.7 for the time beside two busy processes over the idle one: then three processes "
        "share two cores.\n\n" + _table(head, rows)
    )


def _of_level(file: str, environment: Mapping[str, str], narrow: bool) -> list[str]:
    idle = _score(file, "auto", 3, environment)
    first, later = idle["seconds"][0], statistics.median(idle["seconds"][1:])
    best, other = later, "–"
    if narrow:
        dtype = "float32" if idle["compute"] == "bfloat16" else "bfloat16"
        seconds = statistics.median(_score(file, dtype, 2, environment)["seconds"][1:])
        best, other = min(later, seconds), f"{seconds:.1f} ({dtype})"
    with busy(2):
        beside = statistics.median(_score(file, "auto", 3, environment)["seconds"][1:])
    return [idle["compute"], f"{first:.1f}", f"{later:.2f}", other, f"{later / best:.2f}", f"{beside:.2f}",
            f"{beside / later:.2f}", f"{idle['choosing']:.2f}"]  # fmt: skip


def _score(file: str, compute: str, count: int, environment: Mapping[str, str]) -> dict[str, object]:
    said = _call([sys.executable, "-c", CANDIDATES, file, compute, str(count)], environment).stdout
    found: dict[str, object] = json.loads(said.splitlines()[-1])
    return found


def demo(_: str | None) -> str:
    """What make demo takes from the end of its set-up, and what it said of that after its first result."""
    rows = []
    own, old = "this processor", "AVX2"
    for level, environment in {own: {}, old: LEVELS[old], f"{old}, beside one busy process": LEVELS[old]}.items():
        with busy(1 if "beside" in level else 0), tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            command = [sys.executable, "evolve.py", DEMO, "--results", folder]
            process = subprocess.Popen(command, cwd=ROOT, env=_with(environment), stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            told, at, verdict = 0.0, 0.0, ""
            for line in process.stdout:
                if (found := re.search(r"takes about (.*) more", line)) and not told:
                    told, at = _seconds(found[1]), time.perf_counter() - began
                if line.startswith(("Improvement", "No ")):
                    verdict = line.strip()
            assert process.wait() == 0
            took = time.perf_counter() - began
        factor = max(told / (took - at), (took - at) / told)
        rows.append([level, f"{took:.0f}", f"{at:.0f}", f"{told:.0f}", f"{factor:.2f}", verdict])
        print(rows[-1], flush=True)
    head = [
        "processor",
        "seconds in all",
        "first result after",
        "then told to be left",
        "off by a factor of",
        "verdict",
    ]
    return (
        "## make demo\n\nFrom the end of its set-up to the report, all stages. The goals: 210 s on idle cores with "
        "AVX2, 480 s beside one busy process, 120 s with AMX; the time left told within a factor of 1.5.\n\n"
        + _table(head, rows)
    )


def merging(mergekit: str | None) -> str:
    """Whole commands against mergekit, from an empty cache."""
    sys.path.insert(0, str(ROOT))
    from merging import whole_commands  # beside this file

    return whole_commands(mergekit, ["linear", "task_arithmetic", "model_stock", "dare_ties", "ties", "della"])


def checks(_: str | None) -> str:
    """make check and make test, idle; their environment is there."""
    rows = []
    for target, environment in (("check", {}), ("test", {}), ("test", LEVELS["AVX2"])):
        began = time.perf_counter()
        done = subprocess.run(["make", target], cwd=ROOT, env=_with(environment), capture_output=True, text=True)
        took = time.perf_counter() - began
        said = [line for line in done.stdout.splitlines() if " passed" in line]
        level = "AVX2" if environment else "this processor"
        rows.append([f"make {target}", level, f"{took:.0f}", str(done.returncode), said[-1] if said else ""])
        print(rows[-1], flush=True)
    return "## Tests\n\nThe goals are 60 s for `make check` and 600 s for `make test`.\n\n" + _table(
        ["command", "processor", "seconds", "status", "pytest"], rows
    )


PARTS = {"candidates": candidates, "demo": demo, "merging": merging, "checks": checks}
HEAD = """# The main job on any machine

Made by `make benchmark-machine` on {machine}. "AVX-512 without bfloat16" and "AVX2" imitate older processors by
`ONEDNN_MAX_CPU_ISA` and `ATEN_CPU_CAPABILITY`."""


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Beside so many processes that use a core each, as far as they get one."""
    burning = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


def _call(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=ROOT, env=_with(environment), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[:3]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done


def _with(environment: Mapping[str, str]) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **offline, **environment}


def _seconds(words: str) -> float:
    """40 s, 12 min, 3 h 20 min as seconds."""
    sizes = {"s": 1, "min": 60, "h": 3600}
    return float(sum(int(number) * sizes[unit] for number, unit in re.findall(r"(\d+) (s|min|h)", words)))


def _title(file: str) -> str:
    return "make demo" if file == DEMO else "make demo-llm"


def _machine() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", info)
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if f" {flag}" in info]
    return f"{name[1] if name else platform.processor()} ({', '.join(flags)}), {os.cpu_count()} cores"


def _kept() -> dict[str, str]:
    """The sections of the page that is there, by part."""
    text = PAGE.read_text() if PAGE.exists() else ""
    titles = {
        "candidates": "## Seconds of a candidate", "demo": "## make demo", "merging": "## Whole command",
        "checks": "## Tests",
    }  # fmt: skip
    sections = [f"## {s.strip()}" for s in re.split(r"^## ", text, flags=re.MULTILINE)[1:]]
    return {part: s for part, title in titles.items() for s in sections if s.startswith(title)}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    main()
