"""Inputs that are wrong, thousands of them, and how they are answered: ``make benchmark-faults`` writes
results/benchmarks/faults.md.

Every command runs in a process of its own, forked from one that has imported what commands import. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "EVOLVER_CACHE": tempfile.mkdtemp(prefix="evolver-faults-")}

import forked  # noqa: E402
import garbling  # noqa: E402
import near  # noqa: E402
import yaml  # noqa: E402
from forked import Answer  # noqa: E402

PAGE = ROOT / "results" / "benchmarks" / "faults.md"
# Sets up models, data and one finished run; in a process of its own, so that the forked ones have no threads.
SET_UP = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import toys, yaml
from evolver.checkpoints.weights import Checkpoint
place = Path(sys.argv[1])
toys.make_models(place / "models")
toys.make_tasks(place / "tasks", place / "models")
"""


@dataclass
class Kind:
    """What came of the inputs of one kind."""

    tried: int = 0
    refused: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)

    def take(self, name: str, answer: Answer, *words: str) -> None:
        """``words``: one of which a refusal has to hold."""
        self.tried += 1
        if answer.hung:
            self.hangs.append(name)
        elif answer.traceback:
            self.faults.append(f"{name}: {answer.err.strip().splitlines()[-1] if answer.err.strip() else answer.code}")
        elif answer.code == 2:
            self.refused.append(answer.seconds)
            lines = [line for line in answer.err.strip().splitlines() if not line.startswith("warning: ")]
            if len(lines) != 1 or not any(word in lines[0] for word in words):
                self.unnamed.append(f"{name}: {answer.err.strip()[-300:]}")


class Bench:
    """A place with models, data and a finished run, and what is tried there."""

    def __init__(self, place: Path) -> None:
        self.place, self.kinds = place, defaultdict(Kind)
        paths = [str(ROOT), str(ROOT / "tests")]
        subprocess.run([sys.executable, "-c", SET_UP, str(place), *paths], check=True, capture_output=True)
        forked.prepare()
        import toys

        self.valid = toys.settings(place / "models", place / "tasks", toys.SHORT)
        self.config = self.write(self.valid, "run.yaml")
        done = forked.evolver("run", self.config, "--results", place / "results", cwd=place)
        assert done.code == 0, done.err
        self.finished = place / "results" / "toy"

    def write(self, value: Any, name: str) -> Path:
        file = self.place / name
        file.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
        return file

    def configurations(self, seeds: range) -> None:
        """Configurations near a valid one are checked."""
        for seed in seeds:
            changed, key = near.mutated(self.valid, seed, near.OPTIONAL)
            file = self.write(changed, "near.yaml")
            answer = forked.evolver("validate", file, cwd=self.place)
            self.kinds["configurations near a valid one: validate"].take(f"seed {seed}, {key}", answer, *_parts(key))

    def configurations_run(self, seeds: range) -> None:
        """The same are run: what is refused leaves nothing behind."""
        kind = self.kinds["configurations near a valid one: run"]
        for seed in seeds:
            changed, key = near.mutated(self.valid, seed, near.OPTIONAL)
            file, results = self.write(changed, "near.yaml"), self.place / "near-results"
            shutil.rmtree(results, ignore_errors=True)
            answer = forked.evolver("run", file, "--results", results, cwd=self.place)
            kind.take(f"seed {seed}, {key}", answer, *_parts(key))
            if answer.code == 2 and results.exists():
                kind.faults.append(f"seed {seed}, {key}: a refused run left a folder")

    def merges(self, seeds: range) -> None:
        """mergekit files near valid ones are merged."""
        kind, out = self.kinds["mergekit files near valid ones: merge"], self.place / "merged"
        for seed in seeds:
            changed, key = near.mutated(random.Random(seed).choice(merge_files(self.place / "models")), seed)
            file = self.write(changed, "merge.yml")
            shutil.rmtree(out, ignore_errors=True)
            answer = forked.evolver("merge", file, out, cwd=self.place)
            kind.take(f"seed {seed}, {key}", answer, *_parts(key), "model")
            if answer.code == 2 and out.exists():
                kind.faults.append(f"seed {seed}, {key}: a refused merge left a folder")

    def whole_commands(self, seeds: range) -> None:
        """Some of the same again, as a user calls them: in a new process, which has to import what it needs."""
        kind = self.kinds["whole commands with their imports: validate, merge"]
        for seed in seeds:
            merging = seed % 4 == 3
            valid = random.Random(seed).choice(merge_files(self.place / "models")) if merging else self.valid
            changed, key = near.mutated(valid, seed, *([] if merging else [near.OPTIONAL]))
            given = [self.write(changed, "whole.yaml"), *([self.place / "merged"] if merging else [])]
            shutil.rmtree(self.place / "merged", ignore_errors=True)
            command = "merge" if merging else "validate"
            kind.take(f"{command}, seed {seed}, {key}", self._cold(command, *given), *_parts(key), "model")

    def _cold(self, *arguments: Any) -> Answer:
        call = [sys.executable, "-m", "evolver", *map(str, arguments)]
        began = time.perf_counter()
        try:
            ended = subprocess.run(call, cwd=self.place, capture_output=True, text=True, timeout=forked.PATIENCE,
                                   env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)  # fmt: skip
        except subprocess.TimeoutExpired:
            return Answer(-9, "", "", forked.PATIENCE, 0.0, hung=True)
        return Answer(ended.returncode, ended.stdout, ended.stderr, time.perf_counter() - began, 0.0)

    def models(self, seeds: range) -> None:
        """Files of an expert's folder are garbled, and the run is checked."""
        kind = self.kinds["garbled files of models: validate"]
        for name in ("a", "lora"):
            for file in sorted(p.name for p in (self.place / "models" / name).iterdir() if p.is_file()):
                for way, change in [*garbling.WAYS.items(), *((f"edit {s}", _edit(s)) for s in seeds)]:
                    spoilt = self.place / "spoilt"
                    shutil.rmtree(spoilt, ignore_errors=True)
                    shutil.copytree(self.place / "models" / name, spoilt)
                    change(spoilt / file)
                    changed = {**self.valid, "experts": {**self.valid["experts"], "a": str(spoilt)}}
                    answer = forked.evolver("validate", self.write(changed, "spoilt.yaml"), cwd=self.place)
                    kind.take(f"{name}/{file}, {way}", answer, str(spoilt))

    def runs(self, seeds: range) -> None:
        """Files of a run's folder are garbled, and every command is asked."""
        kind, healthy = self.kinds["garbled files of runs: status, report, explain, export"], self.place / "garbled"
        ledger = sorted(p.name for p in (self.finished / "ledger").glob("part-*"))
        files = [*garbling.FILES, *(f"ledger/{name}" for name in (ledger[0], ledger[-1], ledger[len(ledger) // 2]))]
        ways = [*garbling.WAYS.items(), *((f"edit {s}", _edit(s)) for s in seeds)]
        for file in files:
            for way, change in [*ways, *(garbling.TABLES.items() if "ledger" in file else ())]:
                shutil.rmtree(healthy, ignore_errors=True)
                run = healthy / "toy"
                shutil.copytree(self.finished, run)
                change(run / file)
                for name in ("status", "report", "explain", "export"):
                    given = [healthy] if name == "status" else [run, healthy / "out"] if name == "export" else [run]
                    answer = forked.evolver(name, *given, cwd=self.place)
                    kind.take(f"{name} with {file}, {way}", answer, str(run))

    def reruns(self, seeds: range) -> None:
        """The same runs are called again: the same winner, or a sentence."""
        kind, folder = self.kinds["garbled files of runs: run"], self.place / "garbled"
        winner = json.loads((self.finished / "summary.json").read_text())["winner"]
        ledger = sorted(p.name for p in (self.finished / "ledger").glob("part-*"))
        for seed in seeds:
            draw = random.Random(seed)
            file = draw.choice([*garbling.FILES, *(f"ledger/{name}" for name in ledger)])
            ways = {**garbling.WAYS, **(garbling.TABLES if "ledger" in file else {}), "edit": _edit(seed)}
            way = draw.choice(sorted(ways))
            shutil.rmtree(folder, ignore_errors=True)
            run = folder / "toy"
            shutil.copytree(self.finished, run)
            ways[way](run / file)
            answer = forked.evolver("run", self.config, "--results", folder, cwd=self.place)
            kind.take(f"seed {seed}, {file}, {way}", answer, str(run))
            if answer.code == 0 and json.loads((run / "summary.json").read_text())["winner"] != winner:
                kind.faults.append(f"seed {seed}, {file}, {way}: another winner")

    def arguments(self) -> None:
        """Arguments that are no such thing."""
        kind = self.kinds["arguments of commands"]
        odd = ["", " ", "/nowhere", "x" * 5000, "a?b", str(self.config), "s3:", "😀", "/"]
        odd += ["/dev/null", str(self.place / "models" / "a"), "~nobody/x", "file://x", "1e999", "../" * 40]
        commands = ("run", "validate", "resume", "report", "explain", "merge", "export", "evaluate", "study", "status")
        for command in commands:
            for one in odd:
                two = {"merge", "export", "evaluate", "study"}
                for given in [[one, str(self.place / "out")], [str(self.config), one]] if command in two else [[one]]:
                    shutil.rmtree(self.place / "out", ignore_errors=True)
                    answer = forked.evolver(command, *given, cwd=self.place)
                    kind.take(f"{command} {' '.join(g[:40] for g in given)}", answer, "")


def _parts(key: str) -> list[str]:
    """Words of which a sentence about a key holds one."""
    return [key, *(p for p in key.replace("]", "").replace("[", ".").split(".") if p and not p.isdigit())]


def _edit(seed: int) -> Callable[[Path], None]:
    return lambda file: garbling.edited(file, seed)


def merge_files(models: Path) -> list[dict[str, Any]]:
    """mergekit files of several forms."""
    a, b, c = ({"model": str(models / name), "parameters": {"weight": 0.5}} for name in "abc")
    base = str(models / "base")
    return [
        {"merge_method": "linear", "models": [a, b], "dtype": "float32", "parameters": {"normalize": True}},
        {"merge_method": "ties", "base_model": base, "models": [a, b, c],
         "parameters": {"density": 0.5, "lambda": 1.0}},
        {"merge_method": "dare_ties", "base_model": base, "models": [a, b], "dtype": "bfloat16",
         "parameters": {"density": [0.3, 0.7], "normalize": True}},
        {"merge_method": "della", "base_model": base, "models": [a, b],
         "parameters": {"density": 0.5, "epsilon": 0.1, "lambda": 1.0}},
        {"merge_method": "slerp", "base_model": str(models / "a"),
         "models": [{"model": str(models / n)} for n in "ab"],
         "parameters": {"t": [{"filter": "mlp", "value": [0, 0.5, 1]}, {"value": 0.5}]}},
        {"merge_method": "passthrough", "slices": [{"sources": [{"model": str(models / "a"), "layer_range": [0, 2]}]},
                                                   {"sources": [{"model": str(models / "b"), "layer_range": [1, 2]}]}]},
        {"merge_method": "model_stock", "base_model": base, "models": [{"model": str(models / n)} for n in "abc"],
         "tokenizer_source": "base"},
    ]  # fmt: skip


HEAD = """# Wrong inputs, and how they are answered

Made by `make benchmark-faults` in {minutes:.0f} minutes, with fixed seeds. Every input is given to a command in a
process of its own, which is forked from one that has imported the libraries: the seconds are those of the command
without its imports. Only in the row of the whole commands, each process imports what it needs, as it does for a user.

| inputs | tried | refused | faults | hangs | unnamed | median seconds to a refusal | worst |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

Faults are tracebacks, folders that a refused run left, and other winners. Unnamed are sentences that do not name the
user's file or key. The goals are none of these, no hang, a median of 2 seconds and 5 at most.
"""


def page(kinds: dict[str, Kind], seconds: float) -> str:
    """The page."""
    rows = []
    for name, kind in [*kinds.items(), ("all", _together(kinds.values()))]:
        times = sorted(kind.refused)
        median, worst = (f"{v:.2f}" for v in (statistics.median(times), times[-1])) if times else ("–", "–")
        counts = (kind.tried, len(kind.refused), len(kind.faults), len(kind.hangs), len(kind.unnamed))
        rows.append(f"| {name} | {' | '.join(map(str, counts))} | {median} | {worst} |")
    return HEAD.format(minutes=seconds / 60, rows="\n".join(rows))


def _together(kinds: Any) -> Kind:
    out = Kind()
    for kind in kinds:
        out.tried += kind.tried
        for name in ("refused", "faults", "hangs", "unnamed"):
            getattr(out, name).extend(getattr(kind, name))
    return out


def steps(bench: Bench, share: float) -> Iterator[Callable[[], None]]:
    """What is tried; ``share`` of the full number."""

    def first(count: int) -> range:
        return range(max(1, round(count * share)))

    yield lambda: bench.configurations(first(1200))
    yield lambda: bench.merges(first(600))
    yield lambda: bench.whole_commands(first(200))
    yield lambda: bench.arguments()
    yield lambda: bench.models(first(6))
    yield lambda: bench.runs(first(4))
    yield lambda: bench.configurations_run(first(150))
    yield lambda: bench.reruns(first(150))


def main() -> None:
    """Try everything, print what is wrong, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs; the page is written for all only")
    given = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place))
        for step in steps(bench, given.share):
            step()
            name, kind = list(bench.kinds.items())[-1]
            print(f"{name}: {kind.tried} tried, {len(kind.refused)} refused", flush=True)
            for what in ("faults", "hangs", "unnamed"):
                for line in getattr(kind, what):
                    print(f"  {what}: {line}", flush=True)
    text = page(bench.kinds, time.perf_counter() - began)
    print(text)
    if given.share == 1.0:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
